"""What the launcher starts on each machine. The choice is a pure function, so every machine can be tested."""

import argparse
import json
import os
import shutil
import subprocess
import sys
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from kfood_dist import cli
from kfood_dist.config.recipe import load_recipe
from kfood_dist.data.plan.plan import accumulation_for
from kfood_dist.doctor import checks as doctor
from kfood_dist.errors import LaunchError
from kfood_dist.evaluate.generate import pick_device
from kfood_dist.launch import start as launch_module
from kfood_dist.launch.start import (
    CONFIGS,
    Machine,
    accelerate_command,
    build_parser,
    choose_launch,
    describe_machine,
    main,
    parse_processes,
    precision_notice,
)
from kfood_dist.system import gpus
from kfood_dist.system.cluster import Cluster
from kfood_dist.system.gpus import Gpu, Gpus
from kfood_dist.system.world import World
from kfood_dist.train.main import command_words

ROOT = Path(__file__).resolve().parents[2]

DESK = Machine(num_gpus=1, num_cores=16, has_deepspeed=True)
NODE = Machine(num_gpus=4, num_cores=64, has_deepspeed=True)
LAPTOP = Machine(num_gpus=0, num_cores=8, has_deepspeed=True)


@pytest.mark.parametrize(
    ("machine", "zero_stage", "processes", "configuration", "count"),
    [
        (NODE, 2, None, "deepspeed", 4),
        (NODE, 2, 2, "deepspeed", 2),
        (NODE, 0, None, "ddp", 4),
        (DESK, 2, None, "deepspeed", 1),
        (DESK, 0, None, "single", 1),
        (LAPTOP, 2, None, "deepspeed", 2),
        (LAPTOP, 0, None, "ddp", 2),
        (LAPTOP, 0, 1, "single", 1),
        (Machine(0, 1, True), 2, None, "deepspeed", 1),
        (Machine(1, 8, has_deepspeed=False), 2, None, "single", 1),
    ],
)
def test_each_machine_gets_the_right_configuration_and_process_count(
    machine: Machine, zero_stage: int, processes: int | None, configuration: str, count: int
) -> None:
    launch = choose_launch(machine, zero_stage, processes)
    assert (launch.configuration, launch.processes) == (configuration, count)
    assert (CONFIGS / f"{configuration}.yaml").is_file()
    command = accelerate_command(launch, ["train", "--config", "r.yaml"])
    assert command[command.index("--num_processes") + 1] == str(count)
    assert command[-4:] == ["kfood_dist", "train", "--config", "r.yaml"]


def test_the_launcher_explains_its_choice() -> None:
    assert choose_launch(NODE, 2, None).why == "4 GPUs: 4 processes (one per GPU), DeepSpeed ZeRO-2"
    assert choose_launch(LAPTOP, 0, 1).why == "no GPU, 8 cores: 1 process (as asked), without DeepSpeed"
    without = choose_launch(Machine(1, 8, has_deepspeed=False), 2, None)
    assert without.zero_stage == 0
    assert "deepspeed is not installed, and one process trains without it" in without.why


@pytest.mark.parametrize(
    ("machine", "processes", "complaint"),
    [
        (NODE, 5, "--processes 5 on 4 GPUs"),
        (NODE, 0, "--processes 0"),
        (Machine(2, 8, has_deepspeed=False), None, "deepspeed is not installed"),
    ],
)
def test_an_impossible_number_of_processes_is_refused(machine: Machine, processes: int | None, complaint: str) -> None:
    with pytest.raises(LaunchError, match=complaint):
        choose_launch(machine, 2, processes)


def test_the_process_count_is_per_node() -> None:
    launch = choose_launch(NODE, 2, None, num_machines=2)
    assert launch.why == "4 GPUs: 4 processes (one per GPU) on each of 2 nodes, DeepSpeed ZeRO-2"
    cluster = Cluster(2, 1, "gpu07", 12345)
    command = accelerate_command(launch, ["train"], cluster)
    words = dict(pairwise(command))
    assert (words["--num_processes"], words["--num_machines"], words["--machine_rank"]) == ("8", "2", "1")
    assert (words["--main_process_ip"], words["--main_process_port"]) == ("gpu07", "12345")
    assert words["--deepspeed_multinode_launcher"] == "standard"
    assert choose_launch(DESK, 0, None, num_machines=2).configuration == "ddp"


def test_an_evaluation_on_several_nodes_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SLURM_STEP_NUM_NODES", "2")
    assert main(["eval", "--shards", "shards", "--split", "test", "--model", "base", "--out", "out"]) == 2
    assert "an evaluation was started on 2 nodes, but runs on one → ask for --nodes=1" in capsys.readouterr().err


