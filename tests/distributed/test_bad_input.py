"""A user's mistake is reported in one message with its remedy, before anything is loaded or written.

Most tests call the launcher in this process. Two start launch/train.sh, for the exit status and for several ranks.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from running import kfood, start, write_recipe

from kfood_dist.launch import start as launch

Refuse = Callable[..., None]


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Refuse:
    """Return a check that the launcher refuses a recipe with status 2 and one message, and makes no run directory."""

    def check(recipe: Path, complaint: str, *overrides: str, processes: int = 1) -> None:
        words = [word for text in overrides for word in ("--set", text)]
        capsys.readouterr()
        status = launch.main(["train", str(recipe), "--processes", str(processes), *words])
        output = capsys.readouterr().err
        assert status == 2, output
        assert complaint in output
        assert "→" in output, "no remedy"
        assert not (recipe.parent / "run").exists()

    return check


@pytest.fixture
def recipe(tmp_path: Path, tiny_model: Path, tiny_shards: Path) -> Path:
    return write_recipe(tmp_path / "recipe.yaml", tiny_model, tiny_shards)


def test_an_unknown_key_and_a_wrong_type_are_reported_together(refused: Refuse, recipe: Path) -> None:
    refused(recipe, "train.max_step: no such key; did you mean max_steps?", "train.max_step=3", "lora.r=many")
    refused(recipe, "lora.r: input should be a valid integer", "train.max_step=3", "lora.r=many")


def test_the_launch_script_ends_with_the_same_message_and_status(recipe: Path) -> None:
    process = start(recipe, 1, ["train.max_step=3"])
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 2, output
    assert "train.max_step: no such key; did you mean max_steps?" in output and "Traceback" not in output
    assert not (recipe.parent / "run").exists()


def test_a_missing_base_model_is_refused(refused: Refuse, recipe: Path, tmp_path: Path) -> None:
    refused(recipe, "does not exist", f"model.base={tmp_path / 'missing'}")
    refused(recipe, "hf download nobody/no-such-model", "model.base=nobody/no-such-model")


def test_folders_without_readable_shards_are_refused(
    refused: Refuse, recipe: Path, tmp_path: Path, tiny_shards: Path
) -> None:
    refused(recipe, "missing", f"data.shards={tmp_path / 'missing'}")
    (tmp_path / "empty").mkdir()
    refused(recipe, "manifest.json", f"data.shards={tmp_path / 'empty'}")
    copy = shutil.copytree(tiny_shards, tmp_path / "copy")
    manifest = json.loads((copy / "manifest.json").read_text())
    (copy / "manifest.json").write_text(json.dumps({**manifest, "version": 99}))
    refused(recipe, "version", f"data.shards={copy}")
    refused(recipe, "are 224 pixels wide, not 448", "data.image_size=448")


def test_a_run_directory_that_cannot_be_made_is_refused(refused: Refuse, recipe: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    refused(recipe, "is not a folder", f"run.dir={tmp_path / 'file' / 'run'}")


def test_a_max_length_too_short_for_a_picture_is_refused(refused: Refuse, recipe: Path) -> None:
    refused(recipe, "data.max_length 10 is too short for a picture", "data.max_length=10")


def test_a_deepspeed_json_that_contradicts_the_recipe_is_refused(refused: Refuse, recipe: Path, tmp_path: Path) -> None:
    path = tmp_path / "zero.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": 2}, "gradient_accumulation_steps": 5}))
    refused(
        recipe,
        "gradient_accumulation_steps is 5 there and 2 in the recipe",
        f"train.deepspeed_config={path}",
        processes=2,
    )


def test_a_world_size_that_does_not_divide_the_global_batch_is_refused(refused: Refuse, recipe: Path) -> None:
    refused(recipe, "a global batch of 9 cannot be cut", "train.global_batch_size=9", processes=2)


def test_a_rank_started_by_hand_reports_the_same_mistake(recipe: Path) -> None:
    done = kfood("train", "--config", str(recipe), "--set", "train.max_step=3")
    assert done.returncode == 2
    assert "did you mean max_steps?" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("make", [False, True], ids=["missing", "empty"])
def test_packing_refuses_a_missing_or_empty_source(tmp_path: Path, make: bool) -> None:
    source = tmp_path / "source"
    if make:
        source.mkdir()
    done = kfood("pack", str(source), str(tmp_path / "out"))
    assert done.returncode == 2
    assert str(source) in done.stderr and "→" in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("processes", [1, 2])
def test_a_mistake_that_only_a_rank_can_find_ends_with_status_2(
    tmp_path: Path, tiny_model: Path, tiny_shards: Path, processes: int
) -> None:
    recipe = write_recipe(
        tmp_path / "recipe.yaml",
        tiny_model,
        tiny_shards,
        train={"zero_stage": 0},
        lora={"target_modules": ["q_proj", "qkv"]},
    )
    process = start(recipe, processes)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 2, output
    assert "lora.target_modules ['qkv'] are not in each of" in output and "Traceback" not in output
