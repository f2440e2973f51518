"""Save and load the state of an engine, on any number of ranks: float32 master weights and optimiser moments.

    this rank's fragments ──► save ──► rank-00000.safetensors, …: raw bytes, and the place of each parameter in them
    all ranks' files ──► Saved ──► load ──► the same cut: the bytes as they were
                                       └──► another cut: float32 by parameter, distributed and quantised again

Always holds: a tensor that covers the same slices as a tensor of the files gets the same bytes back, so a resume on the
same ranks is exact. With another number of ranks, another ZeRO stage or no ZeRO, the weights are exactly the same, and
the moments are the same up to one rounding to 8 bits. No pickle is read.
"""

import json
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from kfood_dist.errors import CheckpointError

WEIGHTS = "weights"


def file_name(rank: int) -> str:
    """Return the file name of one rank's tensors in a checkpoint's engine folder."""
    return f"rank-{rank:05d}.safetensors"


# The names of the moments: two in bitsandbytes' optimiser, two in torch's.
_MOMENTS = ("state1", "state2", "exp_avg", "exp_avg_sq")
BLOCK = 256  # numbers that share one scale in bitsandbytes' 8-bit states (arXiv 2110.02861, section 2.1)


class Slice(NamedTuple):
    """`length` numbers of a parameter from `start` on. In the fragment they begin at `at`. Both are flattened."""

    parameter: str
    start: int
    length: int
    at: int


@dataclass(frozen=True)
class Fragment:
    """A float32 tensor that this rank's optimiser updates: one complete parameter, or flat parts of several."""

    tensor: torch.Tensor
    slices: tuple[Slice, ...]


def save(path: Path, fragments: Sequence[Fragment], optimizer: torch.optim.Optimizer, extra: Mapping[str, Any]) -> None:
    """Write one rank's tensors and their optimiser state to a safetensors file. `extra` is any small JSON object."""
    from safetensors.torch import save_file

    tensors: dict[str, torch.Tensor] = {}
    records = []
    for i, fragment in enumerate(fragments):
        state = optimizer.state.get(fragment.tensor, {})
        numbers = {name: float(value) for name, value in state.items() if _is_number(value)}
        kept = {name: value for name, value in state.items() if torch.is_tensor(value) and value.dim()}
        for name, value in {WEIGHTS: fragment.tensor, **kept}.items():
            # A copy, because bitsandbytes shares its code tables between states, and the file format allows no sharing.
            tensors[f"{i}.{name}"] = value.detach().flatten().cpu().clone()
        records.append(
            {"numel": fragment.tensor.numel(), "stretches": fragment.slices, "numbers": numbers, "tensors": list(kept)}
        )
    save_file(tensors, path, {"held": json.dumps(records), "extra": json.dumps(extra)})


def load(saved: "Saved", fragments: Sequence[Fragment], optimizer: torch.optim.Optimizer) -> None:
    """Fill this rank's tensors and their optimiser state from the files of all ranks, whatever cut they have.

    Raises CheckpointError if part of a parameter is in none of the files.
    """
    with torch.no_grad():
        for fragment in fragments:
            same = saved.same(fragment)
            weights = _dealt(saved, fragment, WEIGHTS) if same is None else same[WEIGHTS]
            fragment.tensor.detach().view(-1).copy_(weights)
            if saved.has_state(fragment):
                optimizer.state[fragment.tensor] = _restored(saved, fragment, optimizer, same)


