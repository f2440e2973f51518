"""`kfood train`: from a recipe to a tuned adapter, in reading order: check, build, resume, train, publish."""

import argparse
import shutil
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path

from kfood_dist.config import Recipe, load_recipe, save_recipe
from kfood_dist.data.plan import Plan
from kfood_dist.data.stage import stage
from kfood_dist.errors import KfoodError
from kfood_dist.runtime import World, end_with_launcher, quiet_libraries, raise_open_file_limit
from kfood_dist.train import checkpoint
from kfood_dist.train.lock import hold
from kfood_dist.train.preflight import num_steps, preflight


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--config", type=Path, required=True, metavar="RECIPE", help="recipe, such as launch/recipes/*.yaml"
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="SECTION.KEY=VALUE",
        help="override one key; may be repeated",
    )
    parser.add_argument(
        "--stage",
        type=Path,
        metavar="DIR",
        help="copy the shards to this folder, on a disk of the node, and read there",
    )


def run(args: argparse.Namespace) -> int:
    """Train as one rank of however many the launcher started; exit status 0 when the run is complete."""
    end_with_launcher()
    recipe = load_recipe(args.config, args.set)
    world = World.from_environment()
    plan = preflight(recipe, world.size, look_at_files=world.is_main)
    recipe.run.dir.mkdir(parents=True, exist_ok=True)
    with hold(recipe.run.dir) if world.is_main else nullcontext():
        try:
            return train(recipe, plan, world, args.stage)
        except KfoodError as error:
            if not world.is_main:  # what only this rank met, nobody else can tell
                print(f"rank {world.rank}: {str(error).splitlines()[0]}", file=sys.stderr, flush=True)
            raise


def train(recipe: Recipe, plan: Plan, world: World, stage_dir: Path | None = None) -> int:
    """Resume from the newest checkpoint or begin, train to the end, publish the adapter."""
    quiet_libraries()
    raise_open_file_limit()
    from kfood_dist.train.build import build_trainer  # torch and all the rest

    newest = checkpoint.newest(recipe.run.dir / "checkpoints")
    if newest and newest.step >= num_steps(recipe, plan):
        if world.is_main:
            publish_adapter(newest.adapter, recipe.run.dir / "adapter")
            print(f"{recipe.run.dir}: already trained, {newest.step} steps; adapter in {recipe.run.dir / 'adapter'}")
        return 0
    with staged(recipe, stage_dir, world) as read_here:
        trainer, start = build_trainer(read_here, plan, world, newest)
        if world.is_main:
            save_recipe(recipe, recipe.run.dir / "recipe.yaml")
        adapter = trainer.train(start)
    if world.is_main:
        publish_adapter(adapter, recipe.run.dir / "adapter")
        trainer.log.say(f"done: {trainer.max_steps} steps; adapter in {recipe.run.dir / 'adapter'}")
    trainer.log.close()
    trainer.shut_down()
    return 0


@contextmanager
def staged(recipe: Recipe, stage_dir: Path | None, world: World) -> Iterator[Recipe]:
    """The recipe with its shards copied to `stage_dir` by one process of the node, for as long as the block lasts."""
    if stage_dir is None:
        yield recipe
        return
    splits = {"train"} | ({recipe.eval.split} if recipe.eval.every_steps else set())
    shown = world.local_rank == 0
    with ExitStack() as stack:
        main = stack.enter_context(stage(recipe.data.shards, splits, stage_dir, shown))
        mixed = [
            source.model_copy(
                update={"shards": str(stack.enter_context(stage(source.shards, {"train"}, stage_dir, shown)))}
            )
            for source in recipe.data.mix
        ]
        data = recipe.data.model_copy(update={"shards": str(main), "mix": tuple(mixed)})
        yield recipe.model_copy(update={"data": data})


def publish_adapter(source: Path, target: Path) -> None:
    """Copy a checkpoint's adapter to where people look for it; the old one stays until the new one is whole."""
    partial = target.with_name(".adapter.partial")
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(source, partial)
    shutil.rmtree(target, ignore_errors=True)
    partial.rename(target)
