"""A run that is asked to stop saves at that step on all ranks, reports it, and resumes to the uninterrupted result."""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
import torch
from running import (
    ROOT,
    adapter_bytes,
    environment,
    kfood,
    metrics,
    num_steps,
    start,
    train,
    training,
    wait_until,
    write_recipe,
)
from safetensors.torch import load_file
from whole import WHOLE_STEPS, Whole

STEPS = WHOLE_STEPS
EXACT = ("step", "epoch", "samples", "loss", "learning_rate", "grad_norm")


def write(folder: Path, model: Path, shards: Path, **train_section) -> Path:
    folder.mkdir()
    section = {"max_steps": STEPS, **train_section}
    return write_recipe(folder / "recipe.yaml", model, shards, train=section)


def status(run: Path) -> dict[str, object]:
    return json.loads((run / "status.json").read_text())


def exact(run: Path) -> list[list[float]]:
    return [[row[name] for name in EXACT] for row in metrics(run)]


@contextmanager
def started_with_sighup(handler: signal.Handlers) -> Iterator[None]:
    """Start the block's processes with this SIGHUP handler: ignored as by `nohup`, or not. Then restore the suite's."""
    before = signal.signal(signal.SIGHUP, handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGHUP, before)


def family(process) -> list[psutil.Process]:
    """Return the process and all that it started: torchrun's agent, ranks and loaders."""
    return [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]


def test_a_run_under_nohup_continues_when_its_terminal_closes(
    tmp_path: Path, tiny_model: Path, tiny_shards: Path, whole: Whole
) -> None:
    """The terminal closes, so the output has no reader, and all processes get SIGHUP."""
    recipe = write(tmp_path / "whole", tiny_model, tiny_shards)
    run = tmp_path / "whole" / "run"
    run.mkdir()
    (run / "STOP").touch()  # from an earlier, killed run: it must not stop the new one
    with started_with_sighup(signal.SIG_IGN):
        process = start(recipe, 2)
    wait_until(process, lambda: num_steps(run) >= 1)
    assert process.stdout is not None
    process.stdout.close()
    for one in family(process):
        one.send_signal(signal.SIGHUP)
    assert process.wait(timeout=240) == 0, (run / "log.txt").read_text()
    log = (run / "log.txt").read_text()
    assert "launch train: " in log and f"done: {STEPS} steps" in log and "Traceback" not in log
    assert [line.count(f"/{STEPS}  loss") for line in log.splitlines()].count(1) == STEPS
    assert exact(run) == exact(whole(2, 2))
    assert adapter_bytes(run) == adapter_bytes(whole(2, 2))


def start_alone(recipe: Path, processes: int) -> "subprocess.Popen[str]":
    """Start `kfood train` without the launcher."""
    command = [sys.executable, "-m", "kfood_dist", "train", "--config", str(recipe), "--set", "train.zero_stage=0"]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment(), start_new_session=True,
        cwd=ROOT,
    )  # fmt: skip


def ask_all(process, run: Path) -> None:
    """Send the signals to every process of the job, including loaders, as Slurm does."""
    *started, launcher = family(process)
    for one in started:
        for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGHUP):
            one.send_signal(number)
    launcher.send_signal(signal.SIGUSR1)


def hang_up(process, run: Path) -> None:
    """Send SIGHUP to every process of the group, as a closed terminal does."""
    os.killpg(process.pid, signal.SIGHUP)


@pytest.mark.parametrize(
    ("processes", "zero_stage", "begin", "ask"),
    [(2, 2, start, ask_all), (1, 0, start_alone, hang_up)],
    ids=["zero2, every process", "kfood train alone, hangup"],
)
def test_a_stopped_and_resumed_run_equals_the_uninterrupted_run(
    tmp_path: Path, tiny_model: Path, tiny_shards: Path, whole: Whole, processes: int, zero_stage: int, begin, ask
) -> None:
    stopped = write(tmp_path / "stopped", tiny_model, tiny_shards, zero_stage=zero_stage)
    run = tmp_path / "stopped" / "run"
    with started_with_sighup(signal.SIG_DFL):
        process = begin(stopped, processes)
    wait_until(process, lambda: num_steps(run) >= 2)
    assert status(run) == {"state": "running", "step": 0}
    ask(process, run)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 75, output
    assert "Traceback" not in output
    done = num_steps(run)
    assert status(run) == {"state": "stopped", "step": done}
    assert f"stopped after step {done} of {STEPS}" in output
    assert [p.name for p in (run / "checkpoints").iterdir()] == [f"step-{done:08d}"]
    assert 2 <= done < STEPS and not (run / "STOP").exists() and not (run / "adapter").exists()

    output = train(stopped, processes)
    assert f"resumed after step {done}" in output
    assert status(run) == {"state": "finished", "step": STEPS}
    assert exact(run) == exact(whole(processes, zero_stage)) and len(exact(run)) == STEPS
    assert adapter_bytes(run) == adapter_bytes(whole(processes, zero_stage))


