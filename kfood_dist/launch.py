"""Starts `kfood train` and `kfood eval` under `accelerate launch`, on what this machine or job has.

    machine, job, ZeRO stage, --processes ──► choose ──► Launch (configuration, process count, why) ──► accelerate

Run by launch/train.sh and launch/eval.sh; in a job of several machines, once on each. What is wrong with a recipe is
said here, before any rank starts. The exit status of training: 0 finished, 75 stopped as asked and to be started
again, 2 a mistake to mend, 1 failed, 130 interrupted.
"""

import argparse
import importlib.util
import os
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from kfood_dist import console
from kfood_dist.cli import build_parser as build_verb_parser
from kfood_dist.cluster import Cluster, require_one_node
from kfood_dist.config import Recipe, load_recipe
from kfood_dist.doctor import OK, check_shared_memory
from kfood_dist.errors import KfoodError, LaunchError
from kfood_dist.evaluate import main as evaluation
from kfood_dist.model.adapters import require_adapter
from kfood_dist.supervise import FINISHED, INTERRUPTED, MISTAKE, STOPPED, Supervisor
from kfood_dist.train.checkpoint import newest
from kfood_dist.train.limit import NUM_STEPS, limited
from kfood_dist.train.lock import require_free
from kfood_dist.train.preflight import preflight
from kfood_dist.utf8 import settle_names

CONFIGS = Path(__file__).resolve().parents[1] / "launch" / "accelerate"
DEFAULT_CPU_PROCESSES = 2
ALONE = Cluster()


@dataclass(frozen=True)
class Machine:
    """What matters here of a machine: its GPUs, cores, and whether DeepSpeed can run."""

    num_gpus: int
    num_cores: int
    has_deepspeed: bool


@dataclass(frozen=True)
class Launch:
    """How to start: an accelerate configuration of launch/accelerate, how many processes here, and why."""

    configuration: str
    processes: int  # on this machine; every machine of a job has as many
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


def choose(machine: Machine, zero_stage: int, processes: int | None, num_machines: int = 1) -> Launch:
    """Pick processes and configuration; a pure function. `zero_stage` 0 means without DeepSpeed.

    `processes`, as everything else here but `num_machines`, is of one machine.

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
    where += f" on each of {num_machines} nodes" if num_machines > 1 else ""
    total = count * num_machines

    if zero_stage and not machine.has_deepspeed:
        if total > 1:
            raise LaunchError(
                f"train.zero_stage is {zero_stage}, but deepspeed is not installed",
                "pip install deepspeed, or --set train.zero_stage=0 to train with DDP",
            )
        zero_stage, where = 0, f"{where}; deepspeed is not installed, and one process does without"
    if zero_stage:
        return Launch("deepspeed", count, zero_stage, f"{where}, DeepSpeed ZeRO-{zero_stage}")
    if total == 1:
        return Launch("single", 1, 0, f"{where}, without DeepSpeed")
    return Launch("ddp", count, 0, f"{where}, DDP without DeepSpeed")


def accelerate_command(launch: Launch, verb: Sequence[str], cluster: Cluster = ALONE) -> list[str]:
    """The whole command line; `verb` is what follows `kfood`. Port 0 lets accelerate take a free one."""
    several = [
        *("--num_machines", str(cluster.num_machines)),
        *("--machine_rank", str(cluster.machine_rank)),
        *("--main_process_ip", str(cluster.address)),
        *(["--deepspeed_multinode_launcher", "standard"] if launch.configuration == "deepspeed" else []),
    ]
    return [
        *(sys.executable, "-m", "kfood_dist.ranks"),  # accelerate launch
        *("--config_file", str(CONFIGS / f"{launch.configuration}.yaml")),
        *("--num_processes", str(launch.processes * cluster.num_machines)),
        *(several if cluster.num_machines > 1 else []),
        *("--main_process_port", str(cluster.port or 0)),
        *("-m", "kfood_dist", *verb),
    ]


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="launch", description="Start a verb on all GPUs of this machine or job.")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    train = verbs.add_parser("train", help="train by a recipe", prog="launch/train.sh")
    train.add_argument(
        "recipes",
        type=Path,
        nargs="+",
        metavar="RECIPE",
        help="recipe, such as launch/recipes/qwen2.5-vl-3b.yaml; several are trained one after the other",
    )
    train.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="override one key")
    train.add_argument("--stage", metavar="DIR", help="copy the shards to this folder of each node, and read there")
    train.add_argument(
        "--limit", type=int, nargs="?", const=NUM_STEPS, metavar="N", help="try N steps, and say what the whole takes"
    )
    evaluate = verbs.add_parser("eval", help="measure a model; takes what `kfood eval` takes", prog="launch/eval.sh")
    for sub in (train, evaluate):
        sub.add_argument("--processes", type=int, metavar="N", help="on each node; default: one per GPU, or two on CPU")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Say what was picked and why, then train or evaluate; exit status 2 for a mistake."""
    try:
        settle_names(argv)
    except LaunchError as error:
        print(f"launch: {error}", file=sys.stderr)
        return MISTAKE
    console.best_effort(waits=False)
    args, rest = build_parser().parse_known_args(argv)
    try:
        if args.verb == "train" and rest:
            raise LaunchError(f"launch/train.sh does not know {' '.join(rest)}", "see launch/train.sh --help")
        return train(args) if args.verb == "train" else evaluate(args, rest)
    except KfoodError as error:
        print(f"launch {args.verb}: {error}", file=sys.stderr)
        return MISTAKE
    except KeyboardInterrupt:
        return INTERRUPTED


