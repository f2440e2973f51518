"""`kfood eval`: how many held-out pictures a model names right.

    arguments ──► check: shards, settings, model and prompt fit (seconds, no weights) ──► Task
    Task ──► this rank's batches ──► greedy answers ──► gathered on rank 0, in the order of the index
    records ──► report.json, predictions.jsonl, report.html, TensorBoard

Always holds: every picture of the split is answered exactly once. Batches are cut by position and dealt to the
ranks whole, so the same pictures share a batch whatever the rank count: predictions.jsonl is the same to the byte.
"""

import argparse
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kfood_dist.data.batch.template import Template
from kfood_dist.data.shards.reader import open_split
from kfood_dist.data.shards.stage import staged
from kfood_dist.evaluate import panel
from kfood_dist.evaluate.evaluation import Task, check, find_earlier
from kfood_dist.evaluate.metrics import Record
from kfood_dist.evaluate.page import interval, percent, report_page
from kfood_dist.evaluate.report import PAGE, Report, build_report, load_report, write_report
from kfood_dist.evaluate.settings import add_model_arguments
from kfood_dist.model.identity import base_fingerprint
from kfood_dist.model.processor import build_template
from kfood_dist.system.files import file_sha256
from kfood_dist.system.packages import all_versions
from kfood_dist.system.processes import end_with_launcher, quiet_libraries
from kfood_dist.system.words import plural
from kfood_dist.system.world import World, run_rank

if TYPE_CHECKING:
    import torch

    from kfood_dist.evaluate.rank import Part

_SHOWN = 24  # pictures on the page


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `kfood eval`."""
    parser.description = (
        "Ask a model the name of every picture of a split, and write how many it names right: report.json, "
        "predictions.jsonl and report.html. Greedy answers, strict exact match. Runs alone or under accelerate "
        "launch. Run again with the same inputs, it reuses the report."
    )
    parser.add_argument("--shards", required=True, metavar="DIR", help="folder or URL that `kfood pack` wrote")
    parser.add_argument("--split", default="test", help="train, val or test (default: test)")
    add_model_arguments(parser)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for the report")
    parser.add_argument(
        "--stage", type=Path, metavar="DIR", help="copy the split to this folder, on a disk of the node, and read there"
    )
    parser.add_argument("--batch-size", type=positive, metavar="N", help="pictures per batch (default: the recipe's)")
    parser.add_argument("--max-new-tokens", type=positive, metavar="N", help="longest answer (default: the recipe's)")
    parser.add_argument("--limit", type=positive, metavar="N", help="only the first N pictures; they lie shuffled")
    parser.add_argument(
        "--tensorboard", type=Path, metavar="DIR", help="also log accuracy and a panel of pictures here"
    )
    parser.add_argument("--step", type=int, metavar="N", help="step to log them at (default: the adapter's)")


def positive(text: str) -> int:
    """A whole number from 1 up, for argparse."""
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not 1 or more")
    return number


def run(args: argparse.Namespace) -> int:
    """Evaluate, or reuse the report of an earlier run with the same inputs."""
    end_with_launcher()
    world = World.from_environment()
    task = check(args)
    earlier = find_earlier(task) if world.is_main else None
    if world.size == 1 and earlier:
        return reuse(task, earlier)
    if world.is_main:
        print(f"loading the libraries, and then {task.model}", flush=True)
    quiet_libraries()
    template = build_template(task.model, task.settings, task.adapter)
    return run_rank(world, "eval", lambda: answer(task, earlier, template, world, args.stage))


def answer(task: Task, earlier: Report | None, template: Template, world: World, stage_dir: Path | None) -> int:
    """Answer all pictures, together with the other ranks, unless rank 0 has an `earlier` report."""
    from kfood_dist.evaluate.generate import pick_device
    from kfood_dist.evaluate.rank import answer_part, any_rank, process_group

    device = pick_device(world)
    with process_group(world, device):
        if any_rank(world, earlier is not None, device):
            return reuse(task, earlier) if earlier else 0
        split = task.shards.split
        with staged({task.source: {split}}, stage_dir, world.local_rank == 0) as places:
            read_here = replace(task, shards=open_split(places[task.source], split)) if stage_dir else task
            parts = world.gather(answer_part(read_here, template, world, device))
            if parts is not None:
                conclude(read_here, parts, world, device)
    return 0


def preflight(args: argparse.Namespace) -> Task | None:
    """For a launcher, before it starts any rank: raise every mistake that can be told; reuse an earlier report.

    Returns what is to be measured; None if an earlier report answers the question, so that there is nothing to start.
    """
    task = check(args)
    if earlier := find_earlier(task):
        reuse(task, earlier)
        return None
    quiet_libraries()
    build_template(task.model, task.settings, task.adapter)
    return task


def conclude(task: Task, parts: list["Part"], world: World, device: "torch.device") -> None:
    """Put the ranks' parts together and write everything, on rank 0."""
    from kfood_dist.evaluate.rank import make_record

    refused = sorted(i for part in parts for i in part.refused)
    found = {i: make_record(task.shards, i, "", 0.0) for i in refused}
    found |= {i: record for part in parts for i, record in part.records.items()}
    assert sorted(found) == list(range(task.num_samples)), "a picture was left out"
    records = [found[i] for i in range(task.num_samples)]
    seconds = max(part.seconds for part in parts)
    report = build_report(records, [task.shards.key(i) for i in refused], _facts(task, world, device, seconds))
    task.out.mkdir(parents=True, exist_ok=True)
    write_report(task.out, report, records, report_page(report, _samples(task, records, _SHOWN)))
    if task.tensorboard:  # after the report, which a fault here must not cost; the next start logs what is missing
        log(task, report["accuracy"], records)
    print(describe(load_report(task.out)))


