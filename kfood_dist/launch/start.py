"""Start `kfood train` and `kfood eval` under `accelerate launch`, on the hardware of this machine or job.

    machine, job, ZeRO stage, --processes ──► choose_launch ──► Launch (configuration, processes, why) ──► accelerate

launch/train.sh and launch/eval.sh run it, once on each machine of a job. Mistakes in a recipe are reported here, before
any rank starts.

The exit status of a training is 0 if it finished, 75 if it stopped as asked (start it again to resume), 2 for a mistake
of the user, 1 if it failed, 130 if it was interrupted.
"""

import argparse
import importlib.util
import os
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from kfood_dist.config.recipe import load_recipe
from kfood_dist.config.sections import Recipe
from kfood_dist.doctor.checks import OK, check_shared_memory
from kfood_dist.errors import FINISHED, INTERRUPTED, MISTAKE, STOPPED, KfoodError, LaunchError
from kfood_dist.evaluate import main as evaluation
from kfood_dist.launch.supervise import Supervisor
from kfood_dist.model.adapters import require_adapter
from kfood_dist.system import console, gpus
from kfood_dist.system.cluster import Cluster, require_one_node
from kfood_dist.system.gpus import Gpus
from kfood_dist.system.locks import require_free
from kfood_dist.system.utf8 import ensure_utf8
from kfood_dist.system.words import plural
from kfood_dist.train import main as training
from kfood_dist.train.dry_run import shortened
from kfood_dist.train.preflight import preflight
from kfood_dist.train.run.checkpoint import newest

CONFIGS = Path(__file__).resolve().parents[2] / "launch" / "accelerate"
DEFAULT_CPU_PROCESSES = 2
ALONE = Cluster()


@dataclass(frozen=True)
class Machine:
    """A machine: the GPUs that torch can use, the cores, and whether DeepSpeed is installed."""

    num_gpus: int
    num_cores: int
    has_deepspeed: bool
    emulates_bf16: str = ""  # the first GPU without hardware for bf16; empty if there is none

    @property
    def default_processes(self) -> int:
        return self.num_gpus or min(DEFAULT_CPU_PROCESSES, self.num_cores)


@dataclass(frozen=True)
class Launch:
    """The way to start: a configuration of launch/accelerate, the number of processes on this machine, and why."""

    configuration: str
    processes: int  # on this machine; every machine of a job has the same number
    zero_stage: int
    why: str


def describe_machine(look: Callable[[], Gpus] = gpus.look) -> Machine:
    """Describe this machine. CUDA_VISIBLE_DEVICES applies, as it does for torch.

    Raises LaunchError if there are GPUs that torch cannot use: training would run on the CPU, or fail after loading.
    """
    found = look()
    if fault := gpus.trouble(found):
        raise gpus.refusal(*fault)
    return Machine(
        num_gpus=len(found.usable),
        num_cores=len(os.sched_getaffinity(0)),
        has_deepspeed=importlib.util.find_spec("deepspeed") is not None,
        emulates_bf16=next((str(gpu) for gpu in found.usable if not gpu.has_bf16), ""),
    )


def precision_notice(machine: Machine, precision: str) -> str:
    """Return a notice if the machine would compute in bf16 without hardware for it, else an empty string."""
    if not machine.emulates_bf16 or precision != "bf16":
        return ""
    return f"{machine.emulates_bf16} emulates bf16, which is slow → --set model.precision=fp16"


def choose_launch(machine: Machine, zero_stage: int, processes: int | None, num_machines: int = 1) -> Launch:
    """Pick processes and configuration. A pure function. `zero_stage` 0 means without DeepSpeed.

    `processes` and all other values except `num_machines` are of one machine.

    Raises LaunchError if the machine cannot run that.
    """
    num_gpus = machine.num_gpus
    if num_gpus and processes and processes > num_gpus:
        raise LaunchError(
            f"--processes {processes} on {plural(num_gpus, 'GPU')}", f"ask for at most {num_gpus}, one per GPU"
        )
    if processes is not None and processes < 1:
        raise LaunchError(f"--processes {processes}", "ask for at least 1")
    count = processes or machine.default_processes
    found = f"{num_gpus} GPU{'s' if num_gpus > 1 else ''}" if num_gpus else f"no GPU, {machine.num_cores} cores"
    asked = "as asked" if processes else "one per GPU" if num_gpus else f"gloo on CPU, at most {DEFAULT_CPU_PROCESSES}"
    where = f"{found}: {count} process{'es' if count > 1 else ''} ({asked})"
    where += f" on each of {num_machines} nodes" if num_machines > 1 else ""
    total = count * num_machines

    if zero_stage and not machine.has_deepspeed:
        if total > 1:
            raise LaunchError(
                f"train.zero_stage is {zero_stage}, but deepspeed is not installed",
                "pip install deepspeed, or --set train.zero_stage=0 to train with DDP",
            )
        zero_stage, where = 0, f"{where}; deepspeed is not installed, and one process trains without it"
    if zero_stage:
        return Launch("deepspeed", count, zero_stage, f"{where}, DeepSpeed ZeRO-{zero_stage}")
    if total == 1:
        return Launch("single", 1, 0, f"{where}, without DeepSpeed")
    return Launch("ddp", count, 0, f"{where}, DDP without DeepSpeed")