BUT_HELP = """
import contextlib, io, sys
from kfood_dist.cli import VERBS, main as kfood
from kfood_dist.launch.start import main as launch
calls = [(kfood, [verb, word]) for verb in VERBS for word in ("--help", "--no-such-option")]
calls += [(launch, [verb, word]) for verb in ("train", "eval") for word in ("--help", "--no-such-option")]
for command, words in calls:
    with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()) as out:
        with contextlib.redirect_stderr(io.StringIO()):
            command(words)
    assert ("usage: " in out.getvalue()) == (words[1] == "--help"), words
    heavy = {"torch", "transformers", "accelerate", "deepspeed", "peft", "tensorboard"} & set(sys.modules)
    assert not heavy, f"{words} imports {heavy}"
"""


def test_help_and_a_wrong_option_import_nothing_heavy() -> None:
    """The check runs in a new process. Importing torch alone takes seconds."""
    done = subprocess.run([sys.executable, "-c", BUT_HELP], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr


def options_of(parser: argparse.ArgumentParser, verb: str) -> set[str]:
    return set(parser._subparsers._group_actions[0].choices[verb]._option_string_actions)


def test_the_launcher_has_the_same_options_as_the_verbs() -> None:
    assert options_of(build_parser(), "train") == options_of(cli.build_parser("train"), "train")
    assert options_of(build_parser(), "eval") == options_of(cli.build_parser("eval"), "eval") | {"--processes"}


@pytest.mark.parametrize(
    "words", [["a.yaml", "b.yaml"], ["--config", "a.yaml", "b.yaml"], ["a.yaml", "--config", "b.yaml"]]
)
def test_recipes_can_be_named_with_or_without_config(words: list[str]) -> None:
    also = ["--set", "run.dir=runs/try #2", "--copy-to", "/tmp/s", "--dry-run"]
    for parser in (build_parser(), cli.build_parser("train")):
        before = ["--set", "run.dir=runs/try #2", "--copy-to", "/tmp/s", "--dry-run", "3", *words]
        older = [*words, "--set", "run.dir=runs/try #2", "--stage", "/tmp/s", "--limit", "3"]
        for line in ([*words, *also], before, older):
            args = parser.parse_args(["train", *line])
            assert (args.recipes, args.set, args.dry_run) == ([Path("a.yaml"), Path("b.yaml")], [also[1]], 3)
        again = parser.parse_args(command_words(args, args.recipes, args.set))
        assert vars(again) == vars(args)


def test_training_without_a_recipe_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    message = "train: no recipe is named → name one, such as launch/recipes/qwen2.5-vl-3b.yaml"
    assert main(["train"]) == 2 and f"launch {message}" in capsys.readouterr().err
    assert cli.main(["train", "--set", "train.max_steps=1"]) == 2 and f"kfood {message}" in capsys.readouterr().err


def test_an_evaluation_is_started_with_all_its_options_except_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[list[str]] = []
    monkeypatch.setattr(launch_module.evaluation, "preflight", lambda args: Asked)
    monkeypatch.setattr(launch_module, "describe_machine", lambda: NODE)
    monkeypatch.setattr(os, "execve", lambda program, command, environment: started.append(command))
    words = ["--shards", "s", "--set", "model.precision=fp32", "--model", "m", "--out", "o", "--limit", "3"]
    main(["eval", *words[:4], "--processes", "2", *words[4:]])
    command = started[0]
    assert command[command.index("kfood_dist") + 1 :] == ["eval", *words]
    assert command[command.index("--num_processes") + 1] == "2"


class Asked:
    class settings:
        precision = "bf16"


SCRIPTS = [*sorted((ROOT / "launch").glob("*.sh")), ROOT / "slurm/stages.sh"]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
@pytest.mark.parametrize("word", ["--help", "-h"])
def test_the_help_of_every_script_is_printed_and_nothing_is_started(script: Path, word: str, tmp_path: Path) -> None:
    """The copy has only launch/ and slurm/. With Python, that is enough for the help text, not to start anything."""
    copy = shutil.copytree(ROOT / "launch", tmp_path / "launch").parent
    shutil.copytree(ROOT / "slurm", copy / "slurm")
    environment = {**os.environ, "KFOOD_VENV": str(Path(sys.executable).parents[1])}
    command = ["bash", str(copy / script.relative_to(ROOT)), word]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, env=environment)
    assert done.returncode == 0 and len(done.stdout) > 60, done.stderr
    assert sorted(path.name for path in copy.iterdir()) == ["launch", "slurm"]


