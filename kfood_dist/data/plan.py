"""Who reads what: a pure function of a few integers, the same for every cut into ranks and workers.

    (seed, epoch) ──► order: a permutation of all sample ids
    step          ──► ids of that step: the next G of the order (G = global batch; an epoch's last step may be short)
    ids           ──► deal: (micro_step, rank, slot) → id, by position

Always holds: every sample once per epoch; every rank the same number of micro-steps; what a step sees depends
on seed, epoch and G alone, so a run may resume on another number of ranks that divides G.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np

from kfood_dist.errors import CheckpointError, RecipeError

EMPTY = -1
STATE_VERSION = 1


class MicroBatch(NamedTuple):
    """The samples one rank sees in one micro-step. `filler` stands in, unweighted, where `ids` is empty."""

    step: int
    micro_step: int
    ids: tuple[int, ...]
    filler: int


def order(seed: int, epoch: int, num_samples: int) -> np.ndarray:
    """The epoch's permutation of `range(num_samples)`, int64, shape (num_samples,).

    Sorts raw Philox words: numpy guarantees the raw stream of a bit generator for good, while
    `Generator.permutation` may change between releases (NEP 19), and with it what a resumed run reads.
    """
    words = np.random.Philox(key=np.array([seed, epoch], dtype=np.uint64)).random_raw(num_samples)
    return np.argsort(words, kind="stable")


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
    """How `num_samples` samples are read by `ranks` ranks, step by step and epoch after epoch."""

    num_samples: int
    seed: int
    ranks: int
    micro_batch: int
    accumulation: int

    @property
    def global_batch(self) -> int:
        """Samples per optimiser step over all ranks."""
        return self.micro_batch * self.accumulation * self.ranks

    @property
    def steps_per_epoch(self) -> int:
        return -(-self.num_samples // self.global_batch)

    def epoch_of(self, step: int) -> int:
        return step // self.steps_per_epoch

    def samples_before(self, step: int) -> int:
        """Samples seen by all steps before `step`, short steps counted as they are."""
        epoch, step_in_epoch = divmod(step, self.steps_per_epoch)
        return epoch * self.num_samples + min(step_in_epoch * self.global_batch, self.num_samples)

    def steps(self, start: int, stop: int) -> Iterator[tuple[int, np.ndarray]]:
        """Yield (step, ids of that step) for `start <= step < stop`."""
        epoch, ids = -1, np.empty(0, dtype=np.int64)
        for step in range(start, stop):
            if self.epoch_of(step) != epoch:
                epoch = self.epoch_of(step)
                ids = order(self.seed, epoch, self.num_samples)
            begin = step % self.steps_per_epoch * self.global_batch
            yield step, ids[begin : begin + self.global_batch]

    def slots(self, start: int, stop: int) -> Iterator[tuple[int, np.ndarray]]:
        """Yield (step, its ids dealt to (micro_steps, ranks, micro_batch)) for `start <= step < stop`."""
        for step, ids in self.steps(start, stop):
            yield step, deal(ids, self.ranks, self.micro_batch)

    def micro_batches(self, rank: int, start: int, stop: int) -> Iterator[MicroBatch]:
        """Yield what `rank` reads in the steps `start <= step < stop`, in reading order."""
        for step, slots in self.slots(start, stop):
            for micro_step, ranks in enumerate(slots):
                mine = tuple(int(i) for i in ranks[rank] if i != EMPTY)
                yield MicroBatch(step, micro_step, mine, filler=int(slots[0, 0, 0]))

    def num_micro_steps(self, step: int) -> int:
        """Micro-steps each rank takes in `step`: the accumulation, or fewer in an epoch's short last step."""
        num_samples = self.samples_before(step + 1) - self.samples_before(step)
        return -(-num_samples // (self.ranks * self.micro_batch))

    def state(self, step: int, index_hash: str) -> dict[str, Any]:
        """The position before `step` as a small JSON record."""
        epoch, step_in_epoch = divmod(step, self.steps_per_epoch)
        return asdict(
            Position(
                STATE_VERSION,
                self.seed,
                epoch,
                step_in_epoch * self.global_batch,
                self.global_batch,
                index_hash,
            )
        )

    def resume(self, state: dict[str, Any], index_hash: str) -> int:
        """The step to go on with after `state`. Raises CheckpointError naming every difference."""
        here = Position(STATE_VERSION, self.seed, 0, 0, self.global_batch, index_hash)
        try:
            saved = Position(**state)
        except TypeError:
            raise CheckpointError(
                f"the data position {state} is malformed", "resume from an older checkpoint"
            ) from None
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
        return saved.epoch * self.steps_per_epoch + saved.samples // self.global_batch


@dataclass(frozen=True)
class Position:
    """Where a run stands in its data: `samples` of `epoch` are used up."""

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
