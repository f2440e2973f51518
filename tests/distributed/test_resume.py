"""A run that was killed and started again ends bit-identical to the uninterrupted run."""

import os
import re
from pathlib import Path

import psutil
import pytest
from running import (
    adapter_bytes,
    metrics,
    num_steps,
    start,
    train,
    training,
    try_train,
    wait_until,
    write_recipe,
)
from whole import WHOLE_STEPS, Whole

from kfood_dist.cli import main
from kfood_dist.launch import start as launch
from kfood_dist.practice.tiny_model import write_model

STEPS = WHOLE_STEPS
EXACT = ("step", "epoch", "samples", "loss", "learning_rate", "grad_norm")


def exact(run: Path) -> list[list[float]]:
    return [[row[name] for name in EXACT] for row in metrics(run)]


def write(folder: Path, model: Path, shards: Path, **train_section) -> Path:
    section = {"max_steps": STEPS, "save_every_steps": 3, **train_section}
    return write_recipe(folder / "recipe.yaml", model, shards, train=section)


def kill_launcher(process, run: Path) -> None:
    """Kill the launcher with SIGKILL, and check that all processes that it started end with it."""
    started = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.wait()
    _, alive = psutil.wait_procs(started, timeout=30)
    assert started and not alive


@pytest.mark.parametrize(
    ("processes", "zero_stage", "launched"),
    [(2, 2, True), (2, 0, False), (1, 0, False)],
    ids=["zero2, 2 ranks", "ddp, 2 ranks", "plain, 1 process"],
)
def test_a_killed_and_resumed_run_equals_the_uninterrupted_run(
    tmp_path: Path,
    tiny_model: Path,
    tiny_shards: Path,
    whole: Whole,
    processes: int,
    zero_stage: int,
    launched: bool,
) -> None:
    (tmp_path / "killed").mkdir()
    killed = write(tmp_path / "killed", tiny_model, tiny_shards, zero_stage=zero_stage)
    run = tmp_path / "killed" / "run"
    if launched:
        process = start(killed, processes)
        wait_until(process, lambda: num_steps(run) >= 5)
        kill_launcher(process, run)
    else:
        with training(killed, processes) as ranks:
            wait_until(ranks, lambda: num_steps(run) >= 5)
            ranks.kill()
    assert not (run / "adapter").exists()
    output = train(killed, processes)
    assert re.search(r"resumed after step (3|6|9)\b", output), output
    assert exact(run) == exact(whole(processes, zero_stage))
    assert [row[0] for row in exact(run)] == list(range(1, STEPS + 1))
    assert adapter_bytes(run) == adapter_bytes(whole(processes, zero_stage))
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == ["step-00000009", "step-00000012"]

    again = train(killed, processes)
    assert f"already trained, {STEPS} steps; published the adapter of step {STEPS}" in again
    assert len(exact(run)) == STEPS


def test_a_damaged_checkpoint_is_named(tmp_path: Path, tiny_model: Path, tiny_shards: Path) -> None:
    recipe = write(tmp_path, tiny_model, tiny_shards, max_steps=1, zero_stage=0)
    train(recipe, 1)
    for file in (tmp_path / "run" / "checkpoints" / "step-00000001" / "engine").iterdir():
        os.truncate(file, 1000)
    ended = try_train(recipe, 1, ["train.max_steps=2"])
    output = ended.output
    assert ended.status == 2, output
    assert "rank-00000.safetensors does not have the bytes that were written" in output
    assert "delete that checkpoint's folder" in output
    assert "Traceback" not in output


def test_a_second_start_in_the_same_run_directory_is_refused(
    tmp_path: Path,
    tiny_model: Path,
    tiny_shards: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    recipe = write(tmp_path, tiny_model, tiny_shards, zero_stage=0, max_steps=500)
    run = tmp_path / "run"
    with training(recipe, 1) as first:
        wait_until(first, lambda: num_steps(run) >= 1)
        assert launch.main(["train", str(recipe), "--processes", "1"]) == 2
        refusal = capsys.readouterr().err
        assert "another process is training in" in refusal and "→" in refusal

        # The last start of a requeued Slurm job may still hold the lock, on a node that was lost. So the job waits.
        monkeypatch.setenv("SLURM_JOB_ID", "1")
        monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
        again = start(recipe, 1)
        assert again.stdout is not None
        assert again.stdout.readline().startswith("launch train: checking ")
        assert again.stdout.readline() == f"another process is training in {run}; waiting\n"
        first.kill()
    assert again.stdout.readline().startswith("launch train: ")
    again.kill()
    again.communicate()


def test_another_recipe_base_model_and_data_set_are_refused_before_anything_starts(
    tmp_path: Path, tiny_model: Path, tiny_shards: Path, pictures: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = write(tmp_path, tiny_model, tiny_shards, max_steps=1, zero_stage=0)
    train(recipe, 1)
    (tmp_path / "base").mkdir()
    write_model(tmp_path / "base", seed=1)
    assert main(["pack", str(pictures), str(tmp_path / "shards"), "--split", "0.6,0.2,0.2"]) == 0
    capsys.readouterr()
    for changed, message in (
        ("optim.learning_rate=0.5", "another recipe: optim.learning_rate was 0.001 and is now 0.5"),
        ("train.gradient_accumulation_steps=4", "global_batch was 4 and is now 8"),
        (f"model.base={tmp_path / 'base'}", "was trained on another base model: its fingerprint was "),
        (f"data.shards={tmp_path / 'shards'}", "the checkpoint was written with other data settings: "),
    ):
        words = ["--processes", "1", "--set", changed, "--set", "train.max_steps=2"]
        assert launch.main(["train", str(recipe), *words]) == 2
        output = capsys.readouterr().err
        assert message in output and output.startswith("launch train: ")
    assert len(metrics(tmp_path / "run")) == 1
