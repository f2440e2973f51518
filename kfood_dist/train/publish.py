"""Publish the adapter of a finished run: that of its best checkpoint by validation, or of its last one.

    checkpoints, train.publish ──► choose_checkpoint ──► adapter/ with its step, run.json, a line for the log

Always holds: an adapter that was published before stays until the new one is complete.
"""

import shutil
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from kfood_dist.config.sections import Recipe
from kfood_dist.errors import CheckpointError
from kfood_dist.train.run import checkpoint
from kfood_dist.train.run.checkpoint import Checkpoint
from kfood_dist.train.run.facts import add_to_run_json


@dataclass(frozen=True)
class Published:
    """The step whose adapter was published, the last step of the run, the validation accuracy, and the reason.

    The accuracy is None if the checkpoint was not chosen by validation.
    """

    step: int
    last_step: int
    accuracy: float | None
    why: str

    def __str__(self) -> str:
        return f"published the adapter of step {self.step} of {self.last_step}: {self.why}"


def publish_adapter(recipe: Recipe) -> Published:
    """Publish the adapter of a finished run as `train.publish` says, and record its step in run.json.

    If run.json cannot be written, the run does not fail, but the returned `why` says so. Raises CheckpointError if the
    chosen checkpoint is damaged, or if the adapter cannot be written.
    """
    chosen, published = choose_checkpoint(recipe.run.dir / "checkpoints", recipe.train.publish)
    chosen.require_undamaged()
    _copy(chosen.adapter, recipe.run.dir / "adapter")
    try:
        add_to_run_json(recipe.run.dir, {"published": asdict(published)})
    except CheckpointError as error:
        return replace(published, why=f"{published.why}; {error}")
    return published


def choose_checkpoint(checkpoints: Path, which: str) -> tuple[Checkpoint, Published]:
    """Return the best or the last complete checkpoint, and what to report about it. There must be at least one.

    If `which` is "best" and no checkpoint was evaluated, it is the last one.
    """
    last, best = checkpoint.newest(checkpoints), checkpoint.best(checkpoints)
    assert last is not None
    if which == "best" and best is not None:
        chosen, validation = best
        by = f"{validation.accuracy:.1%} right" if validation.best_by == "accuracy" else str(validation)
        return chosen, Published(chosen.step, last.step, validation.accuracy, f"the best by validation, {by}")
    why = "the last, because no checkpoint was evaluated" if which == "best" else "the last, as train.publish says"
    return last, Published(last.step, last.step, None, why)


def _copy(source: Path, target: Path) -> None:
    partial = target.with_name(".adapter.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        shutil.copytree(source, partial)
        shutil.rmtree(target, ignore_errors=True)
        partial.rename(target)
    except OSError as error:  # this includes shutil.Error
        raise CheckpointError(
            f"the adapter cannot be written to {target} ({str(error)[:200]})",
            f"make room there and start again, or take it from {source}",
        ) from None