@pytest.mark.parametrize("name", ["quickstart.sh", "venv.sh"])
def test_a_script_without_options_refuses_any(name: str) -> None:
    command = ["bash", str(ROOT / "launch" / name), "--processes", "2"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert f"it takes no arguments, but got --processes 2 → see bash launch/{name} --help" in done.stderr


@pytest.mark.parametrize("num_gpus", range(1, 21))
def test_quickstart_trains_on_any_number_of_gpus(num_gpus: int) -> None:
    """Its recipe has a global batch of 32 in micro-batches of 2, which 1, 2, 4, 8 or 16 processes divide."""
    recipe = load_recipe(ROOT / "launch/recipes/quickstart.yaml")
    machine = Machine(num_gpus, 64, has_deepspeed=True)
    processes = parse_processes("fit", machine, recipe)
    assert processes == max(n for n in (1, 2, 4, 8, 16) if n <= num_gpus)
    launch = choose_launch(machine, recipe.train.zero_stage, processes)
    assert launch.processes == processes and f"{num_gpus} GPU" in launch.why
    assert recipe.train.global_batch_size is not None
    accumulation_for(recipe.train.global_batch_size, recipe.train.micro_batch_size, launch.processes)
    assert "bash launch/train.sh $recipe --processes fit\n" in (ROOT / "launch/quickstart.sh").read_text()


def test_fit_counts_all_nodes_and_does_not_limit_other_recipes() -> None:
    recipe = load_recipe(ROOT / "launch/recipes/quickstart.yaml")
    assert parse_processes("fit", NODE, recipe, machines=2) == 4
    assert parse_processes("fit", Machine(7, 64, True), recipe, machines=4) == 4
    assert parse_processes("fit", NODE, recipe, machines=3) == 4  # no number of processes fits: preflight reports why
    assert parse_processes("fit", Machine(7, 64, True), load_recipe(ROOT / "launch/recipes/qwen2.5-vl-3b.yaml")) == 7
    assert parse_processes(None, NODE) is None and parse_processes("3", NODE) == 3
    with pytest.raises(LaunchError, match=r"--processes two → give a number, one process per GPU"):
        parse_processes("two", NODE, recipe)


T4, V100, A100 = Gpu("Tesla T4", 7, 5), Gpu("Tesla V100", 7, 0), Gpu("NVIDIA A100", 8, 0)
CUDA_13 = ("sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120", "compute_120")
CUDA_12_6 = ("sm_50", "sm_60", "sm_70", "sm_75", "sm_80", "sm_86", "sm_90")


def test_only_gpus_that_torch_can_use_are_counted() -> None:
    """With MIG, the driver can show four GPUs while CUDA offers a part of one."""
    found = Gpus(4, (A100,), "2.13.0", "13.0", CUDA_13)
    machine = describe_machine(lambda: found)
    assert (machine.num_gpus, choose_launch(machine, 2, None).processes) == (1, 1)
    assert describe_machine(lambda: Gpus()).num_gpus == 0


@pytest.mark.parametrize(
    ("complaint", "cuda", "remedy"),
    [
        (
            "CUDA initialization: The NVIDIA driver on your system is too old (found version 11040).",
            "13.0",
            "update the",
        ),
        ("Unexpected error from cudaGetDeviceCount() Error 802: system not yet initialized", "13.0", "fabricmanager"),
        ("Error 803: system has unsupported display driver / cuda driver combination", "13.0", "reboot"),
        ("no driver is loaded", "13.0", "sudo modprobe nvidia"),
        ("", "13.0", "compare `nvidia-smi`"),
        ("", None, "pip install --force-reinstall torch"),
    ],
)
def test_gpus_that_torch_cannot_use_are_refused(complaint: str, cuda: str | None, remedy: str) -> None:
    """Neither training nor an evaluation may use the CPU instead."""
    found = Gpus(4, (), "2.13.0", cuda, (), complaint)
    with pytest.raises(LaunchError) as raised:
        describe_machine(lambda: found)
    assert "cannot use the 4 GPUs of this machine" in raised.value.what and complaint in raised.value.what
    assert remedy in raised.value.remedy and "CUDA_VISIBLE_DEVICES= trains on the CPU" in raised.value.remedy
    assert doctor_remedy(found) in raised.value.remedy


def doctor_remedy(found: Gpus) -> str:
    (finding,) = doctor.check_torch(lambda: found)
    assert finding.level == doctor.FAULT
    return finding.remedy


def test_hidden_gpus_are_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty CUDA_VISIBLE_DEVICES selects the CPU."""
    monkeypatch.setattr("ctypes.CDLL", lambda name: pytest.fail("asked"))
    for hidden in ("", "-1", "NoDevFiles"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
        assert gpus.count_shown() == 0


class FourShown:
    """A fake of NVIDIA's management library that shows four GPUs, which CUDA may be unable to use."""

    def __init__(self, initialised: int = 0):
        self.initialised = initialised

    def nvmlInit_v2(self) -> int:
        return self.initialised

    def nvmlDeviceGetCount_v2(self, count: Any) -> int:
        count._obj.value = 4
        return 0

    def nvmlShutdown(self) -> int:
        return 0


def test_gpus_without_a_loaded_driver_are_counted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """After a kernel update, the library exists but /dev/nvidia0 does not. Without this count the CPU would be used."""
    facts = {
        "a": ("0x10de", "0x030200"),
        "b": ("0x10de", "0x030000"),
        "c": ("0x10de", "0x068000"),
        "d": ("0x8086", "0x030000"),
    }
    for name, (vendor, kind) in facts.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "vendor").write_text(f"{vendor}\n")
        (tmp_path / name / "class").write_text(f"{kind}\n")
    plugged = gpus.count_plugged(tmp_path)
    assert (plugged, gpus.count_plugged(tmp_path / "none")) == (2, 0)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr("ctypes.CDLL", lambda name: FourShown(initialised=9))
    monkeypatch.setattr(gpus, "count_plugged", lambda: plugged)
    assert gpus.count_shown() >= 2


