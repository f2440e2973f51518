"""Everything that can be known to be wrong before a process group starts or a model loads, checked in a second.

    recipe, world size ──► preflight ──► Plan: who reads what; or one error with its remedy

The launcher runs it once, before it starts any rank; each rank runs it again, since a rank may be started otherwise.
"""

from pathlib import Path
from typing import Any

from kfood_dist.config.recipe import Recipe, load_recipe
from kfood_dist.data.mix import build_data_order, open_mixture
from kfood_dist.data.plan.plan import Plan, accumulation_for, cut_anew
from kfood_dist.data.shards.manifest import Manifest
from kfood_dist.data.shards.reader import open_split
from kfood_dist.errors import CheckpointError, RecipeError
from kfood_dist.model.base import build_template
from kfood_dist.model.files import base_folder, require_base
from kfood_dist.model.identity import config_changes, fingerprint, fingerprint_of_files, read_config
from kfood_dist.system.processes import require_folder_possible
from kfood_dist.train.engine.zero_config import deepspeed_config
from kfood_dist.train.run import checkpoint

# What may change between a run's start and its resume: where things lie, how the global batch is cut (the data
# position checks that it stays the same), how memory is used, when to save and measure, what to publish, and how long
# to train. A longer run also stretches the learning rate's decay from the resumed step on.
CHANGEABLE = {
    "data.shards", "data.num_workers", "data.worker_start", "data.max_bad_share", "model.base",
    "train.max_steps", "train.epochs", "train.save_every_steps", "train.keep_checkpoints", "train.publish",
    "train.micro_batch_size", "train.gradient_accumulation_steps",
    "train.global_batch_size", "train.gradient_checkpointing", "train.zero_stage", "train.deepspeed_config",
    "train.stall_timeout_s", "train.max_skipped_steps", "run.dir", "run.log_every_steps",
    "eval.every_steps", "eval.batch_size", "eval.max_new_tokens",
}  # fmt: skip
# What is measured is free until the first measurement: the best checkpoint is the best of one and the same.
CHANGEABLE_UNMEASURED = {"eval.split", "eval.max_samples"}


def preflight(recipe: Recipe, world_size: int, look_at_files: bool = True) -> Plan:
    """Check a recipe against shards, base model, DeepSpeed JSON, run directory and world size.

    `look_at_files` looks for every shard too, which one rank may do for all. Returns the plan of reading.

    Raises RecipeError, ShardError, ModelError or CheckpointError.
    """
    train = recipe.train
    for folder in (recipe.run.dir, recipe.run.dir / "checkpoints"):
        require_folder_possible(folder, "run.dir")
    newest = checkpoint.newest(recipe.run.dir / "checkpoints")
    if newest and look_at_files:
        newest.require_whole()
    micro_batch, accumulation = _resumed_cut(recipe, world_size, newest) if newest else _first_cut(recipe, world_size)
    if train.zero_stage:
        deepspeed_config(recipe, accumulation, world_size, micro_batch)
    data = open_mixture(recipe.data, "train")
    require_image_size(data.manifest, recipe.data.image_size)
    if look_at_files:
        data.require_files()
    plan = Plan(build_data_order(data, recipe.data), train.seed, world_size, micro_batch, accumulation)
    if recipe.eval.every_steps:
        measured = open_split(recipe.data.shards, recipe.eval.split)
        if look_at_files:
            measured.require_files()
    require_base(recipe.model.base)
    build_template(recipe.model.base, recipe.data)
    if newest:
        if plan.resume(newest.record().data) != newest.step:
            raise CheckpointError(f"checkpoint {newest.folder} has the data position of another step", "delete it")
        if base := base_folder(recipe.model.base):
            require_same_base(newest, base, recipe.model.base)
    return plan


