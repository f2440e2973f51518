"""`--dry-run` tries a recipe in minutes: it really runs, says what the whole would take, and leaves nothing."""

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


def test_a_dry_run_checks_steps_saves_measures_and_projects(
    tmp_path: Path, tiny_model: Path, tiny_shards: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = write_recipe(
        tmp_path / "recipe.yaml",
        tiny_model,
        tiny_shards,
        train={"max_steps": 1000, "save_every_steps": 300},
        eval={"every_steps": 250, "max_samples": 6},
    )
    status, said = run(recipe, "--processes", "2", "--dry-run")
    assert status == 0, said
    assert "train-000000.tar, val-000000.tar sound" in said
    assert "step 3/3 " in said and "step 3: checkpoint written" in said and "accuracy" in said
    assert " samples 8" in said
    for line in ("memory ", "steps      1,000 × ", "saving     4 × ", "evaluating 4 × 6 samples × ", "in all "):
        assert f"\n  {line}" in said, said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["recipe.yaml"]

    said = train(recipe, 1, ["train.zero_stage=0"], ["--dry-run", "1"])
    assert "step 1/1 " in said
    assert launch.main(["train", str(recipe), "--dry-run", "0"]) == 2
    assert capsys.readouterr().err == "launch train: --dry-run 0 → give a number of steps from 1\n"


def test_what_a_killed_dry_run_left_is_gone_before_a_rank_looks(
    tmp_path: Path, tiny_model: Path, tiny_shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or one rank could find a checkpoint there that another has just removed."""
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


def test_one_process_needs_no_deepspeed_and_several_say_that_they_do(
    tmp_path: Path, tiny_model: Path, tiny_shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sitecustomize.py").write_text("import sys\nsys.modules['deepspeed'] = None  # as if not installed\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    recipe = write_recipe(tmp_path / "recipe.yaml", tiny_model, tiny_shards, train={"max_steps": 1, "zero_stage": 2})
    status, said = run(recipe, "--processes", "1")
    assert status == 0, said
    assert "deepspeed is not installed, and one process does without" in said and "step 1/1 " in said
    assert json.loads((tmp_path / "run" / "run.json").read_text())["zero_stage"] == 0
    status, said = run(recipe, "--processes", "2", "--set", f"run.dir={tmp_path / 'other'}")  # no rank is started
    checking, refusal = said.splitlines()
    assert status == 2 and checking.startswith("launch train: checking ")
    assert "deepspeed is not installed → pip install deepspeed" in refusal
