"""Skipped steps: which samples caused them, and when there are too many in a row.

    engine's Update + each sample's loss ──► SkipWatch.look ──► a line in the log, or the end of the run

Always holds: all ranks skip the same steps, so all of them enter `look` together. A checkpoint is called good only if a
later step has used its weights.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import torch

from kfood_dist.data.batch.collate import Batch, SkippedSample
from kfood_dist.errors import TrainingError
from kfood_dist.system.world import World
from kfood_dist.train.engine.base import Update
from kfood_dist.train.run.checkpoint import MARKER
from kfood_dist.train.run.monitor import RunLog

_LISTED = 50


class Loss(NamedTuple):
    """The key of a sample, and its loss."""

    key: str
    value: float


class SkipWatch:
    """A counter of skipped steps. Allows up to `limit` of them in a row, but not all of the run's `max_steps`.

    The run starts with step `start`.
    """

    def __init__(
        self,
        limit: int,
        start: int,
        max_steps: int,
        key: Callable[[int], str],
        checkpoints: Path,
        world: World,
        log: RunLog,
    ):
        self.limit = limit
        self.max_steps = max_steps
        self.key = key
        self.checkpoints = checkpoints
        self.world = world
        self.log = log
        self.in_a_row = 0
        self.last_applied = start  # the number of steps after the last applied update

    def look(self, step: int, update: Update, batches: Sequence[Batch], losses: Sequence[torch.Tensor]) -> None:
        """Count one step, and log why it was skipped. A collective if it was skipped.

        `losses` has one tensor per micro-batch, with the loss of each sample. Raises TrainingError if more than `limit`
        steps in a row were skipped, or all steps of the run.
        """
        if update.applied:
            self.in_a_row, self.last_applied = 0, step + 1
            return
        self.in_a_row += 1
        mine = [
            Loss(self.key(i), value)
            for batch, each in zip(batches, losses, strict=False)  # none if the whole step had no label
            for i, value in zip(batch.ids, each.tolist(), strict=False)  # a filler has a loss but no id
        ]
        refused = [sample for batch in batches for sample in batch.refused]
        shared = self.world.all_gather((mine, refused))
        why = reason(
            update,
            [loss for losses, _ in shared for loss in losses],
            [sample for _, refused in shared for sample in refused],
        )
        self.log.say(f"step {step + 1} skipped: {why}")
        # Under fp16, the loss scale of a short run may still be on its way down.
        is_settling = update.loss_scale is not None and update.loss_scale > 1
        is_without_update = step + 1 == self.max_steps and not self.last_applied and not is_settling
        if self.in_a_row > self.limit or is_without_update:
            many = "no step of the run changed the weights"
            if not is_without_update:
                many = f"steps skipped in a row: {self.in_a_row}, more than train.max_skipped_steps {self.limit}"
            resumes = "; the same command resumes from the newest checkpoint" if any(complete(self.checkpoints)) else ""
            raise TrainingError(
                f"{many}; step {step + 1}: {why}; {last_good(self.checkpoints, self.last_applied)}",
                f"{_remedy(losses, refused)}{resumes}",
            )


def reason(update: Update, losses: Sequence[Loss], refused: Sequence[SkippedSample]) -> str:
    """Return why an update was skipped.

    Names one refused sample if no sample of the step could be used, else the samples whose loss is not finite. If every
    loss is finite, names all samples of the step, except if the gradient is only too large for the loss scale of fp16.
    """
    if not losses and refused:
        key, cause = refused[0]
        return f"none of its samples can be used, {key} for example: {cause}"
    faulty = [f"{loss.key} ({loss.value})" for loss in losses if not math.isfinite(loss.value)]
    if faulty:
        return f"the loss is not finite for {_listed(faulty)}"
    if update.loss_scale is not None and update.loss_scale > 1:
        return f"a gradient is beyond fp16 at loss scale {update.loss_scale:g}, which is halved"
    return f"a gradient is not finite, though each sample's loss is; the step's: {_listed([x.key for x in losses])}"


def _remedy(losses: Sequence[object], refused: Sequence[SkippedSample]) -> str:
    cause = "raise data.max_length" if refused and not losses else "lower optim.learning_rate"
    return f"{cause}, or correct the named samples"


def complete(checkpoints: Path) -> Iterator[Path]:
    """Yield the complete checkpoints of a run, the oldest first."""
    yield from sorted(marker.parent for marker in checkpoints.glob(f"step-*/{MARKER}"))


def last_good(checkpoints: Path, last_applied: int) -> str:
    """Name the newest complete checkpoint whose weights later gave a finite gradient, and those without one so far.

    Step n uses the weights after n - 1 steps.
    """
    found = list(complete(checkpoints))
    good = [path for path in found if int(path.name.removeprefix("step-")) < last_applied]
    doubtful = [path for path in found if path not in good]
    message = (
        f"the last good checkpoint is {good[-1]}" if good else "there is no checkpoint yet that is known to be good"
    )
    if doubtful:
        message += f" (delete {', '.join(path.name for path in doubtful)} if the weights themselves are at fault)"
    return message


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(islice(names, _LISTED)) + more


_BAD_LISTED = 50


def require_few_bad(bad: dict[str, str], num_samples: int, max_share: float) -> None:
    """Raise TrainingError with a list of the bad samples if more than `max_share` of the split cannot be read."""
    if len(bad) <= max_share * num_samples:
        return
    listed = "".join(f"\n  {key}: {why}" for key, why in islice(sorted(bad.items()), _BAD_LISTED))
    more = f"\n  and {len(bad) - _BAD_LISTED} more, all in log.txt" if len(bad) > _BAD_LISTED else ""
    raise TrainingError(
        f"{len(bad)} of {num_samples} training samples cannot be read, more than data.max_bad_share {max_share}:"
        f"{listed}{more}\n",
        "look at all of them with `kfood verify`, restore the shards and start again; the run resumes",
    )