@dataclass(frozen=True)
class Start:
    """One recipe's training, ready to be started."""

    recipe: Recipe
    launch: Launch
    verb: Sequence[str]


def train(args: argparse.Namespace) -> int:
    """Train the recipes in order, as long as each is finished. Raises KfoodError before the first one starts."""
    cluster, machine = Cluster.here(), look_around()
    if cluster.num_machines > 1 and len(args.recipes) > 1:
        raise LaunchError("several recipes in one job of several nodes", "queue a job for each: bash slurm/stages.sh")
    if args.limit is not None and len(args.recipes) > 1:
        raise LaunchError("--limit with several recipes", "try one at a time")
    starts = [prepare_training(path, args, machine, cluster) for path in args.recipes]
    supervisor, tries = Supervisor(), args.limit is not None and cluster.is_head
    for start in starts:
        if not newest(start.recipe.run.dir / "checkpoints"):
            require_adapter(start.recipe)  # now, as the recipe before this one may have made it
        if cluster.is_head:
            require_free(start.recipe.run.dir)
            start.recipe.run.dir.mkdir(parents=True, exist_ok=True)
            console.keep_in(start.recipe.run.dir / console.LOG_FILE)
            at = f"; meeting at {cluster.address}:{cluster.port}, {cluster.why}" if cluster.address else ""
            print(f"launch train: {start.launch.why}{at}", flush=True)
        tell_shared_memory(start.launch, machine)
        if tries:  # what a killed one left, before any rank looks there
            shutil.rmtree(start.recipe.run.dir, ignore_errors=True)
        command = accelerate_command(start.launch, start.verb, cluster)
        status = supervisor.run(command, environment_for(start.launch, machine), start.recipe.run.dir, cluster.is_head)
        if tries:
            shutil.rmtree(start.recipe.run.dir, ignore_errors=True)
        if status != FINISHED:
            return status
        if supervisor.asked and start is not starts[-1]:
            return STOPPED
    return FINISHED


def prepare_training(path: Path, args: argparse.Namespace, machine: Machine, cluster: Cluster) -> Start:
    """Pick how to train one recipe, and check all of it that can be checked now."""
    launch = choose(machine, load_recipe(path, args.set).train.zero_stage, args.processes, cluster.num_machines)
    overrides = [*args.set, f"train.zero_stage={launch.zero_stage}"]
    recipe = load_recipe(path, overrides)
    preflight(recipe, launch.processes * cluster.num_machines)
    words = [word for text in overrides for word in ("--set", text)]
    staging = ["--stage", args.stage] if args.stage else []
    limit = [] if args.limit is None else ["--limit", str(args.limit)]
    recipe = recipe if args.limit is None else limited(recipe, args.limit)
    return Start(recipe, launch, ["train", "--config", str(path), *staging, *limit, *words])


def evaluate(args: argparse.Namespace, rest: list[str]) -> int:
    """Say that an earlier report answers the question, or become `accelerate launch` on this machine."""
    require_one_node("an evaluation")
    if evaluation.preflight(build_verb_parser("eval").parse_args(["eval", *rest])):
        return 0
    machine = look_around()
    launch = choose(machine, 0, args.processes)
    print(f"launch eval: {launch.why}", flush=True)
    tell_shared_memory(launch, machine)
    command = accelerate_command(launch, ["eval", *rest])
    os.execve(command[0], command, environment_for(launch, machine))


def tell_shared_memory(launch: Launch, machine: Machine) -> None:
    """Warn where NCCL may find too little shared memory, as in a container: its own error does not name it."""
    for finding in check_shared_memory(num_gpus=min(launch.processes, machine.num_gpus)):
        if finding.level != OK:
            print(f"launch: {finding}", file=sys.stderr, flush=True)


def environment_for(launch: Launch, machine: Machine) -> dict[str, str]:
    """This process's environment, and what it leaves open."""
    threads = str(max(1, machine.num_cores // launch.processes))
    settled = {"OMP_NUM_THREADS": threads} | ({} if machine.num_gpus else {"DS_ACCELERATOR": "cpu"})
    return settled | dict(os.environ)


if __name__ == "__main__":
    raise SystemExit(main())
