"""Check in a second everything that can be checked before a process group starts or a model loads.

    recipe, world size ──► preflight ──► Plan: which rank reads which samples; or one error with its remedy

The launcher runs it once, before it starts any rank. Each rank runs it again, because a rank can also be started
without the launcher.
"""

from kfood_dist.config.sections import Recipe
from kfood_dist.data.mix import build_data_order, open_mixture
from kfood_dist.data.plan.plan import Plan, accumulation_for
from kfood_dist.data.shards.reader import open_split
from kfood_dist.data.task.table import require_columns
from kfood_dist.errors import CheckpointError
from kfood_dist.model.adapters import require_parts_possible
from kfood_dist.model.base import load_config
from kfood_dist.model.family import family_of
from kfood_dist.model.files import base_folder, require_base
from kfood_dist.model.processor import build_template, require_same_pictures
from kfood_dist.system.files import require_writable_folder
from kfood_dist.train.engine.zero_config import deepspeed_config
from kfood_dist.train.resume import require_same_base, resumed_cut
from kfood_dist.train.run import checkpoint


def preflight(recipe: Recipe, world_size: int, look_at_files: bool = True) -> Plan:
    """Check a recipe against shards, base model, DeepSpeed JSON, run directory and world size. Returns the plan.

    With `look_at_files`, it also checks that every shard is there and that the newest checkpoint is undamaged. One rank
    can do this for all.

    Raises RecipeError, ShardError, ModelError or CheckpointError if a check fails.
    """
    train = recipe.train
    for folder in (recipe.run.dir, recipe.run.dir / "checkpoints"):
        require_writable_folder(folder, "run.dir")
    newest = checkpoint.newest(recipe.run.dir / "checkpoints")
    if newest and look_at_files:
        newest.require_undamaged()
    micro_batch, accumulation = resumed_cut(recipe, world_size, newest) if newest else _first_cut(recipe, world_size)
    if train.zero_stage:
        deepspeed_config(recipe, accumulation, world_size, micro_batch)
    data = open_mixture(recipe.data, "train")
    for part in data.parts:
        require_columns(recipe.data.task, part.manifest.columns, part.manifest.where)
    require_same_pictures(data.manifest, recipe.data.image_size)
    if look_at_files:
        data.require_files()
    plan = Plan(build_data_order(data, recipe.data), train.seed, world_size, micro_batch, accumulation)
    if recipe.eval.every_steps:
        evaluated = open_split(recipe.data.shards, recipe.eval.split)
        if look_at_files:
            evaluated.require_files()
    require_base(recipe.model.base)
    require_parts_possible(family_of(load_config(recipe.model.base)), recipe.parts)
    build_template(recipe.model.base, recipe.data)
    if newest:
        if plan.resume(newest.record().data) != newest.step:
            raise CheckpointError(f"checkpoint {newest.folder} has the data position of another step", "delete it")
        if base := base_folder(recipe.model.base):
            require_same_base(newest, base, recipe.model.base)
    return plan


def _first_cut(recipe: Recipe, world_size: int) -> tuple[int, int]:
    """Return the micro-batch size and the micro-steps per step of a new run.

    Raises RecipeError if they cannot make its global batch.
    """
    train = recipe.train
    if train.global_batch_size is None:
        return train.micro_batch_size, train.gradient_accumulation_steps
    return train.micro_batch_size, accumulation_for(train.global_batch_size, train.micro_batch_size, world_size)


def num_steps(recipe: Recipe, plan: Plan) -> int:
    """Return the optimiser steps of the full run: `train.max_steps`, or as many as `train.epochs` take."""
    return recipe.train.max_steps or recipe.train.epochs * plan.steps_per_epoch
