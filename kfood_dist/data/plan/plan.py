"""Which samples a step reads: a pure function of a few integers, the same for any number of ranks and workers.

    (seed, epoch) ──► Order: the sample ids of an epoch, in a global order (`sampling.py`)
    step          ──► ids of that step: the next G of the order (G = global batch; an epoch's last step may be short)
    ids           ──► deal: (micro_step, rank, slot) → id, by position

Always holds: every rank takes the same number of micro-steps. The samples of a step depend only on seed, epoch, G and
the step's number, not on the ranks, so a run may resume on another number of ranks that divides G. The cost of a step
grows with the samples of the step, not with those of the epoch.
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
    """The samples of one rank in one micro-step. If `ids` is empty, `filler` takes their place, without any weight."""

    step: int
    micro_step: int
    ids: tuple[int, ...]
    filler: int


def assign_slots(ids: np.ndarray, ranks: int, micro_batch: int) -> np.ndarray:
    """Assign one step's ids to slots (micro_steps, ranks, micro_batch), by position. Free slots hold EMPTY.

    A short step takes only as many micro-steps as it needs, the same number on every rank.
    """
    per_micro_step = ranks * micro_batch
    micro_steps = -(-len(ids) // per_micro_step)
    slots = np.full(micro_steps * per_micro_step, EMPTY, dtype=np.int64)
    slots[: len(ids)] = ids
    return slots.reshape(micro_steps, ranks, micro_batch)


@dataclass(frozen=True)
class Plan:
    """The way in which `ranks` ranks read the samples of `order`, step by step and epoch after epoch."""

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
        """Return the number of samples in all steps before `step`. A short step counts with its real number."""
        epoch, step_in_epoch = divmod(step, self.steps_per_epoch)
        return epoch * self.samples_per_epoch + min(step_in_epoch * self.global_batch, self.samples_per_epoch)

    def ids(self, step: int) -> np.ndarray:
        """Return the sample ids of one step, int64."""
        epoch, step_in_epoch = divmod(step, self.steps_per_epoch)
        start = step_in_epoch * self.global_batch
        return self.order.ids(self.seed, epoch, start, min(start + self.global_batch, self.samples_per_epoch))

    def slots(self, start: int, stop: int) -> Iterator[tuple[int, np.ndarray]]:
        """Yield (step, its ids in slots (micro_steps, ranks, micro_batch)) for `start <= step < stop`."""
        for step in range(start, stop):
            yield step, assign_slots(self.ids(step), self.ranks, self.micro_batch)

    def micro_batches(self, rank: int, start: int, stop: int) -> Iterator[MicroBatch]:
        """Yield the micro-batches of `rank` in the steps `start <= step < stop`, in reading order."""
        for step, slots in self.slots(start, stop):
            for micro_step, ranks in enumerate(slots):
                mine = tuple(int(i) for i in ranks[rank] if i != EMPTY)
                yield MicroBatch(step, micro_step, mine, filler=int(slots[0, 0, 0]))

    def step_parts(self, rank: int, start: int, stop: int) -> Iterator[MicroBatch]:
        """Yield all samples of `rank` in each of the steps `start <= step < stop`, together as one micro-batch."""
        for step, slots in self.slots(start, stop):
            mine = tuple(int(i) for i in slots[:, rank].ravel() if i != EMPTY)
            yield MicroBatch(step, 0, mine, filler=int(slots[0, 0, 0]))

    def windows_to_prefetch(self, start: int, stop: int) -> Iterator[tuple[int, np.ndarray]]:
        """Yield (step, ids to read ahead of it) for `start <= step < stop`, with the ids in the order of the index.

        The first step asks for its complete window. Every step asks for a part of the next window: the same share as
        the part of the current window that the step uses. So reading keeps pace with training, one window ahead and
        in long runs. Yields nothing if an epoch is a single window.
        """
        if self.order.num_windows == 1 or start >= stop:
            return
        requested, _ = self._window(self.samples_before(start))
        _, end = self._window(self.samples_before(stop) - 1)
        window, ids = (-1, -1), np.empty(0, np.int64)
        for step in range(start, stop):
            used = self.samples_before(step + 1)
            begin, next_begin = self._window(used)
            _, next_end = self._window(next_begin)
            due = next_begin + (used - begin) * (next_end - next_begin) // (next_begin - begin)
            while requested < min(due, end):
                if not window[0] <= requested < window[1]:
                    window = self._window(requested)
                    ids = np.sort(self._ids_of(window))
                upto = min(due, window[1])
                yield step, ids[requested - window[0] : upto - window[0]]
                requested = upto

    def _window(self, samples: int) -> tuple[int, int]:
        """Return the window that a run is in after `samples` samples, as the samples before its start and its end."""
        epoch, place = divmod(samples, self.samples_per_epoch)
        start, stop = self.order.window_at(place)
        return epoch * self.samples_per_epoch + start, epoch * self.samples_per_epoch + stop

    def _ids_of(self, window: tuple[int, int]) -> np.ndarray:
        epoch, start = divmod(window[0], self.samples_per_epoch)
        return self.order.ids(self.seed, epoch, start, start + window[1] - window[0])

    def num_micro_steps(self, step: int) -> int:
        """Return the micro-steps of each rank in `step`: the accumulation, or fewer in an epoch's short last step."""
        num_samples = self.samples_before(step + 1) - self.samples_before(step)
        return -(-num_samples // (self.ranks * self.micro_batch))

    def state(self, step: int) -> dict[str, Any]:
        """Return the position before `step` as a small JSON record."""
        epoch, step_in_epoch = divmod(step, self.steps_per_epoch)
        samples = step_in_epoch * self.global_batch
        return asdict(Position(STATE_VERSION, self.seed, epoch, samples, self.global_batch, self.order.fingerprint))

    def resume(self, state: dict[str, Any]) -> int:
        """Return the step to continue with after `state`.

        Raises CheckpointError if `state` is of other settings, and names every difference, or if it is malformed.
        """
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
                f"the checkpoint was written with other data settings: {'; '.join(differing)}",
                "restore those settings, or start a new run with another run.dir",
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
    """The position of a run in its data: it has used `samples` of `epoch`. `index_hash` is the order's fingerprint."""

    version: int
    seed: int
    epoch: int
    samples: int
    global_batch: int
    index_hash: str


def accumulation_for(global_batch: int, micro_batch: int, ranks: int) -> int:
    """Return the micro-steps per step that make `global_batch` on this many ranks.

    Raises RecipeError if ranks × micro-batch does not divide `global_batch`.
    """
    accumulation, rest = divmod(global_batch, micro_batch * ranks)
    if rest or not accumulation:
        fitting = [n for n in range(1, global_batch + 1) if global_batch % (n * micro_batch) == 0]
        raise RecipeError(
            f"a global batch of {global_batch} cannot be cut into micro-batches of {micro_batch} on {ranks} ranks",
            f"use one of {fitting} ranks, or change train.micro_batch_size"
            if fitting
            else f"set train.micro_batch_size to a divisor of {global_batch}",
        )
    return accumulation


def refit_batch(global_batch: int, micro_batch: int, ranks: int) -> tuple[int, int]:
    """Return the largest micro-batch up to `micro_batch`, and its micro-steps per step, for `global_batch` on `ranks`.

    Raises RecipeError if the number of ranks does not divide `global_batch`.
    """
    fitting = (n for n in range(micro_batch, 0, -1) if global_batch % (n * ranks) == 0)
    micro_batch = next(fitting, 1)
    return micro_batch, accumulation_for(global_batch, micro_batch, ranks)