def parse_processes(text: str | None, machine: Machine, recipe: Recipe | None = None, machines: int = 1) -> int | None:
    """Return the number that `--processes` asks for, or None if it is not given.

    `fit` needs a recipe: it is the most processes that can cut the recipe's global batch. Raises LaunchError for any
    other text that is not a number.
    """
    if text == "fit" and recipe is not None:
        return most_that_fit(recipe, machine.default_processes, machines)
    try:
        return None if text is None else int(text)
    except ValueError:
        raise LaunchError(f"--processes {text}", "give a number, one process per GPU") from None


def most_that_fit(recipe: Recipe, available: int, machines: int = 1) -> int:
    """Return the most processes on each of `machines` that cut the recipe's global batch into micro-batches.

    The result is at most `available`. If no number fits, returns `available`, and preflight reports why.
    """
    batch, micro_batch = recipe.train.global_batch_size, recipe.train.micro_batch_size
    if batch is None:
        return available
    return next((n for n in range(available, 0, -1) if batch % (n * machines * micro_batch) == 0), available)


def accelerate_command(launch: Launch, verb: Sequence[str], cluster: Cluster = ALONE) -> list[str]:
    """Return the complete command line. `verb` is the part after `kfood`. Port 0 lets accelerate choose a free one."""
    several = [
        *("--num_machines", str(cluster.num_machines)),
        *("--machine_rank", str(cluster.machine_rank)),
        *("--main_process_ip", str(cluster.address)),
        *(["--deepspeed_multinode_launcher", "standard"] if launch.configuration == "deepspeed" else []),
    ]
    return [
        *(sys.executable, "-m", "kfood_dist.launch.ranks"),  # accelerate launch
        *("--config_file", str(CONFIGS / f"{launch.configuration}.yaml")),
        *("--num_processes", str(launch.processes * cluster.num_machines)),
        *(several if cluster.num_machines > 1 else []),
        *("--main_process_port", str(cluster.port or 0)),
        *("-m", "kfood_dist", *verb),
    ]


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="launch", description="Train or evaluate on all GPUs of this machine or job.")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    train = verbs.add_parser(
        "train", help="train from a recipe; takes what `kfood train` takes", prog="launch/train.sh"
    )
    training.add_arguments(train)
    evaluate = verbs.add_parser("eval", help="evaluate a model; takes what `kfood eval` takes", prog="launch/eval.sh")
    evaluation.add_arguments(evaluate)
    add_processes(evaluate)
    return parser


def add_processes(parser: argparse.ArgumentParser) -> None:
    """Declare the option of an evaluation that only the launcher has."""
    parser.add_argument("--processes", metavar="N", help="processes (default: one per GPU, or two on the CPU)")


