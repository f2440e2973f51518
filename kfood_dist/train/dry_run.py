"""`--dry-run N`: the recipe for a few steps, to know in two minutes whether a job would run and what it would take.

    recipe ──► shortened: N steps, one checkpoint, eight samples evaluated, in a folder of their own
    what that took ──► projection ──► memory and time of the whole run, printed; the folder is removed

The shards are looked at too: one of each split that is read, byte by byte.
"""

import statistics
from collections.abc import Iterator, Sequence
from typing import Any

from kfood_dist.config.sections import Recipe
from kfood_dist.data.shards.manifest import load_manifest
from kfood_dist.data.shards.reader import open_split
from kfood_dist.data.shards.verify import verify_some
from kfood_dist.data.storage.local import LocalStorage
from kfood_dist.errors import RecipeError, ShardError
from kfood_dist.system.words import plural
from kfood_dist.train.run.monitor import device_memory_gib

NUM_STEPS = 3
NUM_SAMPLES = 8


def shortened(recipe: Recipe, num_steps: int) -> Recipe:
    """The same recipe for `num_steps` steps and one measurement of a few pictures, beside the real run directory.

    Raises RecipeError for a number of steps below 1.
    """
    if num_steps < 1:
        raise RecipeError(f"--dry-run {num_steps}", "give a number of steps from 1")
    run_dir = recipe.run.dir.with_name(f".{recipe.run.dir.name}.dry-run")
    split = recipe.eval.split if load_manifest(recipe.data.shards).shards_of(recipe.eval.split) else "train"
    measured = {"every_steps": num_steps, "max_samples": NUM_SAMPLES, "split": split}
    return recipe.model_copy(
        update={
            "train": recipe.train.model_copy(update={"max_steps": num_steps, "save_every_steps": num_steps}),
            "eval": recipe.eval.model_copy(update=measured),
            "run": recipe.run.model_copy(update={"dir": run_dir, "log_every_steps": 1}),
        }
    )


def check_shards(recipe: Recipe) -> str:
    """Look at one shard of each split the run reads; what was looked at, in words. Raises ShardError for a fault."""
    said = []
    for where in (recipe.data.shards, *(mixed.shards for mixed in recipe.data.mix)):
        manifest = load_manifest(where)
        if not isinstance(manifest.storage, LocalStorage):
            said.append(f"{where}: {plural(len(manifest.shards), 'shard is', 'shards are')} there")
            continue
        checked, faults = verify_some(manifest, ["train", recipe.eval.split])
        if faults:
            raise ShardError(f"{where} is damaged: {faults[0]}", f"see all of it with `kfood verify {where}`")
        said.append(f"{where}: {', '.join(checked)} sound, of {plural(len(manifest.shards), 'shard')}")
    return "; ".join(said)


def projection(
    recipe: Recipe, rows: Sequence[dict[str, Any]], num_steps: int, save_s: float, sample_s: float | None
) -> Iterator[str]:
    """What the whole run of `recipe` would take, from the `rows` of a few steps' metrics, line by line.

    `save_s` are the seconds of a checkpoint, `sample_s` those of evaluating a sample, None if nothing was measured.
    The first step is left out where there are more: it waits for the loader to start and for kernels to be chosen.
    """
    capacity_gib = device_memory_gib()
    peak = max(row["peak_memory_gib"] for row in rows)
    yield f"memory     {peak:.2f} GiB at the most on one rank, of {capacity_gib:.1f} GiB there are"
    step_s = statistics.median(row["step_seconds"] for row in rows[1:] or rows)
    per_s = statistics.median(row["samples_per_second"] for row in rows[1:] or rows)
    yield f"steps      {num_steps:,} × {step_s:.2f} s = {_time(num_steps * step_s)}, {per_s:.1f} samples/s"
    num_saves = -(-num_steps // recipe.train.save_every_steps)
    yield f"saving     {num_saves:,} × {save_s:.2f} s = {_time(num_saves * save_s)}"
    total_s = num_steps * step_s + num_saves * save_s
    if recipe.eval.every_steps and sample_s is not None:
        num_rounds = -(-num_steps // recipe.eval.every_steps)
        num_samples = len(open_split(recipe.data.shards, recipe.eval.split))
        num_samples = min(num_samples, recipe.eval.max_samples or num_samples)
        yield f"evaluating {num_rounds:,} × {num_samples:,} samples × {sample_s:.3f} s = " + _time(
            num_rounds * num_samples * sample_s
        )
        total_s += num_rounds * num_samples * sample_s
    yield f"in all     {_time(total_s)}"


def _time(seconds: float) -> str:
    hours, rest = divmod(round(seconds), 3600)
    return f"{hours} h {rest // 60:02d} min" if hours else f"{rest // 60} min {rest % 60:02d} s"
