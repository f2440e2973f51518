"""One evaluation, checked: every mistake that can be found without the weights is reported here, in seconds.

arguments ──► settings, shards, fingerprints ──► check ──► Evaluation ──► find_earlier ──► a report or None
"""

import argparse
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from kfood_dist.data.shards.reader import ShardSplit, open_split
from kfood_dist.data.task.base import Task
from kfood_dist.data.task.table import build_task, require_columns
from kfood_dist.evaluate.report import Report, reusable
from kfood_dist.evaluate.settings import Settings, resolve_settings
from kfood_dist.model.adapters import read_adapter_facts
from kfood_dist.model.files import require_base
from kfood_dist.model.identity import adapter_fingerprint, base_fingerprint
from kfood_dist.model.processor import require_same_pictures
from kfood_dist.system.files import require_writable_folder
from kfood_dist.system.world import World


@dataclass(frozen=True)
class Evaluation:
    """One checked evaluation: what to ask which model. `inputs` are all facts that decide the answers."""

    shards: ShardSplit
    task: Task
    source: str
    num_samples: int
    settings: Settings
    model: str
    adapter: Path | None
    batch_size: int
    max_new_tokens: int
    num_workers: int  # loader processes of each rank
    out: Path
    tensorboard: Path | None
    step: int
    copy_to: Path | None  # where the split is copied to and read
    inputs: dict[str, Any]


def check(args: argparse.Namespace) -> Evaluation:
    """Check all that can be checked without the model's weights, and return the evaluation. Raises KfoodError."""
    settings, recipe_eval = resolve_settings(args)
    shards = open_split(args.shards, args.split)
    fixing = args.adapter if args.adapter and "task" in read_adapter_facts(args.adapter) else None
    require_columns(settings.task, shards.manifest.columns, shards.manifest.where, fixing)
    require_same_pictures(shards.manifest, settings.image_size, settings.resize)
    if World.from_environment().is_main:
        shards.require_files()
    for folder, option in ((args.out, "--out"), (args.tensorboard, "--tensorboard")):
        require_writable_folder(folder, option)
    settings = replace(settings, resize=shards.manifest.resize)
    batch_size = args.batch_size or recipe_eval.batch_size
    max_new_tokens = args.max_new_tokens or recipe_eval.max_new_tokens
    require_base(args.model)
    fingerprint = base_fingerprint(args.model)
    return Evaluation(
        shards=shards,
        task=build_task(settings.task, settings.system, settings.prompt, shards.classes),
        source=shards.manifest.where,
        num_samples=min(args.limit or len(shards), len(shards)),
        settings=settings,
        model=args.model,
        adapter=args.adapter,
        batch_size=batch_size,
        max_new_tokens=max_new_tokens,
        num_workers=args.workers,
        out=args.out,
        tensorboard=args.tensorboard,
        step=_trained_steps(args.adapter) if args.step is None else args.step,
        copy_to=args.copy_to,
        inputs={
            "index_hash": shards.index_hash,
            "split": args.split,
            "limit": args.limit,
            "model": args.model,
            "model_fingerprint": fingerprint,
            "adapter": str(args.adapter) if args.adapter else None,
            "adapter_fingerprint": adapter_fingerprint(args.adapter) if args.adapter else None,
            "settings": asdict(settings) | {"batch_size": batch_size, "max_new_tokens": max_new_tokens},
        },
    )


def _trained_steps(adapter: Path | None) -> int:
    """Return how many steps an adapter was trained for. TensorBoard shows its accuracy at this step."""
    step = read_adapter_facts(adapter).get("step", 0) if adapter else 0
    return step if isinstance(step, int) else 0


def find_earlier(evaluation: Evaluation) -> Report | None:
    """Return the report in the output folder if it has exactly the inputs of this evaluation."""
    # Without a fingerprint the model is not on this machine yet, so nothing shows that it is the same.
    return reusable(evaluation.out, evaluation.inputs) if evaluation.inputs["model_fingerprint"] else None