def main(argv: list[str] | None = None) -> int:
    """Print what was picked and why, then train or evaluate. Returns exit status 2 for a mistake of the user."""
    try:
        ensure_utf8(argv)
    except LaunchError as error:
        print(f"launch: {error}", file=sys.stderr)
        return MISTAKE
    console.best_effort(waits=False)
    argv = sys.argv[1:] if argv is None else argv
    args = build_parser().parse_args(argv)
    try:
        return train(args) if args.verb == "train" else evaluate(args, argv)
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
    """Train the recipes in order, and stop at the first one that does not finish. Returns the exit status.

    Checks all recipes before the first one starts. Raises KfoodError for a mistake of the user.
    """
    training.require_recipe(args)
    cluster = Cluster.here()
    if cluster.num_machines > 1 and len(args.recipes) > 1:
        raise LaunchError("several recipes in one job of several nodes", "queue a job for each: bash slurm/stages.sh")
    if args.dry_run is not None and len(args.recipes) > 1:
        raise LaunchError("--dry-run with several recipes", "try one at a time")
    if cluster.is_head:
        named = ", ".join(map(str, args.recipes))
        print(f"launch train: checking {named}, this machine, the shards and the base model", flush=True)
    machine = describe_machine()
    starts = [prepare_training(path, args, machine, cluster) for path in args.recipes]
    supervisor, tries = Supervisor(), args.dry_run is not None and cluster.is_head
    for start in starts:
        if not newest(start.recipe.run.dir / "checkpoints"):
            require_adapter(start.recipe)  # only now, because the recipe before this one may have made it
        if cluster.is_head:
            require_free(start.recipe.run.dir)
            start.recipe.run.dir.mkdir(parents=True, exist_ok=True)
            console.keep_in(start.recipe.run.dir / console.LOG_FILE)
            at = f"; meeting at {cluster.address}:{cluster.port}, {cluster.why}" if cluster.address else ""
            print(f"launch train: {start.launch.why}{at}", flush=True)
            if notice := precision_notice(machine, start.recipe.model.precision):
                print(f"launch train: {notice}", flush=True)
        warn_about_shared_memory(start.launch, machine)
        if tries:  # remove what a killed dry run left, before any rank looks there
            shutil.rmtree(start.recipe.run.dir, ignore_errors=True)
        command = accelerate_command(start.launch, start.verb, cluster)
        status = supervisor.run(command, environment_for(start.launch, machine), start.recipe.run.dir, cluster.is_head)
        if tries:
            shutil.rmtree(start.recipe.run.dir, ignore_errors=True)
        if status != FINISHED:
            return status
        if supervisor.stop_requested and start is not starts[-1]:
            return STOPPED
    return FINISHED


def prepare_training(path: Path, args: argparse.Namespace, machine: Machine, cluster: Cluster) -> Start:
    """Pick how to train one recipe, and check everything that can be checked now."""
    recipe = load_recipe(path, args.set)
    processes = parse_processes(args.processes, machine, recipe, cluster.num_machines)
    launch = choose_launch(machine, recipe.train.zero_stage, processes, cluster.num_machines)
    overrides = [*args.set, f"train.zero_stage={launch.zero_stage}"]
    recipe = load_recipe(path, overrides)
    if cluster.is_head and args.dry_run is None:
        require_free(recipe.run.dir)  # a run that is training there could remove checkpoints during the check
    preflight(recipe, launch.processes * cluster.num_machines)
    recipe = recipe if args.dry_run is None else shortened(recipe, args.dry_run)
    return Start(recipe, launch, training.command_words(args, [path], overrides))


def evaluate(args: argparse.Namespace, argv: list[str]) -> int:
    """Replace this process by `accelerate launch` on this machine.

    If an earlier report has the same evaluation, prints that and returns FINISHED instead.
    """
    require_one_node("an evaluation")
    print("launch eval: checking the shards, the settings and the base model", flush=True)
    task = evaluation.preflight(args)
    if task is None:
        return FINISHED
    machine = describe_machine()
    launch = choose_launch(machine, 0, parse_processes(args.processes, machine))
    print(f"launch eval: {launch.why}", flush=True)
    warn_about_shared_memory(launch, machine)
    if notice := precision_notice(machine, task.settings.precision):
        print(f"launch eval: {notice}", flush=True)
    own = argparse.ArgumentParser()
    add_processes(own)
    _, words = own.parse_known_args(argv)  # the words that `kfood eval` takes
    command = accelerate_command(launch, words)
    os.execve(command[0], command, environment_for(launch, machine))


def warn_about_shared_memory(launch: Launch, machine: Machine) -> None:
    """Warn if NCCL may find too little shared memory, as in a container. NCCL's own error does not name the cause."""
    for finding in check_shared_memory(num_gpus=min(launch.processes, machine.num_gpus)):
        if finding.level != OK:
            print(f"launch: {finding}", file=sys.stderr, flush=True)


def environment_for(launch: Launch, machine: Machine) -> dict[str, str]:
    """Return this process's environment, with defaults for the variables that it does not set."""
    threads = str(max(1, machine.num_cores // launch.processes))
    settled = {"OMP_NUM_THREADS": threads} | ({} if machine.num_gpus else {"DS_ACCELERATOR": "cpu"})
    return settled | dict(os.environ)


if __name__ == "__main__":
    raise SystemExit(main())
