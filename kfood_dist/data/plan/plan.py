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

from kfood_dist.data.plan.sampling import Order
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
        """Yield (step, ids to read ahead of it) for the steps start … stop - 1, ids in the order of the index.

        The first step asks for its whole window, and every step for as large a part of the window after its own as it
        brings the run through its own: reading keeps pace with training, one window ahead and in long runs.
        Yields nothing where an epoch is a single window.
        """
        if self.order.num_windows == 1 or start >= stop:
            return
        asked, _ = self._window(self.samples_before(start))
        _, end = self._window(self.samples_before(stop) - 1)
        window, ids = (-1, -1), np.empty(0, np.int64)
        for step in range(start, stop):
            used = self.samples_before(step + 1)
            begin, next_begin = self._window(used)
            _, next_end = self._window(next_begin)
            due = next_begin + (used - begin) * (next_end - next_begin) // (next_begin - begin)
            while asked < min(due, end):
                if not window[0] <= asked < window[1]:
                    window = self._window(asked)
                    ids = np.sort(self._ids_of(window))
                upto = min(due, window[1])
                yield step, ids[asked - window[0] : upto - window[0]]
                asked = upto

    def _window(self, samples: int) -> tuple[int, int]:
        """The window that a run is in after so many samples, as the samples before its begin and its end."""
        epoch, place = divmod(samples, self.samples_per_epoch)
        start, stop = self.order.window_at(place)
        return epoch * self.samples_per_epoch + start, epoch * self.samples_per_epoch + stop

    def _ids_of(self, window: tuple[int, int]) -> np.ndarray:
        epoch, start = divmod(window[0], self.samples_per_epoch)
        return self.order.ids(self.seed, epoch, start, start + window[1] - window[0])

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


def cut_anew(global_batch: int, micro_batch: int, ranks: int) -> tuple[int, int]:
    """The largest micro-batch up to `micro_batch`, and the micro-steps per step, that make `global_batch` on `ranks`.

    Raises RecipeError when the number of ranks does not divide it.
    """
    fitting = (n for n in range(micro_batch, 0, -1) if global_batch % (n * ranks) == 0)
    micro_batch = next(fitting, 1)
    return micro_batch, accumulation_for(global_batch, micro_batch, ranks)
