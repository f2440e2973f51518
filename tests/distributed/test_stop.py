"""A run that is asked to stop saves at that step on all ranks, says so, and goes on to the uninterrupted run's end."""

import json
import os
import signal
import time
from pathlib import Path

import psutil
import pytest
import torch
from running import adapter_bytes, kfood, metrics, start, train, write_recipe
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


def wait_for_step(process, run: Path, step: int) -> None:
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline and process.poll() is None:
        if (run / "metrics.jsonl").is_file() and len(metrics(run)) >= step:
            return
        time.sleep(0.02)
    raise AssertionError(process.communicate()[0])


def ask_all(process, run: Path) -> None:
    """As Slurm does: every process of the job hears it, loaders included."""
    for one in psutil.Process(process.pid).children(recursive=True):
        one.send_signal(signal.SIGUSR1)
        one.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGUSR1)


def ask_launcher(process, run: Path) -> None:
    process.send_signal(signal.SIGTERM)


def ask_by_file(process, run: Path) -> None:
    (run / "STOP").touch()


@pytest.mark.parametrize(
    ("processes", "zero_stage", "ask"),
    [(2, 2, ask_all), (1, 0, ask_by_file)],
    ids=["zero2, every process", "plain, file"],
)
def test_stopped_and_resumed_equals_uninterrupted(
    tmp_path: Path, tiny_model: Path, tiny_shards: Path, whole: Whole, processes: int, zero_stage: int, ask
) -> None:
    stopped = write(tmp_path / "stopped", tiny_model, tiny_shards, zero_stage=zero_stage)
    run = tmp_path / "stopped" / "run"
    run.mkdir()
    (run / "STOP").touch()  # of an earlier run that was killed; a new one is not asked
    process = start(stopped, processes)
    wait_for_step(process, run, 2)
    ask(process, run)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 75, output
    assert "Traceback" not in output
    done = len(metrics(run))
    assert status(run) == {"state": "stopped", "step": done}
    assert f"stopped after step {done} of {STEPS}" in output
    assert [p.name for p in (run / "checkpoints").iterdir()] == [f"step-{done:08d}"]
    assert 2 <= done < STEPS and not (run / "STOP").exists() and not (run / "adapter").exists()

    output = train(stopped, processes)
    assert f"resumed after step {done}" in output
    assert status(run) == {"state": "finished", "step": STEPS}
    lines = [[[row[name] for name in EXACT] for row in metrics(at)] for at in (whole(processes, zero_stage), run)]
    assert lines[0] == lines[1] and len(lines[0]) == STEPS
    assert adapter_bytes(run) == adapter_bytes(whole(processes, zero_stage))


def test_a_stopped_chain_does_not_begin_the_next_stage(tmp_path: Path, tiny_model: Path, tiny_shards: Path) -> None:
    first = write(tmp_path / "a", tiny_model, tiny_shards, zero_stage=0, max_steps=400)
    second = write(tmp_path / "b", tiny_model, tiny_shards, zero_stage=0)
    process = start(first, 1, also=[second])
    wait_for_step(process, tmp_path / "a" / "run", 1)
    ask_launcher(process, tmp_path / "a" / "run")
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 75, output
    assert not (tmp_path / "b" / "run").exists()


def test_asked_while_it_measures_a_run_saves_at_once_and_goes_on(
    tmp_path: Path, tiny_model: Path, tiny_shards: Path
) -> None:
    """The seconds before a preemption are too few for a long validation split."""
    (tmp_path / "a").mkdir()
    recipe = write_recipe(
        tmp_path / "a" / "recipe.yaml",
        tiny_model,
        tiny_shards,
        train={"zero_stage": 0, "max_steps": 4},
        eval={"every_steps": 2, "split": "test", "batch_size": 1},
    )
    run = tmp_path / "a" / "run"
    process = start(recipe, 2)
    wait_for_step(process, run, 2)  # this line is written once the step's own question was answered
    ask_launcher(process, run)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 75, output
    assert "step 2: not measured, as the run is to stop" in output and "accuracy" not in output
    assert status(run) == {"state": "stopped", "step": 2}
    output = train(recipe, 2)
    assert "resumed after step 2" in output
    measured = [line.split()[1] for line in output.splitlines() if "accuracy" in line]
    assert measured == ["2", "4"], output  # what was broken off is made up for
    record = json.loads((run / "checkpoints" / "step-00000002" / "state.json").read_text())
    assert 0 <= record["validation"]["accuracy"] <= 1
    assert status(run) == {"state": "finished", "step": 4}


def test_stages_run_in_order_each_from_the_last_ones_adapter(
    tmp_path: Path, tiny_model: Path, tiny_shards: Path
) -> None:
    """As launch/recipes/stages, without Slurm. The second learns at a rate at which no float32 changes."""
    recipes, runs, learning_rates = [], [], (1e-3, 1e-30, 1e-3)
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
    done = kfood("train", "--config", *map(str, recipes), timeout_s=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert all(status(run) == {"state": "finished", "step": 2} for run in runs)
    first, second, third = (load_file(run / "adapter" / "adapter_model.safetensors") for run in runs)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not all(torch.equal(second[name], third[name]) for name in second)
    again = kfood("train", "--config", *map(str, recipes), timeout_s=300)
    assert again.returncode == 0 and again.stdout.count("already trained") == 3, again.stdout + again.stderr


def test_ctrl_c_ends_everything_at_once(tmp_path: Path, tiny_model: Path, tiny_shards: Path) -> None:
    recipe = write(tmp_path / "a", tiny_model, tiny_shards, zero_stage=0, max_steps=400)
    process = start(recipe, 2)
    wait_for_step(process, tmp_path / "a" / "run", 1)
    started = psutil.Process(process.pid).children(recursive=True)
    os.killpg(process.pid, signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130, output
    _, alive = psutil.wait_procs(started, timeout=30)
    assert started and not alive
