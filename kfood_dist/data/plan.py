"""Who reads what: a pure function of a few integers, the same for every cut into ranks and workers.

    (seed, epoch) ──► Order: the sample ids of an epoch, in a global order (`sampling.py`)
    step          ──► ids of that step: the next G of the order (G = global batch; an epoch's last step may be short)
    ids           ──► deal: (micro_step, rank, slot) → id, by position

Always holds: every rank takes the same number of micro-steps; what a step sees depends on seed, epoch and G alone,
so a run may resume on another number of ranks that divides G; a step costs what it holds, not what the epoch holds.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np

from kfood_dist.data.sampling import Order
from kfood_dist.errors import CheckpointError, RecipeError

EMPTY = -1
STATE_VERSION = 2


class MicroBatch(NamedTuple):
    """The samples one rank sees in one micro-step. `filler` stands in, unweighted, where `ids` is empty."""

    step: int
    micro_step: int
    ids: tuple[int, ...]
    filler: int


def deal(ids: np.ndarray, ranks: int, micro_batch: int) -> np.ndarray:
    """Deal one step's ids to (micro_steps, ranks, micro_batch), by position; free slots hold EMPTY.

    A short step takes only as many micro-steps as it needs, on every rank alike.
    """
    per_micro_step = ranks * micro_batch
    micro_steps = -(-len(ids) // per_micro_step)
    slots = np.full(micro_steps * per_micro_step, EMPTY, dtype=np.int64)
    slots[: len(ids)] = ids
    return slots.reshape(micro_steps, ranks, micro_batch)


@dataclass(frozen=True)
class Plan:
    """How the samples of `order` are read by `ranks` ranks, step by step and epoch after epoch."""

    order: Order
    seed: int
    ranks: int
    micro_batch: int
    accumulation: int

    @property
    def global_batch(self) -> int:
        """Samples per optimiser step over all ranks."""
        return self.micro_batch * self.accumulation * self.ranks

    @property
    def samples_per_epoch(self) -> int:
        return self.order.epoch_length

    @property
    def steps_per_epoch(self) -> int:
        return -(-self.samples_per_epoch // self.global_batch)

    def epoch_of(self, step: int) -> int:
        return step // self.steps_per_epoch

    def samples_before(self, step: int) -> int:
        """Samples seen by all steps before `step`, short steps counted as they are."""
        epoch, step_in_epoch = divmod(step, self.steps_per_epoch)
        return epoch * self.samples_per_epoch + min(step_in_epoch * self.global_batch, self.samples_per_epoch)

    def ids(self, step: int) -> np.ndarray:
        """The sample ids of one step, int64."""
        epoch, step_in_epoch = divmod(step, self.steps_per_epoch)
        start = step_in_epoch * self.global_batch
        return self.order.ids(self.seed, epoch, start, min(start + self.global_batch, self.samples_per_epoch))

    def slots(self, start: int, stop: int) -> Iterator[tuple[int, np.ndarray]]:
        """Yield (step, its ids dealt to (micro_steps, ranks, micro_batch)) for `start <= step < stop`."""
        for step in range(start, stop):
            yield step, deal(self.ids(step), self.ranks, self.micro_batch)

    def micro_batches(self, rank: int, start: int, stop: int) -> Iterator[MicroBatch]:
        """Yield what `rank` reads in the steps `start <= step < stop`, in reading order."""
        for step, slots in self.slots(start, stop):
            for micro_step, ranks in enumerate(slots):
                mine = tuple(int(i) for i in ranks[rank] if i != EMPTY)
                yield MicroBatch(step, micro_step, mine, filler=int(slots[0, 0, 0]))

    def coarse_reads(self, start: int, stop: int) -> Iterator[tuple[int, np.ndarray]]:
        """Yield (step, ids) when a step comes near a new window: the ids of that window, to be read in long runs.

        A window is told of one window ahead. Yields nothing where an epoch is a single window.
        """
        if self.order.num_windows == 1:
            return
        told = (-1, -1)  # epoch, and the place in it up to which windows were told of
        for step in range(start, stop):
            epoch, step_in_epoch = divmod(step, self.steps_per_epoch)
            place = step_in_epoch * self.global_batch
            reached = told[1] if told[0] == epoch else self.order.window_at(place)[0]
            last = min(place + self.global_batch, self.samples_per_epoch) - 1
            while reached < self.samples_per_epoch and reached <= self.order.window_at(last)[1]:
                window = self.order.window_at(reached)
                yield step, self.order.ids(self.seed, epoch, *window)
                reached = window[1]
            told = (epoch, reached)

    def num_micro_steps(self, step: int) -> int:
        """Micro-steps each rank takes in `step`: the accumulation, or fewer in an epoch's short last step."""
        num_samples = self.samples_before(step + 1) - self.samples_before(step)
        return -(-num_samples // (self.ranks * self.micro_batch))

    def state(self, step: int) -> dict[str, Any]:
        """The position before `step` as a small JSON record."""
        epoch, step_in_epoch = divmod(step, self.steps_per_epoch)
        samples = step_in_epoch * self.global_batch
        return asdict(Position(STATE_VERSION, self.seed, epoch, samples, self.global_batch, self.order.fingerprint))

    def resume(self, state: dict[str, Any]) -> int:
        """The step to go on with after `state`. Raises CheckpointError naming every difference."""
        here = Position(STATE_VERSION, self.seed, 0, 0, self.global_batch, self.order.fingerprint)
        try:
            saved = Position(**state)
        except TypeError:
            raise _malformed(state) from None
        differing = [
            f"{name} was {getattr(saved, name)} and is now {getattr(here, name)}"
            for name in ("version", "seed", "global_batch", "index_hash")
            if getattr(saved, name) != getattr(here, name)
        ]
        if differing:
            raise CheckpointError(
                f"the checkpoint reads other data: {'; '.join(differing)}",
                "restore those settings, or start anew with another run.dir",
            )
        numbers = (saved.epoch, saved.samples)
        if not all(isinstance(n, int) and n >= 0 for n in numbers) or saved.samples % self.global_batch:
            raise _malformed(state)
        if saved.samples >= self.steps_per_epoch * self.global_batch:
            raise _malformed(state)
        return saved.epoch * self.steps_per_epoch + saved.samples // self.global_batch


def _malformed(state: Any) -> CheckpointError:
    return CheckpointError(f"the data position {state} is malformed", "resume from an older checkpoint")


@dataclass(frozen=True)
class Position:
    """Where a run stands in its data: `samples` of `epoch` are used up. `index_hash` is the order's fingerprint."""

    version: int
    seed: int
    epoch: int
    samples: int
    global_batch: int
    index_hash: str


def accumulation_for(global_batch: int, micro_batch: int, ranks: int) -> int:
    """Micro-steps per step that make `global_batch` on this many ranks.

    Raises RecipeError when ranks × micro-batch does not divide it.
    """
    accumulation, rest = divmod(global_batch, micro_batch * ranks)
    if rest or not accumulation:
        fitting = [n for n in range(1, global_batch + 1) if global_batch % (n * micro_batch) == 0]
        raise RecipeError(
            f"a global batch of {global_batch} cannot be cut into micro-batches of {micro_batch} on {ranks} ranks",
            f"use one of {fitting} ranks, or change train.micro_batch_size"
            if fitting
            else f"let train.micro_batch_size divide {global_batch}",
        )
    return accumulation