class Saved:
    """The files of all ranks of one checkpoint, open for reading. A context manager."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._open = ExitStack()
        self._files: list[Any] = []
        self._records: list[list[dict[str, Any]]] = []
        self._places: dict[str, list[tuple[int, int, Slice]]] = {}
        self.extra: dict[str, Any] = {}

    def __enter__(self) -> "Saved":
        from safetensors import safe_open

        paths = sorted(self.folder.glob("rank-*.safetensors"))
        if not paths:
            raise CheckpointError(f"{self.folder} holds no rank-*.safetensors", _OLDER)
        for number, path in enumerate(paths):
            file = self._open.enter_context(safe_open(path, framework="pt", device="cpu"))
            facts = file.metadata()
            records = json.loads(facts["held"])
            for i, record in enumerate(records):
                record["stretches"] = tuple(Slice(*words) for words in record["stretches"])
                for piece in record["stretches"]:
                    self._places.setdefault(piece.parameter, []).append((number, i, piece))
            self._files.append(file)
            self._records.append(records)
            self.extra = self.extra or json.loads(facts["extra"])
        return self

    def __exit__(self, *_: Any) -> None:
        self._open.close()

    def require_parameters(self, sizes: Mapping[str, int]) -> None:
        """Raise CheckpointError unless the files have exactly these parameters with these numbers of elements."""
        saved = {name: max(piece.start + piece.length for *_, piece in places) for name, places in self._places.items()}
        for name in sorted(saved.keys() | sizes.keys()):
            if saved.get(name) != sizes.get(name):
                raise CheckpointError(
                    f"{self.folder} is of another adapter: {name} has {saved.get(name, 0):,} numbers there and "
                    f"{sizes.get(name, 0):,} here",
                    _OLDER,
                )

    def read(self, name: str, wanted: Slice) -> torch.Tensor:
        """Return the numbers of `wanted` in float32, (length,), from all files that have some of them.

        `name` selects the weights or a moment. Raises CheckpointError if some of the numbers are in no file.
        """
        out, missing = torch.empty(wanted.length), wanted.length
        for number, i, piece in self._places.get(wanted.parameter, []):
            begin = max(wanted.start, piece.start)
            end = min(wanted.start + wanted.length, piece.start + piece.length)
            if begin < end:
                at = piece.at + begin - piece.start
                out[begin - wanted.start : end - wanted.start] = self._numbers(number, i, name, at, end - begin)
                missing -= end - begin
        if missing > 0:
            raise CheckpointError(
                f"{self.folder} lacks {missing:,} of {wanted.length:,} numbers of {wanted.parameter} ({name})", _OLDER
            )
        return out

    def same(self, fragment: Fragment) -> dict[str, torch.Tensor] | None:
        """Return the saved weights and state of a tensor that covers exactly the slices of `fragment`, or None."""
        for number, i, _ in self._places.get(fragment.slices[0].parameter, []) if fragment.slices else []:
            record = self._records[number][i]
            if record["stretches"] == fragment.slices and record["numel"] == fragment.tensor.numel():
                return {name: self._files[number].get_tensor(f"{i}.{name}") for name in (WEIGHTS, *record["tensors"])}
        return None

    def has_state(self, fragment: Fragment) -> bool:
        """Return whether the optimiser had taken a step on these numbers when they were saved."""
        return any(self._records[n][i]["tensors"] for n, i in self._sources(fragment))

    def number(self, name: str, fragment: Fragment) -> float:
        """Return a number of the optimiser's state, such as its count of steps. If the sources differ, the largest."""
        return max(self._records[n][i]["numbers"][name] for n, i in self._sources(fragment))

    def _sources(self, fragment: Fragment) -> set[tuple[int, int]]:
        return {(n, i) for s in fragment.slices for n, i, _ in self._places.get(s.parameter, [])}

    def _numbers(self, number: int, i: int, name: str, at: int, length: int) -> torch.Tensor:
        file, end = self._files[number], at + length
        values = file.get_slice(f"{i}.{name}")[at:end]
        if values.dtype != torch.uint8:
            return values.float()
        which = name.removeprefix("state")
        codes = file.get_tensor(f"{i}.qmap{which}")
        scales = file.get_slice(f"{i}.absmax{which}")[at // BLOCK : (end - 1) // BLOCK + 1]
        return codes[values.long()] * scales[torch.arange(at, end) // BLOCK - at // BLOCK]


_OLDER = "delete that checkpoint folder; the run then uses the one before it, or starts from the beginning"


def _dealt(saved: Saved, fragment: Fragment, name: str) -> torch.Tensor:
    """Return a fragment's weights or a moment as flat float32, gathered from any cut. Padding is zero."""
    out = torch.zeros(fragment.tensor.numel())
    for piece in fragment.slices:
        out[piece.at : piece.at + piece.length] = saved.read(name, piece)
    return out


def _restored(
    saved: Saved, fragment: Fragment, optimizer: torch.optim.Optimizer, same: dict[str, torch.Tensor] | None
) -> dict[str, Any]:
    """Return the optimiser's state of one tensor: `same` as it is, or gathered from the files and quantised again."""
    state = _fresh_state(optimizer, fragment.tensor)
    for name, value in state.items():
        if _is_number(value):
            count = saved.number(name, fragment)
            state[name] = torch.tensor(count, dtype=value.dtype) if torch.is_tensor(value) else type(value)(count)
        elif same is not None:
            value.copy_(same[name].view_as(value))
        elif name in _MOMENTS:
            _put(state, name, _dealt(saved, fragment, name))
    return state


def _put(state: dict[str, Any], name: str, moment: torch.Tensor) -> None:
    """Write a float32 moment into a state. If the state has it in 8 bits, quantise it."""
    target = state[name]
    moment = moment.to(target.device)
    if target.dtype != torch.uint8:
        target.copy_(moment.view_as(target))
        return
    from bitsandbytes.functional import quantize_blockwise

    which = name.removeprefix("state")
    codes, how = quantize_blockwise(moment, code=state[f"qmap{which}"], blocksize=BLOCK)
    target.copy_(codes.view_as(target))
    state[f"absmax{which}"].copy_(how.absmax)


def _fresh_state(optimizer: Any, tensor: torch.Tensor) -> dict[str, Any]:
    """Return the initial state of the optimiser for `tensor`, in the types that the optimiser would choose."""
    if not hasattr(optimizer, "init_state"):  # torch's AdamW, which keeps its count of steps on the CPU
        return {"step": torch.tensor(0.0), "exp_avg": torch.zeros_like(tensor), "exp_avg_sq": torch.zeros_like(tensor)}
    group = optimizer.param_groups[0]
    listed, group["params"] = group["params"], [tensor]  # ZeRO-3 lists a tensor only while it is updated
    try:
        optimizer.init_state(group, tensor, 0, 0)
    finally:
        group["params"] = listed
    return optimizer.state.pop(tensor)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) or (torch.is_tensor(value) and value.dim() == 0)
