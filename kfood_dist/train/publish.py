"""What a finished run hands out: the adapter of its best checkpoint by validation, or of its last.

    checkpoints, train.publish ──► choose_checkpoint ──► adapter/ with its step, run.json, a line for the log

Always holds: an adapter that was published before stays until the new one is whole.
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
    """The step whose adapter was published, of how many steps, its validation accuracy if one was measured, and why."""

    step: int
    last_step: int
    accuracy: float | None
    why: str

    def __str__(self) -> str:
        return f"published the adapter of step {self.step} of {self.last_step}: {self.why}"


def publish_adapter(recipe: Recipe) -> Published:
    """Publish the adapter of a finished run as `train.publish` says, and note in run.json which step it is of.

    A run.json that cannot be written ends no run: what is returned says so. Raises CheckpointError if the chosen
    checkpoint is damaged, or if the adapter cannot be written.
    """
    chosen, published = choose_checkpoint(recipe.run.dir / "checkpoints", recipe.train.publish)
    chosen.require_whole()
    _copy(chosen.adapter, recipe.run.dir / "adapter")
    try:
        add_to_run_json(recipe.run.dir, {"published": asdict(published)})
    except CheckpointError as error:
        return replace(published, why=f"{published.why}; {error}")
    return published


def choose_checkpoint(checkpoints: Path, which: str) -> tuple[Checkpoint, Published]:
    """The best or the last of the complete checkpoints, of which there is one at least; best where none was measured
    is the last.
    """
    last, best = checkpoint.newest(checkpoints), checkpoint.best(checkpoints)
    assert last is not None
    if which == "best" and best is not None:
        chosen, validation = best
        by = f"{validation.accuracy:.1%} right" if validation.best_by == "accuracy" else str(validation)
        return chosen, Published(chosen.step, last.step, validation.accuracy, f"the best by validation, {by}")
    why = "the last, as nothing was measured on the way" if which == "best" else "the last, as train.publish says"
    return last, Published(last.step, last.step, None, why)


def _copy(source: Path, target: Path) -> None:
    partial = target.with_name(".adapter.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        shutil.copytree(source, partial)
        shutil.rmtree(target, ignore_errors=True)
        partial.rename(target)
    except OSError as error:  # shutil.Error too
        raise CheckpointError(
            f"the adapter cannot be written to {target} ({str(error)[:200]})",
            f"make room there and start again, or take it from {source}",
        ) from None