def test_a_stopped_stage_does_not_start_the_next_stage(tmp_path: Path, tiny_model: Path, tiny_shards: Path) -> None:
    first = write(tmp_path / "a", tiny_model, tiny_shards, zero_stage=0, max_steps=400)
    second = write(tmp_path / "b", tiny_model, tiny_shards, zero_stage=0)
    with started_with_sighup(signal.SIG_DFL):
        process = start(first, 1, also=[second])
    wait_until(process, lambda: num_steps(tmp_path / "a" / "run") >= 1)
    hang_up(process, tmp_path / "a" / "run")
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 75, output
    assert not (tmp_path / "b" / "run").exists()


def test_a_run_asked_to_stop_while_it_evaluates_saves_at_once_and_resumes(
    tmp_path: Path, tiny_model: Path, tiny_shards: Path
) -> None:
    """The seconds before a preemption are not enough to evaluate a long validation split."""
    (tmp_path / "a").mkdir()
    recipe = write_recipe(
        tmp_path / "a" / "recipe.yaml",
        tiny_model,
        tiny_shards,
        train={"zero_stage": 0, "max_steps": 4},
        eval={"every_steps": 2, "split": "test", "batch_size": 1},
    )
    run = tmp_path / "a" / "run"
    with training(recipe, 2) as ranks:
        wait_until(ranks, lambda: num_steps(run) >= 2)  # the line is written after this step's check for STOP
        (run / "STOP").touch()
        ended = ranks.wait(120)
    assert ended.statuses == (75, 75), ended.output
    assert "step 2: not evaluated, because the run stops" in ended.output and "accuracy" not in ended.output
    assert status(run) == {"state": "stopped", "step": 2}
    output = train(recipe, 2)
    assert "resumed after step 2" in output
    measured = re.findall(r"^step (\d+)  test  loss .*  accuracy ", output, flags=re.MULTILINE)
    assert measured == ["2", "4"], output  # the interrupted evaluation of step 2 is repeated
    record = json.loads((run / "checkpoints" / "step-00000002" / "state.json").read_text())
    assert 0 <= record["validation"]["accuracy"] <= 1
    assert status(run) == {"state": "finished", "step": 4}


def test_stages_run_in_order_each_from_the_adapter_of_the_last(
    tmp_path: Path, tiny_model: Path, tiny_shards: Path
) -> None:
    """Like launch/recipes/stages, without Slurm. The second stage's rate is so small that no float32 weight changes."""
    recipes, runs, learning_rates = [], [], (1e-3, 1e-30)
    for number, learning_rate in enumerate(learning_rates):
        folder = tmp_path / str(number)
        folder.mkdir()
        model = {"adapter": str(runs[-1] / "adapter")} if runs else {}
        recipes.append(
            write_recipe(
                folder / "recipe.yaml",
                tiny_model,
                tiny_shards,
                model={"base": str(tiny_model), **model},
                optim={"learning_rate": learning_rate},
                train={"zero_stage": 0, "max_steps": 2},
            )
        )
        runs.append(folder / "run")
    done = kfood("train", "--config", *map(str, recipes), "--processes", "1", timeout_s=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert all(status(run) == {"state": "finished", "step": 2} for run in runs)
    first, second = (load_file(run / "adapter" / "adapter_model.safetensors") for run in runs)
    assert any("lora_B" in name and first[name].any() for name in first), "lora_B is still at its initial zero"
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert "already trained" in train(recipes[1], 1)


def test_ctrl_c_ends_everything_at_once(tmp_path: Path, tiny_model: Path, tiny_shards: Path) -> None:
    recipe = write(tmp_path / "a", tiny_model, tiny_shards, zero_stage=0, max_steps=400)
    process = start(recipe, 2)
    wait_until(process, lambda: num_steps(tmp_path / "a" / "run") >= 1)
    started = psutil.Process(process.pid).children(recursive=True)
    os.killpg(process.pid, signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130, output
    _, alive = psutil.wait_procs(started, timeout=30)
    assert started and not alive
