"""Parameters in one flat tensor: float32 sums, views of the model, and the 8-bit moments that single tensors had."""

from pathlib import Path

import pytest
import torch
from bitsandbytes.functional import dequantize_blockwise
from bitsandbytes.optim import AdamW8bit
from torch import nn

from kfood_dist.train.engine.flat import FlatGroup
from kfood_dist.train.engine.state import BLOCK, Fragment, Saved, Slice, load, save

SHAPES = {"a": (16, 300), "b": (70, 61), "c": (4099,)}  # none is a multiple of a block


def parameters() -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return {name: nn.Parameter(torch.randn(shape, generator=generator)) for name, shape in SHAPES.items()}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_gradients_are_added_in_float32_and_weights_follow_the_masters(dtype: torch.dtype) -> None:
    mine = parameters()
    expected = {name: parameter.detach().clone() for name, parameter in mine.items()}
    group = FlatGroup(mine, lambda _: dtype)
    group.publish()
    for scale in (1.0, 2.0**-12):  # the sum needs more bits than 16-bit types have
        sum((parameter.float() * scale).sum() for parameter in mine.values()).backward()
        group.accumulate()
    for name, parameter, summed in zip(mine, mine.values(), group.gradients, strict=True):
        assert parameter.dtype == dtype and torch.equal(parameter, expected[name].to(dtype))
        assert torch.equal(summed, torch.full_like(summed, 1.0 + 2.0**-12))
    group.master.data.mul_(2)
    group.publish()
    assert all(torch.equal(parameter, (2 * expected[name]).to(dtype)) for name, parameter in mine.items())
    group.clear()
    assert not group.gradient.any() and all(piece.at % BLOCK == 0 for piece in group.slices)


def take_steps(optimizer: torch.optim.Optimizer, trained: dict[str, nn.Parameter]) -> None:
    """Take three steps with gradients that depend on the parameter and the step only."""
    for step in range(3):
        for number, parameter in enumerate(trained.values()):
            gradient = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(10 * step + number))
            parameter.grad = gradient if parameter.grad is None else parameter.grad.copy_(gradient)
        optimizer.step()


def test_8_bit_moments_are_those_of_single_tensors(tmp_path: Path) -> None:
    """After three steps they are equal. From a checkpoint of single tensors, as of older runs, up to one rounding."""
    alone, together = parameters(), parameters()
    single = AdamW8bit(alone.values(), lr=1e-2)
    group = FlatGroup(together, lambda _: torch.float32)
    flat = AdamW8bit([group.master], lr=1e-2)
    take_steps(single, alone)
    take_steps(flat, together)
    compare(group, flat, alone, single, most=0.0)

    fragments = [Fragment(p, (Slice(name, 0, p.numel(), 0),)) for name, p in alone.items()]
    save(tmp_path / "rank-00000.safetensors", fragments, single, {})
    other = FlatGroup(parameters(), lambda _: torch.float32)
    resumed = AdamW8bit([other.master])
    with Saved(tmp_path) as saved:
        load(saved, [other.fragment], resumed)
    compare(other, resumed, alone, single, most=0.012)  # the bound of test_state.py


def compare(group: FlatGroup, flat: AdamW8bit, alone: dict[str, nn.Parameter], single: AdamW8bit, most: float) -> None:
    """Require equal weights, and moments that differ by at most the share `most` of their norm."""
    for piece in group.slices:
        here, parameter = slice(piece.at, piece.at + piece.length), alone[piece.parameter]
        assert torch.equal(group.master[here], parameter.flatten())
        for moment in "12":
            then = dequantized(single.state[parameter], moment)
            now = dequantized(flat.state[group.master], moment)[here]
            assert (now - then).norm() <= most * then.norm(), (piece.parameter, moment)


def dequantized(state: dict[str, torch.Tensor], moment: str) -> torch.Tensor:
    codes, scales, table = (state[f"{name}{moment}"] for name in ("state", "absmax", "qmap"))
    return dequantize_blockwise(codes.flatten(), absmax=scales, code=table, blocksize=BLOCK)