def test_gpus_are_looked_up_in_the_driver_and_by_torch_in_a_new_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """`look` counts the GPUs of the driver, and runs torch in a new process whose answer it reads."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr("ctypes.CDLL", lambda name: FourShown())
    assert gpus.count_shown() == 4
    asked: list[list[str]] = []

    def run(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        asked.append(command)
        message = {"shown": 4, "usable": [asdict(T4)], "torch": "2", "cuda": "13.0", "arches": CUDA_13, "complaint": ""}
        return subprocess.CompletedProcess(command, 0, f"a greeting\n{json.dumps(message)}\n", "")

    monkeypatch.setattr(subprocess, "run", run)
    assert gpus.look() == Gpus(4, (T4,), "2", "13.0", CUDA_13)
    assert asked == [[sys.executable, "-m", "kfood_dist.system.gpus"]]
    monkeypatch.setattr(subprocess, "run", lambda command, **options: subprocess.CompletedProcess(command, 0, "", ""))
    with pytest.raises(LaunchError, match="torch cannot look for GPUs"):
        gpus.look()


@pytest.mark.skipif(torch.cuda.is_available(), reason="torch can use a GPU here")
def test_no_rank_uses_the_cpu_on_a_machine_with_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """This also holds for a process that is started without the launcher."""
    gpus.require_usable()
    monkeypatch.setattr(gpus, "count_shown", lambda: 4)
    with pytest.raises(LaunchError, match="cannot use the 4 GPUs of this machine"):
        pick_device(World())


def test_the_probe_reports_torch_and_its_gpus() -> None:
    found = gpus.probe()
    assert found.torch == torch.__version__ and len(found.usable) == (torch.cuda.device_count() if found.usable else 0)
    assert json.loads(json.dumps(asdict(found)))["usable"] == [asdict(gpu) for gpu in found.usable]


@pytest.mark.parametrize(
    ("gpu", "arches", "fits"),
    [
        (V100, CUDA_13, False),
        (V100, CUDA_12_6, True),
        (T4, CUDA_13, True),
        (Gpu("RTX 4090", 8, 9), CUDA_13, True),  # kernels for 8.6 run on it
        (Gpu("RTX 5090", 12, 0), CUDA_12_6, False),
        (Gpu("RTX 5090", 12, 0), (*CUDA_12_6, "compute_90"), True),
        (Gpu("GB10", 12, 1), CUDA_13, True),
        (Gpu("Instinct MI300X", 9, 4), ("gfx942",), True),
        (A100, ("sm_86", "sm_90a"), False),
    ],
)
def test_a_gpu_needs_kernels_for_its_compute_capability(gpu: Gpu, arches: tuple[str, ...], fits: bool) -> None:
    assert gpus.has_kernels(gpu, arches) == fits


def test_a_gpu_without_kernels_is_refused_and_the_fitting_wheel_is_named() -> None:
    with pytest.raises(LaunchError, match=r"no kernels for GPU 1 \(Tesla V100, compute capability 7.0\)") as raised:
        describe_machine(lambda: Gpus(2, (A100, V100), "2.13.0", "13.0", CUDA_13))
    assert "install torch's wheel for CUDA 12.6 (cu126)" in raised.value.remedy
    assert gpus.wheel_for(Gpu("RTX 5090", 12, 0)).startswith("install torch's ordinary wheel")


def test_emulated_bf16_is_reported_with_a_remedy() -> None:
    turing = describe_machine(lambda: Gpus(2, (A100, T4), "2.13.0", "13.0", CUDA_13))
    message = "Tesla T4, compute capability 7.5 emulates bf16, which is slow → --set model.precision=fp16"
    assert precision_notice(turing, "bf16") == message
    assert precision_notice(turing, "fp16") == precision_notice(NODE, "bf16") == ""