def _facts(task: Task, world: World, device: "torch.device", seconds: float) -> dict[str, Any]:
    import torch

    fingerprint = task.inputs["model_fingerprint"] or base_fingerprint(task.model)  # a hub model is here by now
    weights = task.adapter / "adapter_model.safetensors" if task.adapter else None
    return {
        "model": task.model,
        "adapter": str(task.adapter) if task.adapter else None,
        "adapter_sha256": file_sha256(weights) if weights else None,
        "shards": task.source,
        "index_hash": task.shards.index_hash,
        "split": task.shards.split,
        "image_size": task.settings.image_size,
        "settings": task.inputs["settings"],
        "samples_per_second": round(task.num_samples / seconds, 2),
        "seconds": round(seconds, 2),
        "world_size": world.size,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "versions": all_versions(),
        "inputs": task.inputs | {"model_fingerprint": fingerprint},
    }


def reuse(task: Task, report: Report) -> int:
    """Say that nothing need be done, and log to TensorBoard what an earlier run did not."""
    assert report.predictions is not None
    print(f"reused {report.path}: the same pictures, model and settings")
    if task.tensorboard and not panel.is_logged(task.tensorboard, task.shards.split, task.step):
        log(task, report.accuracy, report.predictions)
    print(describe(report))
    return 0


def log(task: Task, accuracy: float, records: list[Record]) -> None:
    """Write the evaluation to the task's TensorBoard folder."""
    assert task.tensorboard is not None
    panel.log(task.tensorboard, task.shards.split, task.step, accuracy, _samples(task, records, panel.NUM_PICTURES))


def _samples(task: Task, records: list[Record], count: int) -> list[tuple[Record, bytes]]:
    return [(records[i], task.shards.read(i)) for i in panel.choose(count, len(records))]


def describe(report: Report) -> str:
    """The result in two lines, for the console."""
    refused = f", {len(report.raw['refused'])} refused as too long" if report.raw["refused"] else ""
    return (
        f"{report.split}: {report.correct} of {plural(report.images, 'picture')} right{refused}; accuracy "
        f"{percent(report.accuracy)}, 95% interval {interval(report.wilson_95)}\n"
        f"page: {report.path.with_name(PAGE)}"
    )
