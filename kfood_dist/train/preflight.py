"""Everything that can be known to be wrong before a process group starts or a model loads, checked in a second.

    recipe, world size ──► preflight ──► Plan: who reads what; or one error with its remedy

The launcher runs it once, before it starts any rank; each rank runs it again, since a rank may be started otherwise.
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
from kfood_dist.system.files import require_folder_possible
from kfood_dist.train.engine.zero_config import deepspeed_config
from kfood_dist.train.resume import require_same_base, resumed_cut
from kfood_dist.train.run import checkpoint


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
        measured = open_split(recipe.data.shards, recipe.eval.split)
        if look_at_files:
            measured.require_files()
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
    """Micro-batch and micro-steps per step of a run that begins. Raises RecipeError if they cannot make its batch."""
    train = recipe.train
    if train.global_batch_size is None:
        return train.micro_batch_size, train.gradient_accumulation_steps
    return train.micro_batch_size, accumulation_for(train.global_batch_size, train.micro_batch_size, world_size)


def num_steps(recipe: Recipe, plan: Plan) -> int:
    """Optimiser steps of the whole run: `train.max_steps`, or as many as `train.epochs` take."""
    return recipe.train.max_steps or recipe.train.epochs * plan.steps_per_epoch
