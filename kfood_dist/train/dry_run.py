"""`--dry-run N` trains a recipe for a few steps, to see in two minutes if a job would run and what it would take.

    recipe ──► shortened: N steps, one checkpoint, eight samples evaluated, in a separate run directory
    memory and time of that ──► projection ──► memory and time of the full run, printed; the launcher removes the folder

It also checks local shards byte by byte: one shard of each split that the run reads.
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
from kfood_dist.train.run.monitor import describe_memory

NUM_STEPS = 3
NUM_SAMPLES = 8


def shortened(recipe: Recipe, num_steps: int) -> Recipe:
    """Return the recipe with `num_steps` steps, one evaluation of a few samples, and another run directory.

    The run directory is beside the real one. The evaluation reads the train split if the data set does not have the
    split of the recipe. Raises RecipeError if `num_steps` is below 1.
    """
    if num_steps < 1:
        raise RecipeError(f"--dry-run {num_steps}", "give a number of steps, at least 1")
    run_dir = recipe.run.dir.with_name(f".{recipe.run.dir.name}.dry-run")
    split = recipe.eval.split if load_manifest(recipe.data.shards).shards_of(recipe.eval.split) else "train"
    short_validation = {"every_steps": num_steps, "max_samples": NUM_SAMPLES, "split": split}
    return recipe.model_copy(
        update={
            "train": recipe.train.model_copy(update={"max_steps": num_steps, "save_every_steps": num_steps}),
            "eval": recipe.eval.model_copy(update=short_validation),
            "run": recipe.run.model_copy(update={"dir": run_dir, "log_every_steps": 1}),
        }
    )


def check_shards(recipe: Recipe) -> str:
    """Check one shard of each split that the run reads, and return in words what was checked.

    Only local shards are read. Raises ShardError if one is damaged.
    """
    lines = []
    for where in (recipe.data.shards, *(mixed.shards for mixed in recipe.data.mix)):
        manifest = load_manifest(where)
        if not isinstance(manifest.storage, LocalStorage):
            lines.append(f"{where}: {plural(len(manifest.shards), 'shard is', 'shards are')} there")
            continue
        checked, faults = verify_some(manifest, ["train", recipe.eval.split])
        if faults:
            raise ShardError(f"{where} is damaged: {faults[0]}", f"run `kfood verify {where}` to see all faults")
        lines.append(f"{where}: {', '.join(checked)} not damaged, of {plural(len(manifest.shards), 'shard')}")
    return "; ".join(lines)


def projection(
    recipe: Recipe,
    rows: Sequence[dict[str, Any]],
    num_steps: int,
    save_s: float,
    sample_s: float | None,
    local_ranks: int,
) -> Iterator[str]:
    """Yield lines that say what the full run of `recipe` would take, from the metrics `rows` of a few steps.

    `save_s` is the time of one checkpoint in seconds. `sample_s` is the time to evaluate one sample in seconds, or None
    if nothing was evaluated. `local_ranks` is the number of ranks on this machine. If there are several steps, the time
    of the first does not count: it waits for the loader to start and for kernels to be chosen.
    """
    yield f"memory     {describe_memory(rows, local_ranks)}"
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
    yield f"total      {_time(total_s)}"


def _time(seconds: float) -> str:
    hours, rest = divmod(round(seconds), 3600)
    return f"{hours} h {rest // 60:02d} min" if hours else f"{rest // 60} min {rest % 60:02d} s"
