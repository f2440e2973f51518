"""Starts `kfood train` and `kfood eval` under `accelerate launch`, on what this machine has.

    machine, ZeRO stage, --processes ──► choose ──► Launch (configuration, process count, why) ──► exec accelerate

Run by launch/train.sh and launch/eval.sh. What is wrong with a recipe is said here, once, before any rank starts.
"""

import argparse
import importlib.util
import os
import sys
from dataclasses import dataclass
from pathlib import Path

from kfood_dist.cli import build_parser as build_verb_parser
from kfood_dist.config import load_recipe
from kfood_dist.errors import KfoodError, LaunchError
from kfood_dist.evaluate import main as evaluation
from kfood_dist.train.lock import require_free
from kfood_dist.train.preflight import preflight

CONFIGS = Path(__file__).resolve().parents[1] / "launch" / "accelerate"
DEFAULT_CPU_PROCESSES = 2


@dataclass(frozen=True)
class Machine:
    """What matters here of a machine: its GPUs, cores, and whether DeepSpeed can run."""

    num_gpus: int
    num_cores: int
    has_deepspeed: bool


@dataclass(frozen=True)
class Launch:
    """How to start: an accelerate configuration of launch/accelerate, how many processes, and why."""

    configuration: str
    processes: int
    zero_stage: int
    why: str


def look_around() -> Machine:
    """Describe the machine this runs on; CUDA_VISIBLE_DEVICES counts, as it does for torch."""
    import torch

    return Machine(
        num_gpus=torch.cuda.device_count(),
        num_cores=len(os.sched_getaffinity(0)),
        has_deepspeed=importlib.util.find_spec("deepspeed") is not None,
    )


def choose(machine: Machine, zero_stage: int, processes: int | None) -> Launch:
    """Pick processes and configuration; a pure function. `zero_stage` 0 means without DeepSpeed.

    Raises LaunchError for what the machine cannot do.
    """
    gpus = machine.num_gpus
    if gpus and processes and processes > gpus:
        raise LaunchError(f"--processes {processes} on {gpus} GPUs", f"ask for at most {gpus}, one per GPU")
    if processes is not None and processes < 1:
        raise LaunchError(f"--processes {processes}", "ask for at least 1")
    count = processes or gpus or min(DEFAULT_CPU_PROCESSES, machine.num_cores)
    found = f"{gpus} GPU{'s' if gpus > 1 else ''}" if gpus else f"no GPU, {machine.num_cores} cores"
    asked = "as asked" if processes else "one per GPU" if gpus else f"gloo on CPU, at most {DEFAULT_CPU_PROCESSES}"
    where = f"{found}: {count} process{'es' if count > 1 else ''} ({asked})"

    if zero_stage and not machine.has_deepspeed:
        if count > 1:
            raise LaunchError(
                f"train.zero_stage is {zero_stage}, but deepspeed is not installed",
                "pip install deepspeed, or --set train.zero_stage=0 to train with DDP",
            )
        zero_stage, where = 0, f"{where}; deepspeed is not installed, and one process does without"
    if zero_stage:
        return Launch("deepspeed", count, zero_stage, f"{where}, DeepSpeed ZeRO-{zero_stage}")
    if count == 1:
        return Launch("single", 1, 0, f"{where}, without DeepSpeed")
    return Launch("ddp", count, 0, f"{where}, DDP without DeepSpeed")


def accelerate_command(launch: Launch, verb: list[str]) -> list[str]:
    """The whole command line; `verb` is what follows `kfood`. Port 0 lets accelerate take a free one."""
    return [
        *(sys.executable, "-m", "accelerate.commands.launch"),
        *("--config_file", str(CONFIGS / f"{launch.configuration}.yaml")),
        *("--num_processes", str(launch.processes)),
        *("--main_process_port", "0"),
        "--quiet",  # a rank that fails says why itself; accelerate's own trace on top says nothing
        *("-m", "kfood_dist", *verb),
    ]


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="launch", description="Start a verb on all GPUs of this machine or job.")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    train = verbs.add_parser("train", help="train by a recipe", prog="launch/train.sh")
    train.add_argument("recipe", type=Path, help="recipe, such as launch/recipes/qwen2.5-vl-3b.yaml")
    train.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="override one key")
    train.add_argument("--stage", metavar="DIR", help="copy the shards to this folder of each node, and read there")
    evaluate = verbs.add_parser("eval", help="measure a model; takes what `kfood eval` takes", prog="launch/eval.sh")
    for sub in (train, evaluate):
        sub.add_argument("--processes", type=int, metavar="N", help="default: one per GPU, or two on CPU")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Say what was picked and why, then become `accelerate launch`; exit status 2 for a mistake."""
    args, rest = build_parser().parse_known_args(argv)
    try:
        if args.verb == "train" and rest:
            raise LaunchError(f"launch/train.sh does not know {' '.join(rest)}", "see launch/train.sh --help")
        recipe = load_recipe(args.recipe, args.set) if args.verb == "train" else None
        machine = look_around()
        launch = choose(machine, recipe.train.zero_stage if recipe else 0, args.processes)
        if recipe:
            stage = f"train.zero_stage={launch.zero_stage}"
            require_free(recipe.run.dir)
            preflight(load_recipe(args.recipe, [*args.set, stage]), launch.processes)
            overrides = [word for text in [*args.set, stage] for word in ("--set", text)]
            staging = ["--stage", args.stage] if args.stage else []
            verb = ["train", "--config", str(args.recipe), *staging, *overrides]
        elif evaluation.preflight(build_verb_parser("eval").parse_args(["eval", *rest])):
            return 0
        else:
            verb = ["eval", *rest]
    except KfoodError as error:
        print(f"launch {args.verb}: {error}", file=sys.stderr)
        return 2
    print(f"launch {args.verb}: {launch.why}", flush=True)
    command = accelerate_command(launch, verb)
    threads = str(max(1, machine.num_cores // launch.processes))
    settled = {"OMP_NUM_THREADS": threads} | ({} if machine.num_gpus else {"DS_ACCELERATOR": "cpu"})
    os.execve(command[0], command, settled | dict(os.environ))


if __name__ == "__main__":
    raise SystemExit(main())
