"""`kfood eval`: how many held-out pictures a model names right.

    arguments ──► check: shards, settings, model and prompt fit (seconds, no weights) ──► Evaluation
    Evaluation ──► this rank's batches ──► greedy answers ──► gathered on rank 0, in the order of the index
    records ──► report.json, predictions.jsonl, report.html, TensorBoard

Always holds: every picture of the split is answered exactly once. Batches are cut by position and dealt to the
ranks whole, so the same pictures share a batch whatever the rank count: predictions.jsonl is the same to the byte.
"""

import argparse
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kfood_dist.data.batch.template import Template
from kfood_dist.data.shards.local_copy import local_copies
from kfood_dist.data.shards.reader import open_split
from kfood_dist.evaluate import panel
from kfood_dist.evaluate.evaluation import Evaluation, check, find_earlier
from kfood_dist.evaluate.metrics import Prediction
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
        "--copy-to",
        type=Path,
        metavar="DIR",
        help="copy the split to this folder on a disk of the node, and read there",
    )
    parser.add_argument("--stage", type=Path, dest="copy_to", help=argparse.SUPPRESS)  # its name before
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
    asked = check(args)
    earlier = find_earlier(asked) if world.is_main else None
    if world.size == 1 and earlier:
        return reuse(asked, earlier)
    if world.is_main:
        print(f"loading the libraries, and then {asked.model}", flush=True)
    quiet_libraries()
    template = build_template(asked.model, asked.settings, asked.adapter)
    return run_rank(world, "eval", lambda: answer(asked, earlier, template, world))


def answer(asked: Evaluation, earlier: Report | None, template: Template, world: World) -> int:
    """Answer all pictures, together with the other ranks, unless rank 0 has an `earlier` report."""
    from kfood_dist.evaluate.generate import pick_device
    from kfood_dist.evaluate.rank import answer_part, any_rank, process_group

    device = pick_device(world)
    with process_group(world, device):
        if any_rank(world, earlier is not None, device):
            return reuse(asked, earlier) if earlier else 0
        split = asked.shards.split
        with local_copies({asked.source: {split}}, asked.copy_to, world.local_rank == 0) as places:
            read_here = replace(asked, shards=open_split(places[asked.source], split)) if asked.copy_to else asked
            parts = world.gather(answer_part(read_here, template, world, device))
            if parts is not None:
                conclude(read_here, parts, world, device)
    return 0


def preflight(args: argparse.Namespace) -> Evaluation | None:
    """For a launcher, before it starts any rank: raise every mistake that can be told; reuse an earlier report.

    Returns what is to be measured; None if an earlier report answers the question, so that there is nothing to start.
    """
    asked = check(args)
    if earlier := find_earlier(asked):
        reuse(asked, earlier)
        return None
    quiet_libraries()
    build_template(asked.model, asked.settings, asked.adapter)
    return asked


def conclude(asked: Evaluation, parts: list["Part"], world: World, device: "torch.device") -> None:
    """Put the ranks' parts together and write everything, on rank 0."""
    from kfood_dist.evaluate.rank import make_record

    refused = sorted(i for part in parts for i in part.refused)
    left_out = zip(refused, map(asked.shards.read, refused), strict=True)
    found = {i: make_record(asked.shards.key(i), sample.columns, asked.task, "", 0.0) for i, sample in left_out}
    found |= {i: record for part in parts for i, record in part.records.items()}
    assert sorted(found) == list(range(asked.num_samples)), "a picture was left out"
    records = [found[i] for i in range(asked.num_samples)]
    seconds = max(part.seconds for part in parts)
    report = build_report(records, [asked.shards.key(i) for i in refused], _facts(asked, world, device, seconds))
    asked.out.mkdir(parents=True, exist_ok=True)
    write_report(asked.out, report, records, report_page(report, _samples(asked, records, _SHOWN)))
    if asked.tensorboard:  # after the report, which a fault here must not cost; the next start logs what is missing
        log(asked, report["accuracy"], records)
    print(describe(load_report(asked.out)))


def _facts(asked: Evaluation, world: World, device: "torch.device", seconds: float) -> dict[str, Any]:
    import torch

    fingerprint = asked.inputs["model_fingerprint"] or base_fingerprint(asked.model)  # a hub model is here by now
    weights = asked.adapter / "adapter_model.safetensors" if asked.adapter else None
    return {
        "model": asked.model,
        "adapter": str(asked.adapter) if asked.adapter else None,
        "adapter_sha256": file_sha256(weights) if weights else None,
        "shards": asked.source,
        "index_hash": asked.shards.index_hash,
        "split": asked.shards.split,
        "image_size": asked.settings.image_size,
        "settings": asked.inputs["settings"],
        "samples_per_second": round(asked.num_samples / seconds, 2),
        "seconds": round(seconds, 2),
        "world_size": world.size,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "versions": all_versions(),
        "inputs": asked.inputs | {"model_fingerprint": fingerprint},
    }


def reuse(asked: Evaluation, report: Report) -> int:
    """Say that nothing need be done, and log to TensorBoard what an earlier run did not."""
    assert report.predictions is not None
    print(f"reused {report.path}: the same pictures, model and settings")
    if asked.tensorboard and not panel.is_logged(asked.tensorboard, asked.shards.split, asked.step):
        log(asked, report.accuracy, report.predictions)
    print(describe(report))
    return 0


def log(asked: Evaluation, accuracy: float, records: list[Prediction]) -> None:
    """Write the evaluation to its TensorBoard folder."""
    assert asked.tensorboard is not None
    panel.log(asked.tensorboard, asked.shards.split, asked.step, accuracy, _samples(asked, records, panel.NUM_PICTURES))


def _samples(asked: Evaluation, records: list[Prediction], count: int) -> list[tuple[Prediction, bytes]]:
    return [(records[i], asked.shards.read(i).pictures[0]) for i in panel.spread(count, len(records))]


def describe(report: Report) -> str:
    """The result in two lines, for the console."""
    refused = f", {len(report.raw['refused'])} refused as too long" if report.raw["refused"] else ""
    return (
        f"{report.split}: {report.correct} of {plural(report.images, 'picture')} right{refused}; accuracy "
        f"{percent(report.accuracy)}, 95% interval {interval(report.wilson_95)}\n"
        f"page: {report.path.with_name(PAGE)}"
    )
