"""`--dry-run` tries a recipe in minutes: it trains a few steps, estimates the complete run and leaves no files."""

import json
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest
from running import ROOT, environment, train, try_train, write_recipe

from kfood_dist.launch import start as launch
from kfood_dist.launch.supervise import Supervisor


def run(recipe: Path, *words: str) -> tuple[int, str]:
    done = subprocess.run(
        ["bash", "launch/train.sh", str(recipe), *words],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment(), cwd=ROOT, timeout=300,
    )  # fmt: skip
    return done.returncode, done.stdout


def test_a_dry_run_checks_trains_saves_evaluates_and_estimates(
    tmp_path: Path, tiny_model: Path, tiny_shards: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = write_recipe(
        tmp_path / "recipe.yaml",
        tiny_model,
        tiny_shards,
        train={"max_steps": 1000, "save_every_steps": 300},
        eval={"every_steps": 250, "max_samples": 6},
    )
    status, printed = run(recipe, "--processes", "2", "--dry-run")
    assert status == 0, printed
    assert "train-000000.tar, val-000000.tar not damaged" in printed
    assert "step 3/3 " in printed and "step 3: checkpoint written" in printed and "accuracy" in printed
    assert " samples 8" in printed
    parts = ("memory     2 ranks × ", "steps      1,000 × ", "saving     4 × ", "evaluating 4 × 6 samples × ", "total ")
    for line in parts:
        assert f"\n  {line}" in printed, printed
    assert sorted(path.name for path in tmp_path.iterdir()) == ["recipe.yaml"]

    printed = train(recipe, 1, ["train.zero_stage=0"], ["--dry-run", "1"])
    assert "step 1/1 " in printed
    assert sorted(path.name for path in tmp_path.iterdir()) == ["recipe.yaml"], "without the launcher, too"
    with pytest.raises(SystemExit):
        launch.main(["train", "--dry-run", str(recipe)])
    assert "is not a number of steps; put a recipe before the option" in capsys.readouterr().err
    assert launch.main(["train", str(recipe), "--dry-run", "0"]) == 2
    assert capsys.readouterr().err == "launch train: --dry-run 0 → give a number of steps, at least 1\n"


def test_files_of_a_killed_dry_run_are_removed_before_a_rank_starts(
    tmp_path: Path, tiny_model: Path, tiny_shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise one rank could find a checkpoint there that another has just removed."""
    left = tmp_path / ".run.dry-run" / "checkpoints" / "step-00000003"
    left.mkdir(parents=True)
    (left / "COMPLETE").touch()
    there: list[bool] = []

    def start(self: Supervisor, command: Sequence[str], variables: object, run_dir: Path, decides: bool) -> int:
        there.append(run_dir.exists())
        return 0

    monkeypatch.setattr(Supervisor, "run", start)
    recipe = write_recipe(tmp_path / "recipe.yaml", tiny_model, tiny_shards)
    assert launch.main(["train", str(recipe), "--processes", "2", "--dry-run"]) == 0
    assert there == [False]


def test_a_dry_run_finds_a_damaged_shard(tmp_path: Path, tiny_model: Path, tiny_shards: Path) -> None:
    shards = shutil.copytree(tiny_shards, tmp_path / "shards")
    data = bytearray((shards / "train-000000.tar").read_bytes())
    data[5000] ^= 1
    (shards / "train-000000.tar").write_bytes(data)
    recipe = write_recipe(tmp_path / "recipe.yaml", tiny_model, shards)
    ended = try_train(recipe, 1, words=["--dry-run"])
    assert ended.status == 2, ended.output
    assert "is damaged: train-000000.tar: does not have the SHA-256" in ended.output and "kfood verify" in ended.output


def test_one_process_runs_without_deepspeed_and_several_refuse(
    tmp_path: Path, tiny_model: Path, tiny_shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sitecustomize.py").write_text("import sys\nsys.modules['deepspeed'] = None  # as if not installed\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    recipe = write_recipe(tmp_path / "recipe.yaml", tiny_model, tiny_shards, train={"max_steps": 1, "zero_stage": 2})
    status, printed = run(recipe, "--processes", "1")
    assert status == 0, printed
    assert "deepspeed is not installed, and one process trains without it" in printed and "step 1/1 " in printed
    assert json.loads((tmp_path / "run" / "run.json").read_text())["zero_stage"] == 0
    status, printed = run(recipe, "--processes", "2", "--set", f"run.dir={tmp_path / 'other'}")  # no rank is started
    checking, refusal = printed.splitlines()
    assert status == 2 and checking.startswith("launch train: checking ")
    assert "deepspeed is not installed → pip install deepspeed" in refusal