def _first_cut(recipe: Recipe, world_size: int) -> tuple[int, int]:
    """Micro-batch and micro-steps per step of a run that begins. Raises RecipeError if they cannot make its batch."""
    train = recipe.train
    if train.global_batch_size is None:
        return train.micro_batch_size, train.gradient_accumulation_steps
    return train.micro_batch_size, accumulation_for(train.global_batch_size, train.micro_batch_size, world_size)


def _resumed_cut(recipe: Recipe, world_size: int, newest: checkpoint.Checkpoint) -> tuple[int, int]:
    """Micro-batch and micro-steps per step that keep a run's global batch, however many ranks it has had since.

    Where the same ranks are told to cut otherwise, that is what is returned; the plan will tell if it does not fit.
    Raises RecipeError if the number of ranks does not divide the global batch.
    """
    before, record = _require_same_recipe(recipe), newest.record()
    told = recipe.train.micro_batch_size, recipe.train.gradient_accumulation_steps
    told_before = before.train.micro_batch_size, before.train.gradient_accumulation_steps
    global_batch = recipe.train.global_batch_size
    if global_batch is None and (told == told_before or record.world_size != world_size):
        global_batch = record.data.get("global_batch")
    if not isinstance(global_batch, int):  # or malformed, which the plan will tell
        return told
    return cut_anew(global_batch, recipe.train.micro_batch_size, world_size)


def num_steps(recipe: Recipe, plan: Plan) -> int:
    """Optimiser steps of the whole run: `train.max_steps`, or as many as `train.epochs` take."""
    return recipe.train.max_steps or recipe.train.epochs * plan.steps_per_epoch


def require_image_size(manifest: Manifest, image_size: int) -> None:
    """Raise RecipeError unless the shards were packed at the size the model will be shown."""
    if manifest.image_size != image_size:
        raise RecipeError(
            f"data.image_size is {image_size}, but {manifest.where} was packed at {manifest.image_size}",
            f"set data.image_size={manifest.image_size}, or pack again with --image-size {image_size}",
        )


def _require_same_recipe(recipe: Recipe) -> Recipe:
    """The recipe a run directory with a checkpoint was last started with: the same, but for the CHANGEABLE keys."""
    try:
        last = load_recipe(recipe.run.dir / "recipe.yaml")
    except RecipeError as error:
        raise CheckpointError(
            f"{recipe.run.dir} has a checkpoint, but the recipe it was made with cannot be used ({error.what})",
            "put its recipe.yaml back, or set another run.dir",
        ) from None
    measured = checkpoint.best(recipe.run.dir / "checkpoints") is not None
    if changed := forbidden_changes(last, recipe, measured):
        raise CheckpointError(
            f"{recipe.run.dir} holds a run of another recipe: {'; '.join(changed)}",
            "restore these settings to resume it, or set another run.dir",
        )
    return last


def forbidden_changes(last: Recipe, recipe: Recipe, measured: bool) -> list[str]:
    """What keeps `recipe` from going on with a run that was last started with `last`, in words.

    `measured` tells whether a checkpoint of the run has a validation accuracy.
    """
    may_change = CHANGEABLE if measured else CHANGEABLE | CHANGEABLE_UNMEASURED
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
    before, found = record.base_fingerprint, fingerprint_of_files(folder) if older else fingerprint(folder)
    if before != found:
        what = f"its fingerprint was {before[:12]}, that of {base} is {found[:12]}"
    elif record.base_config is not None and (changed := config_changes(record.base_config, read_config(folder))):
        what = f"{'; '.join(changed)} in the config of {base}"
    else:
        return
    raise CheckpointError(
        f"checkpoint {newest.folder} was trained on another base model: {what}",
        "set model.base to the model it began with, or set another run.dir"
        + ("; this older checkpoint knows that model by its very files, and no saved copy" if older else ""),
    )


def _flat(recipe: Recipe) -> dict[str, Any]:
    tree = recipe.model_dump(mode="json")
    return {f"{section}.{key}": value for section, keys in tree.items() for key, value in keys.items()}
