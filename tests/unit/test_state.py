"""Optimiser state that is saved for one cut loads into any other. The same cut gets back the same bytes."""

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from bitsandbytes.functional import dequantize_blockwise
from bitsandbytes.optim import AdamW8bit

from kfood_dist.errors import CheckpointError
from kfood_dist.train.engine.state import Fragment, Saved, Slice, load, save

SIZES = {"a": 5000, "b": 300, "c": 9001}
TOTAL = sum(SIZES.values())


def cut(ranks: int, whole: torch.Tensor | None = None) -> list[list[Fragment]]:
    """Join the parameters and cut them into equal parts, as ZeRO-1 and ZeRO-2 do. The last part is padded."""
    size = -(-TOTAL // ranks)
    out = []
    for rank in range(ranks):
        begin, slices, at = rank * size, [], 0
        for name, numel in SIZES.items():
            first, last = max(at, begin), min(at + numel, begin + size)
            if first < last:
                slices.append(Slice(name, first - at, last - first, first - begin))
            at += numel
        flat = torch.zeros(size)
        if whole is not None:
            part = whole[begin : begin + size]
            flat[: len(part)] = part
        out.append([Fragment(flat.requires_grad_(), tuple(slices))])
    return out


def by_parameter(whole: torch.Tensor | None = None) -> list[list[Fragment]]:
    """Return each parameter by itself on a single rank, as without ZeRO, as a matrix if its size allows it."""
    fragments, at = [], 0
    for name, numel in SIZES.items():
        flat = torch.zeros(numel) if whole is None else whole[at : at + numel].clone()
        tensor = flat.view(50, -1) if numel % 50 == 0 else flat
        fragments.append(Fragment(tensor.detach().requires_grad_(), (Slice(name, 0, numel, 0),)))
        at += numel
    return [fragments]


CUTS = {"one by one": by_parameter, **{f"{n} ranks": lambda whole=None, n=n: cut(n, whole) for n in (1, 2, 3, 4)}}


def optimise(ranks: list[list[Fragment]], name: str, steps: int = 3) -> list[torch.optim.Optimizer]:
    """Return one optimiser per rank, after a few steps with gradients that do not depend on the cut."""
    gradient = torch.randn(TOTAL, generator=torch.Generator().manual_seed(1)) * torch.logspace(-4, 0, TOTAL)
    parts = dict(zip(SIZES, gradient.split(list(SIZES.values())), strict=True))
    optimizers = []
    for fragments in ranks:
        tensors = [one.tensor for one in fragments]
        kind = {"adamw8bit": AdamW8bit, "adamw": torch.optim.AdamW}[name]
        optimizer = kind(tensors, lr=1e-3)
        for step in range(steps):
            for one in fragments:
                flat = torch.zeros(one.tensor.numel())
                for s in one.slices:
                    flat[s.at : s.at + s.length] = parts[s.parameter][s.start : s.start + s.length] * (step + 1)
                one.tensor.grad = flat.view_as(one.tensor)
            optimizer.step()
        optimizers.append(optimizer)
    return optimizers


def save_all(folder: Path, ranks: list[list[Fragment]], optimizers: list[torch.optim.Optimizer]) -> Path:
    for rank, (fragments, optimizer) in enumerate(zip(ranks, optimizers, strict=True)):
        save(folder / f"rank-{rank:05d}.safetensors", fragments, optimizer, {"scale": 4.0})
    return folder


def restore(folder: Path, ranks: list[list[Fragment]], name: str) -> list[torch.optim.Optimizer]:
    optimizers = optimise(ranks, name, steps=0)
    with Saved(folder) as saved:
        assert saved.extra == {"scale": 4.0}
        for fragments, optimizer in zip(ranks, optimizers, strict=True):
            load(saved, fragments, optimizer)
    return optimizers


def gathered(ranks: list[list[Fragment]], optimizers: list[torch.optim.Optimizer], name: str) -> torch.Tensor:
    """Return the weights of all parameters, or one of their moments in float32, joined in one tensor."""
    out = {parameter: torch.full((numel,), torch.nan) for parameter, numel in SIZES.items()}
    for fragments, optimizer in zip(ranks, optimizers, strict=True):
        for one in fragments:
            state = optimizer.state[one.tensor]
            values = one.tensor if name == "weights" else state[name]
            if values.dtype == torch.uint8:
                number = name[-1]
                values = dequantize_blockwise(
                    values.flatten(), absmax=state[f"absmax{number}"], code=state[f"qmap{number}"], blocksize=256
                )
            for s in one.slices:
                out[s.parameter][s.start : s.start + s.length] = values.detach().view(-1)[s.at : s.at + s.length]
    return torch.cat(list(out.values()))


@pytest.fixture(scope="module")
def whole() -> torch.Tensor:
    return torch.randn(TOTAL, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", ["adamw8bit", "adamw"])
@pytest.mark.parametrize("after", CUTS)
@pytest.mark.parametrize("before", CUTS)
def test_the_state_of_any_cut_loads_into_any_other_cut(
    tmp_path: Path, whole: torch.Tensor, before: str, after: str, name: str
) -> None:
    saved_ranks = CUTS[before](whole)
    saved = optimise(saved_ranks, name)
    save_all(tmp_path, saved_ranks, saved)
    ranks = CUTS[after]()
    restored = restore(tmp_path, ranks, name)
    assert torch.equal(gathered(ranks, restored, "weights"), gathered(saved_ranks, saved, "weights"))
    for moment, signed in zip(
        ("state1", "state2") if name == "adamw8bit" else ("exp_avg", "exp_avg_sq"), (1, 0), strict=True
    ):
        then, now = (gathered(*pair, moment) for pair in ((saved_ranks, saved), (ranks, restored)))
        if before == after or name == "adamw":
            assert torch.equal(then, now)
        else:
            # The moments are rounded once more, with the codes of another block. The error is at most half the widest
            # gap of the dynamic map. Its last decade, 0.1 to 1 of the block's largest value, has 64 steps if signed
            # and 128 if unsigned.
            assert (then - now).abs().max() <= 1.01 * then.abs().max() * 0.9 / (64 if signed else 128) / 2
            assert (then - now).norm() < 0.012 * then.norm()  # the largest measured value is 0.0107
    steps = {float(state["step"]) for optimizer in restored for state in optimizer.state.values()}
    assert steps == {3.0}


@pytest.mark.parametrize("name", ["adamw8bit", "adamw"])
@pytest.mark.parametrize("how", CUTS)
def test_the_same_cut_resumes_bit_for_bit(tmp_path: Path, whole: torch.Tensor, how: str, name: str) -> None:
    ranks = CUTS[how](whole)
    save_all(tmp_path, ranks, optimise(ranks, name))
    uninterrupted = CUTS[how](whole)
    optimise(uninterrupted, name, steps=4)
    resumed = CUTS[how]()
    optimizers = restore(tmp_path, resumed, name)
    gradient = torch.randn(TOTAL, generator=torch.Generator().manual_seed(1)) * torch.logspace(-4, 0, TOTAL)
    parts = dict(zip(SIZES, gradient.split(list(SIZES.values())), strict=True))
    for fragments, optimizer in zip(resumed, optimizers, strict=True):
        for one in fragments:
            flat = torch.zeros(one.tensor.numel())
            for s in one.slices:
                flat[s.at : s.at + s.length] = parts[s.parameter][s.start : s.start + s.length] * 4
            one.tensor.grad = flat.view_as(one.tensor)
        optimizer.step()
    for mine, theirs in zip(resumed, uninterrupted, strict=True):
        assert all(torch.equal(a.tensor, b.tensor) for a, b in zip(mine, theirs, strict=True))


def test_before_the_first_update_only_weights_are_restored(tmp_path: Path, whole: torch.Tensor) -> None:
    ranks = cut(2, whole)
    save_all(tmp_path, ranks, optimise(ranks, "adamw8bit", steps=0))
    fresh = cut(3)
    optimizers = restore(tmp_path, fresh, "adamw8bit")
    assert not any(optimizer.state for optimizer in optimizers)
    assert torch.equal(torch.cat([fragments[0].tensor.detach() for fragments in fresh])[:TOTAL], whole)


def test_a_missing_file_is_reported_by_the_parameters_it_held(tmp_path: Path, whole: torch.Tensor) -> None:
    ranks = cut(3, whole)
    save_all(tmp_path, ranks, optimise(ranks, "adamw8bit"))
    (tmp_path / "rank-00001.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"lacks .* numbers of a \(weights\)"):
        restore(tmp_path, cut(2), "adamw8bit")
    for path in tmp_path.iterdir():
        path.unlink()
    with pytest.raises(CheckpointError, match="holds no rank"):
        restore(tmp_path, cut(2), "adamw8bit")


def test_the_cuts_of_this_test_cover_every_number_once() -> None:
    for make in CUTS.values():
        covered = sorted(
            (s.parameter, s.start, s.length) for fragments in make() for one in fragments for s in one.slices
        )
        assert sum(length for *_, length in covered) == TOTAL
        assert all(a[0] != b[0] or a[1] + a[2] == b[1] for a, b in pairwise(covered))


def test_another_adapters_state_is_refused_by_its_sizes(tmp_path: Path, whole: torch.Tensor) -> None:
    ranks = cut(2, whole)
    save_all(tmp_path, ranks, optimise(ranks, "adamw8bit"))
    with Saved(tmp_path) as saved:
        saved.require_parameters(SIZES)
        with pytest.raises(CheckpointError, match="of another adapter: a has 5,000 numbers there and 2,500 here"):
            saved.require_parameters({**SIZES, "a": 2500})
        with pytest.raises(CheckpointError, match="d has 0 numbers there and 7 here"):
            saved.require_parameters({**SIZES, "d": 7})
        with pytest.raises(CheckpointError, match="c has 9,001 numbers there and 0 here"):
            saved.require_parameters({"a": 5000, "b": 300})
