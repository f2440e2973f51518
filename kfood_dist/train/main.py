"""`kfood train` trains an adapter from a recipe.

The functions below follow the order of the work: check, build, resume, train, publish.
"""

import argparse
import os
import shlex
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kfood_dist.config.recipe import load_recipe, save_recipe
from kfood_dist.config.sections import Recipe
from kfood_dist.data.plan.plan import Plan
from kfood_dist.data.shards.local_copy import local_copies
from kfood_dist.errors import FINISHED, STOPPED, KfoodError, RecipeError
from kfood_dist.model.adapters import require_adapter
from kfood_dist.system import console
from kfood_dist.system.locks import hold
from kfood_dist.system.processes import end_with_launcher, has_launcher, quiet_libraries, raise_open_file_limit
from kfood_dist.system.words import plural
from kfood_dist.system.world import World, run_rank
from kfood_dist.train.dry_run import NUM_SAMPLES, NUM_STEPS, check_shards, projection, shortened
from kfood_dist.train.preflight import num_steps, preflight
from kfood_dist.train.run import checkpoint
from kfood_dist.train.run.monitor import clock, read_metrics
from kfood_dist.train.run.stop import StopRequest, read_state, write_status

if TYPE_CHECKING:
    from kfood_dist.train.loop import Trainer

    Conclude = Callable[[Trainer, int], None]  # given the steps that are done


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `kfood train` and of launch/train.sh. Both take the same ones."""
    parser.description = (
        "Train from a recipe, or from several in order. An interrupted run resumes from its newest checkpoint. "
        "launch/train.sh starts one process per GPU; `kfood train` is one such process."
    )
    named: dict[str, Any] = {"type": Path, "action": "extend", "dest": "recipes", "metavar": "RECIPE", "default": []}
    parser.add_argument(
        **named,
        nargs="*",
        help="recipe, such as launch/recipes/qwen2.5-vl-3b.yaml; several are trained one after the other",
    )
    parser.add_argument("--config", **named, nargs="+", help="same as RECIPE")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="SECTION.KEY=VALUE",
        help="override one key; may be repeated. A text key takes everything after =",
    )
    parser.add_argument(
        "--copy-to",
        type=Path,
        metavar="DIR",
        help="copy the shards to this folder on a disk of each node, and read them there",
    )
    parser.add_argument("--stage", type=Path, dest="copy_to", help=argparse.SUPPRESS)  # the old name of --copy-to
    steps: dict[str, Any] = {"type": _number_of_steps, "nargs": "?", "const": NUM_STEPS}
    parser.add_argument(
        "--dry-run",
        **steps,
        metavar="N",
        help=f"train N steps ({NUM_STEPS} if N is not given), save, evaluate {NUM_SAMPLES} samples, print the memory "
        "and time of the full run, and keep nothing",
    )
    parser.add_argument("--limit", **steps, dest="dry_run", help=argparse.SUPPRESS)  # the old name of --dry-run
    parser.add_argument(
        "--processes",
        metavar="N|fit",
        help="processes on each node (default: one per GPU, or two on the CPU); fit: the most that can cut "
        "train.global_batch_size into micro-batches",
    )


def _number_of_steps(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of steps; put a recipe before the option") from None


def command_words(args: argparse.Namespace, recipes: Sequence[Path], overrides: Sequence[str]) -> list[str]:
    """Return the command-line words that make a process train `recipes` with `overrides`: the reverse of parsing."""
    sets = [word for text in overrides for word in ("--set", text)]
    copying = ["--copy-to", str(args.copy_to)] if args.copy_to else []
    trial = ["--dry-run", str(args.dry_run)] if args.dry_run is not None else []
    return ["train", "--config", *map(str, recipes), *copying, *trial, *sets]


def require_recipe(args: argparse.Namespace) -> None:
    """Raise RecipeError if no recipe is named."""
    if not args.recipes:
        raise RecipeError("no recipe is named", "name one, such as launch/recipes/qwen2.5-vl-3b.yaml")


@dataclass(frozen=True)
class Request:
    """What the user requests of `kfood train`. It is read once, so no later code knows the command line."""

    recipe: Recipe
    dry_run: int | None  # the steps of a dry run; None: train the full run
    copy_to: Path | None  # copy the shards to this folder and read them there; None: no copy


def run(args: argparse.Namespace) -> int:
    """Train as one rank of all that the launcher started. Returns the exit status.

    The status is 0 when the run is complete, and STOPPED when it stopped as asked. A rank of a launcher returns 0 in
    both cases, because torchrun treats any other status as a failure. Its launcher reads `status.json` instead.
    """
    world = World.from_environment()
    require_recipe(args)
    end_with_launcher()
    return train_request(Request(load_recipe(args.recipes[0], args.set), args.dry_run, args.copy_to), world)


def train_request(request: Request, world: World) -> int:
    """Check the recipe, then train it or do its dry run. Returns the exit status that `run` describes."""
    recipe = request.recipe
    conclude: Conclude = partial(publish, recipe, time.monotonic())
    if request.dry_run is not None:
        recipe, conclude = dry_run(recipe, request.dry_run, world)
    plan = preflight(recipe, world.size, look_at_files=world.is_main)
    if not checkpoint.newest(recipe.run.dir / "checkpoints"):
        require_adapter(recipe)
    recipe.run.dir.mkdir(parents=True, exist_ok=True)
    with hold(recipe.run.dir) if world.is_main else nullcontext():
        console.keep_in(recipe.run.dir / console.LOG_FILE)
        status = run_rank(world, "train", lambda: train(recipe, plan, world, conclude, request.copy_to))
        stopped = read_state(recipe.run.dir) == "stopped"
    if has_launcher(os.environ):
        return status
    if request.dry_run is not None:  # a launcher does this itself, after all of its ranks
        shutil.rmtree(recipe.run.dir, ignore_errors=True)
    return STOPPED if status == FINISHED and stopped else status


def dry_run(recipe: Recipe, steps: int, world: World) -> "tuple[Recipe, Conclude]":
    """Return the recipe of a dry run, and the function that prints at its end what the full run would take.

    The dry run has a separate run directory. Rank 0 removes an older one.
    """
    trial = shortened(recipe, steps)
    if world.is_main:
        shutil.rmtree(trial.run.dir, ignore_errors=True)
        print(f"dry run: {check_shards(recipe)}", flush=True)

    def tell(trainer: "Trainer", done: int) -> None:
        write_status(trial.run.dir, "finished" if done == steps else "stopped", done)
        if done < steps:
            return
        rows = read_metrics(trial.run.dir / "metrics.jsonl")
        whole = num_steps(recipe, trainer.plan)
        sample_s = trainer.validator.sample_s if trainer.validator else None
        lines = projection(recipe, rows, whole, trainer.saver.took_s, sample_s, world.local_size)
        print("dry run: the full run would take, estimated from these steps:", *lines, sep="\n  ", flush=True)

    return trial, tell


def train(recipe: Recipe, plan: Plan, world: World, conclude: "Conclude", copy_to: Path | None = None) -> int:
    """Start, or resume from the newest checkpoint, and train to the end or until asked to stop. Returns exit status 0.

    Then rank 0 calls `conclude`.
    """
    if world.is_main:
        print(f"loading the libraries, and then {recipe.model.base}", flush=True)
    quiet_libraries()
    raise_open_file_limit()
    from kfood_dist.train.build import build_trainer  # imports torch and the other libraries
    from kfood_dist.train.publish import publish_adapter

    stop = StopRequest(recipe.run.dir, world.is_main)
    stop.listen()
    newest = checkpoint.newest(recipe.run.dir / "checkpoints")
    if newest and newest.step >= num_steps(recipe, plan):
        if world.is_main:
            published = publish_adapter(recipe)
            write_status(recipe.run.dir, "finished", newest.step)
            steps, adapter = plural(newest.step, "step"), recipe.run.dir / "adapter"
            print(f"{recipe.run.dir}: already trained, {steps}; {published}; adapter in {adapter}")
        return 0
    if world.is_main:
        write_status(recipe.run.dir, "running", newest.step if newest else 0)
    with local_copies(splits_read(recipe), copy_to, world.local_rank == 0) as places:
        trainer, start = build_trainer(with_places(places, recipe), plan, world, newest, stop)
        if world.is_main:
            save_recipe(recipe, recipe.run.dir / "recipe.yaml")
        try:
            done = trainer.train(start)
        except KfoodError as error:
            error.exit_status = 1  # a disk or a server, for example: a mistake of the user was reported before this
            raise
    trainer.watch.heartbeat("the end of the run")
    if world.is_main:
        conclude(trainer, done)
    trainer.watch.heartbeat("the last barrier of the ranks")
    world.barrier()  # the ranks of all nodes end together, so that no late rank looks as if it was left behind
    trainer.log.close()
    trainer.shut_down()
    return 0


def publish(recipe: Recipe, began: float, trainer: "Trainer", done: int) -> None:
    """Publish the adapter of a finished run, or log that the run stopped. Only rank 0 calls it.

    `recipe` is the recipe as given: its data sets are not at the places of local copies. `began` is the
    time.monotonic() at which this process started to train.
    """
    from kfood_dist.train.publish import publish_adapter

    run_dir = recipe.run.dir
    if done == trainer.max_steps:
        trainer.log.say(str(publish_adapter(recipe)))
        took = clock(time.monotonic() - began)
        steps = plural(done, "step") + (f", the last {done - start}" if (start := trainer.log.start_step) else "")
        best = best_step(trainer.saver.folder, recipe.eval.split)
        has_test = bool(trainer.collator.shards.manifest.shards_of("test"))
        command = evaluation_command(recipe, "test" if has_test else recipe.eval.split)
        trainer.log.say(f"done: {steps} in {took}{best}; adapter in {run_dir / 'adapter'}; next: {command}")
    else:
        trainer.log.say(f"stopped after step {done} of {trainer.max_steps}, as asked; start it again to resume")
    trainer.stop.clear()
    write_status(run_dir, "finished" if done == trainer.max_steps else "stopped", done)


def best_step(checkpoints: Path, split: str) -> str:
    """Return the best checkpoint on `split` as a part of a sentence, or an empty string if none was evaluated."""
    best = checkpoint.best(checkpoints)
    return f"; best step {best[0].step} ({split} {best[1]})" if best else ""


def evaluation_command(recipe: Recipe, split: str) -> str:
    """Return the command that evaluates the published adapter of a run."""
    adapter, out = (str(recipe.run.dir / name) for name in ("adapter", "tuned"))
    words = ["--shards", recipe.data.shards, "--split", split, "--model", recipe.model.base, "--adapter", adapter]
    return shlex.join(["bash", "launch/eval.sh", *words, "--out", out])


def splits_read(recipe: Recipe) -> dict[str, set[str]]:
    """Return the data sets that a run reads, each with the splits that it reads."""
    evaluated = {recipe.eval.split} if recipe.eval.every_steps else set()
    return {recipe.data.shards: {"train"} | evaluated} | {source.shards: {"train"} for source in recipe.data.mix}


def with_places(places: Mapping[str, str], recipe: Recipe) -> Recipe:
    """Return the recipe with each data set replaced by the place to read it from."""
    mix = tuple(source.model_copy(update={"shards": places[source.shards]}) for source in recipe.data.mix)
    data = recipe.data.model_copy(update={"shards": places[recipe.data.shards], "mix": mix})
    return recipe.model_copy(update={"data": data})
