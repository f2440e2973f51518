"""`kfood eval`: how many held-out pictures a model names correctly.

    arguments ──► check: shards, settings, model and prompt fit (seconds, no weights) ──► Evaluation
    Evaluation ──► this rank's batches ──► greedy answers ──► gathered on rank 0, in the order of the index
    records ──► report.json, predictions.jsonl, report.html, TensorBoard

Always holds: every picture of the split has exactly one record. Batches are cut by position, and each goes to one rank.
So the same pictures share a batch whatever the number of ranks, and predictions.jsonl is the same byte for byte.
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
        "Ask a model about every picture of a split, and count the right answers. Writes report.json, "
        "predictions.jsonl and report.html. Answers are greedy, and only an exact match counts. Runs in one process, "
        "or under accelerate launch. A second run with the same inputs reuses the report."
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
    parser.add_argument("--stage", type=Path, dest="copy_to", help=argparse.SUPPRESS)  # its old name
    parser.add_argument("--batch-size", type=positive, metavar="N", help="pictures per batch (default: the recipe's)")
    parser.add_argument("--max-new-tokens", type=positive, metavar="N", help="longest answer (default: the recipe's)")
    parser.add_argument(
        "--workers", type=not_negative, default=1, metavar="N", help="loader processes per rank (default: 1; 0: none)"
    )
    parser.add_argument("--limit", type=positive, metavar="N", help="only the first N pictures of the shuffled split")
    parser.add_argument(
        "--tensorboard", type=Path, metavar="DIR", help="also log accuracy and a panel of pictures here"
    )
    parser.add_argument("--step", type=int, metavar="N", help="step for these logs (default: the adapter's)")


def positive(text: str) -> int:
    """Return a whole number of at least 1, for argparse."""
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not 1 or more")
    return number


def not_negative(text: str) -> int:
    """Return a whole number of at least 0, for argparse."""
    if (number := int(text)) < 0:
        raise argparse.ArgumentTypeError(f"{text} is not 0 or more")
    return number


def run(args: argparse.Namespace) -> int:
    """Evaluate, or reuse the report of an earlier run with the same inputs."""
    end_with_launcher()
    world = World.from_environment()
    evaluation = check(args)
    earlier = find_earlier(evaluation) if world.is_main else None
    if world.size == 1 and earlier:
        return reuse(evaluation, earlier)
    if world.is_main:
        print(f"loading the libraries, and then {evaluation.model}", flush=True)
    quiet_libraries()
    template = build_template(evaluation.model, evaluation.settings, evaluation.adapter)
    return run_rank(world, "eval", lambda: answer(evaluation, earlier, template, world))


def answer(evaluation: Evaluation, earlier: Report | None, template: Template, world: World) -> int:
    """Answer all pictures, together with the other ranks. If rank 0 has an `earlier` report, reuse it instead."""
    from kfood_dist.evaluate.generate import pick_device
    from kfood_dist.evaluate.rank import answer_part, any_rank, process_group

    device = pick_device(world)
    with process_group(world, device):
        if any_rank(world, earlier is not None, device):
            return reuse(evaluation, earlier) if earlier else 0
        split = evaluation.shards.split
        with local_copies({evaluation.source: {split}}, evaluation.copy_to, world.local_rank == 0) as places:
            read_here = (
                replace(evaluation, shards=open_split(places[evaluation.source], split))
                if evaluation.copy_to
                else evaluation
            )
            parts = world.gather(answer_part(read_here, template, world, device))
            if parts is not None:
                write_results(read_here, parts, world, device)
    return 0


def preflight(args: argparse.Namespace) -> Evaluation | None:
    """Check an evaluation for a launcher, before it starts any rank, and reuse an earlier report.

    Returns the evaluation to run, or None if an earlier report answers the question, so there is nothing to start.
    Raises KfoodError for every mistake that can be found without the model's weights.
    """
    evaluation = check(args)
    if earlier := find_earlier(evaluation):
        reuse(evaluation, earlier)
        return None
    quiet_libraries()
    build_template(evaluation.model, evaluation.settings, evaluation.adapter)
    return evaluation


def write_results(evaluation: Evaluation, parts: list["Part"], world: World, device: "torch.device") -> None:
    """Join the parts of all ranks and write all files, on rank 0."""
    from kfood_dist.evaluate.rank import make_record

    refused = sorted(i for part in parts for i in part.refused)
    left_out = zip(refused, map(evaluation.shards.read, refused), strict=True)
    found = {
        i: make_record(evaluation.shards.key(i), sample.columns, evaluation.task, "", 0.0) for i, sample in left_out
    }
    found |= {i: record for part in parts for i, record in part.records.items()}
    assert sorted(found) == list(range(evaluation.num_samples)), "a picture has no record"
    records = [found[i] for i in range(evaluation.num_samples)]
    seconds = max(part.seconds for part in parts)
    report = build_report(
        records, [evaluation.shards.key(i) for i in refused], _facts(evaluation, world, device, seconds)
    )
    evaluation.out.mkdir(parents=True, exist_ok=True)
    write_report(evaluation.out, report, records, report_page(report, _samples(evaluation, records, _SHOWN)))
    # Comes after the report, so that a fault here cannot lose it. The next run logs what is missing.
    if evaluation.tensorboard:
        log(evaluation, report["accuracy"], records)
    print(describe(load_report(evaluation.out)))


def _facts(evaluation: Evaluation, world: World, device: "torch.device", seconds: float) -> dict[str, Any]:
    import torch

    fingerprint = evaluation.inputs["model_fingerprint"] or base_fingerprint(
        evaluation.model
    )  # by now a hub model is local
    weights = evaluation.adapter / "adapter_model.safetensors" if evaluation.adapter else None
    return {
        "model": evaluation.model,
        "adapter": str(evaluation.adapter) if evaluation.adapter else None,
        "adapter_sha256": file_sha256(weights) if weights else None,
        "shards": evaluation.source,
        "index_hash": evaluation.shards.index_hash,
        "split": evaluation.shards.split,
        "image_size": evaluation.settings.image_size,
        "settings": evaluation.inputs["settings"],
        "samples_per_second": round(evaluation.num_samples / seconds, 2),
        "seconds": round(seconds, 2),
        "world_size": world.size,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "versions": all_versions(),
        "inputs": evaluation.inputs | {"model_fingerprint": fingerprint},
    }


def reuse(evaluation: Evaluation, report: Report) -> int:
    """Print that an earlier report is reused, and log it to TensorBoard if the earlier run did not."""
    assert report.predictions is not None
    print(f"reused {report.path}: the same pictures, model and settings")
    if evaluation.tensorboard and not panel.is_logged(evaluation.tensorboard, evaluation.shards.split, evaluation.step):
        log(evaluation, report.accuracy, report.predictions)
    print(describe(report))
    return 0


def log(evaluation: Evaluation, accuracy: float, records: list[Prediction]) -> None:
    """Write the evaluation to its TensorBoard folder."""
    assert evaluation.tensorboard is not None
    panel.log(
        evaluation.tensorboard,
        evaluation.shards.split,
        evaluation.step,
        accuracy,
        _samples(evaluation, records, panel.NUM_PICTURES),
    )


def _samples(evaluation: Evaluation, records: list[Prediction], count: int) -> list[tuple[Prediction, bytes]]:
    return [(records[i], evaluation.shards.read(i).pictures[0]) for i in panel.spread(count, len(records))]


def describe(report: Report) -> str:
    """Return the result in two lines, for the console."""
    refused = f", {len(report.raw['refused'])} refused as too long" if report.raw["refused"] else ""
    return (
        f"{report.split}: {report.correct} of {plural(report.images, 'picture')} right{refused}; accuracy "
        f"{percent(report.accuracy)}, 95% interval {interval(report.wilson_95)}\n"
        f"page: {report.path.with_name(PAGE)}"
    )
