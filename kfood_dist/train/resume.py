"""Check what a run must keep when it resumes: its recipe, its global batch and its base model."""

from pathlib import Path
from typing import Any

from kfood_dist.config.recipe import load_recipe
from kfood_dist.config.sections import Recipe
from kfood_dist.data.plan.plan import refit_batch
from kfood_dist.errors import CheckpointError, RecipeError
from kfood_dist.model.identity import config_changes, fingerprint, legacy_fingerprint, read_config
from kfood_dist.train.run import checkpoint

# The keys that may change between a run's start and its resume: where files are, how the global batch is cut (the data
# position checks that its size stays the same), how memory is used, when to save and evaluate, what to publish, and how
# long to train. A longer run also stretches the learning rate's decay from the resumed step on.
CHANGEABLE = {
    "data.shards", "data.num_workers", "data.worker_start", "data.max_bad_share", "model.base",
    "train.max_steps", "train.epochs", "train.save_every_steps", "train.keep_checkpoints", "train.publish",
    "train.micro_batch_size", "train.gradient_accumulation_steps",
    "train.global_batch_size", "train.gradient_checkpointing", "train.zero_stage", "train.deepspeed_config",
    "train.stall_timeout_s", "train.max_skipped_steps", "run.dir", "run.log_every_steps",
    "eval.every_steps", "eval.batch_size", "eval.max_new_tokens",
}  # fmt: skip
# The validation set cannot change after the first evaluation, because checkpoints are compared on the same samples.
CHANGEABLE_UNTIL_EVALUATED = {"eval.split", "eval.max_samples"}


def resumed_cut(recipe: Recipe, world_size: int, newest: checkpoint.Checkpoint) -> tuple[int, int]:
    """Return the micro-batch size and the micro-steps per step that keep a run's global batch on any number of ranks.

    If the number of ranks is the same and the recipe sets another cut, returns that cut. The plan then reports an error
    if it does not make the same global batch. Raises RecipeError if the number of ranks does not divide the global
    batch.
    """
    before, record = _require_same_recipe(recipe), newest.record()
    cut = recipe.train.micro_batch_size, recipe.train.gradient_accumulation_steps
    cut_before = before.train.micro_batch_size, before.train.gradient_accumulation_steps
    global_batch = recipe.train.global_batch_size
    if global_batch is None and (cut == cut_before or record.world_size != world_size):
        global_batch = record.data.get("global_batch")
    if not isinstance(global_batch, int):  # or it is malformed, which the plan reports
        return cut
    return refit_batch(global_batch, recipe.train.micro_batch_size, world_size)


def _require_same_recipe(recipe: Recipe) -> Recipe:
    """Return the recipe with which the run in `recipe.run.dir` was last started.

    Raises CheckpointError if it cannot be read, or if `recipe` differs from it in a key that may not change.
    """
    try:
        last = load_recipe(recipe.run.dir / "recipe.yaml")
    except RecipeError as error:
        raise CheckpointError(
            f"{recipe.run.dir} has a checkpoint, but the recipe it was made with cannot be used ({error.what})",
            "put its recipe.yaml back, or set another run.dir",
        ) from None
    evaluated = checkpoint.best(recipe.run.dir / "checkpoints") is not None
    if changed := forbidden_changes(last, recipe, evaluated):
        raise CheckpointError(
            f"{recipe.run.dir} holds a run of another recipe: {'; '.join(changed)}",
            "restore these settings to resume it, or set another run.dir",
        )
    return last


def forbidden_changes(last: Recipe, recipe: Recipe, evaluated: bool) -> list[str]:
    """Return in words the changes that prevent `recipe` from resuming a run that was last started with `last`.

    `evaluated` says whether a checkpoint of the run was evaluated.
    """
    may_change = CHANGEABLE if evaluated else CHANGEABLE | CHANGEABLE_UNTIL_EVALUATED
    before, now = _flat(last), _flat(recipe)
    return [
        f"{key} was {before[key]} and is now {now[key]}"
        for key in now
        if now[key] != before[key] and key not in may_change
    ]


def require_same_base(newest: checkpoint.Checkpoint, folder: Path, base: str) -> None:
    """Raise CheckpointError if the base model in `folder` is not the one that the checkpoint was trained on."""
    record = newest.record()
    older = record.base_config is None
    before, found = record.base_fingerprint, legacy_fingerprint(folder) if older else fingerprint(folder)
    if before != found:
        what = f"its fingerprint was {before[:12]}, that of {base} is {found[:12]}"
    elif record.base_config is not None and (changed := config_changes(record.base_config, read_config(folder))):
        what = f"{'; '.join(changed)} in the config of {base}"
    else:
        return
    raise CheckpointError(
        f"checkpoint {newest.folder} was trained on another base model: {what}",
        "set model.base to the model that the run started with, or set another run.dir"
        + (
            "; this older checkpoint identifies that model by its exact files, so a saved copy does not match"
            if older
            else ""
        ),
    )


def _flat(recipe: Recipe) -> dict[str, Any]:
    tree = recipe.model_dump(mode="json")
    return {f"{section}.{key}": value for section, keys in tree.items() for key, value in keys.items()}
