"""A dish that makes the loss NaN: its steps are skipped on all ranks, and too many of them in a row end the run.

The dish's answer has a token that no other answer has. The base model's embedding of that token is NaN.
"""

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from asking import labels_of
from crafted import EMBEDDING, craft, unique_token
from running import metrics, train, try_train, write_recipe
from safetensors.torch import load_file
from sweep import swept

from kfood_dist.config.recipe import load_recipe
from kfood_dist.data.shards.reader import ShardSplit, open_split
from kfood_dist.train.preflight import preflight

STEPS = 12
TRAIN = {"micro_batch_size": 1, "gradient_accumulation_steps": 2, "max_steps": STEPS}
SECTIONS = {
    "lora": {"dropout": 0.0},
    "optim": {"schedule": "constant"},
    "train": {**TRAIN, "save_every_steps": 1, "keep_checkpoints": STEPS},
}


@pytest.fixture(scope="module")
def shards(tiny_shards: Path) -> ShardSplit:
    return open_split(tiny_shards, "train")


@pytest.fixture(scope="module")
def cursed(tmp_path_factory, tiny_model: Path, shards: ShardSplit) -> tuple[str, Path]:
    """Return a dish and a base model whose loss is NaN for that dish."""
    dish, token = unique_token(tiny_model, shards)

    def change(weights: dict[str, torch.Tensor]) -> None:
        weights[EMBEDDING][token] = float("nan")

    return dish, craft(tiny_model, tmp_path_factory.mktemp("cursed") / "model", change)


def expected(recipe: Path, shards: ShardSplit, dish: str) -> dict[int, set[str]]:
    """Return the steps, counted from 1, that contain the dish, with the keys of its samples."""
    plan, labels = preflight(load_recipe(recipe), world_size=2), labels_of(shards)
    keys = {step + 1: {shards.key(int(i)) for i in plan.ids(step) if labels[i] == dish} for step in range(STEPS)}
    return {step: found for step, found in keys.items() if found}


@pytest.fixture(scope="module", params=[0, 2, *swept([1, 3])], ids=lambda stage: f"zero{stage}")
def finished(request, tmp_path_factory, tiny_shards: Path, cursed: tuple[str, Path]) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("run")
    sections = {**SECTIONS, "train": {**SECTIONS["train"], "zero_stage": request.param}}
    recipe = write_recipe(folder / "recipe.yaml", cursed[1], tiny_shards, **sections)
    return recipe, train(recipe, 2)


def test_only_the_steps_with_the_dish_are_skipped_and_its_samples_are_named(finished, shards, cursed) -> None:
    recipe, output = finished
    guilty = expected(recipe, shards, cursed[0])
    assert 0 < len(guilty) < STEPS
    rows = metrics(recipe.parent / "run")
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    assert {row["step"] for row in rows if row["skipped"]} == set(guilty)
    assert rows[-1]["skipped_in_all"] == len(guilty)
    for row in rows:
        assert (row["loss"] is None) == (row["grad_norm"] is None) == (row["step"] in guilty)
    message = {int(line.split()[1]): line for line in output.splitlines() if " skipped: " in line}
    assert message.keys() == guilty.keys()
    for step, keys in guilty.items():
        assert all(f"{key} (nan)" in message[step] for key in keys)
        assert message[step].count("(nan)") == len(keys)


def test_a_skipped_step_leaves_the_weights_unchanged(finished, shards, cursed) -> None:
    recipe, _ = finished
    run = recipe.parent / "run"
    rows = metrics(run)
    taken = [row["loss"] for row in rows if not row["skipped"]]
    assert taken[-1] < taken[0]
    saved = [
        load_file(run / "checkpoints" / f"step-{step:08d}" / "adapter" / "adapter_model.safetensors")
        for step in range(1, STEPS + 1)
    ]
    assert all(weight.isfinite().all() for weight in saved[-1].values())
    unchanged = {
        step + 2
        for step, (before, after) in enumerate(pairwise(saved))
        if all(torch.equal(before[name], after[name]) for name in before)
    }
    assert unchanged == set(expected(recipe, shards, cursed[0])) - {1}


def test_too_many_skipped_steps_end_the_run_and_name_the_last_good_checkpoint(
    tmp_path: Path, tiny_shards: Path, shards: ShardSplit, cursed: tuple[str, Path]
) -> None:
    for seed in range(50):  # until step 3 is the first that is skipped
        sections = {**SECTIONS, "train": {**SECTIONS["train"], "zero_stage": 2, "max_skipped_steps": 0, "seed": seed}}
        recipe = write_recipe(tmp_path / "recipe.yaml", cursed[1], tiny_shards, **sections)
        first = min(expected(recipe, shards, cursed[0]))
        if first == 3:
            break
    assert first == 3
    ended = try_train(recipe, 2)
    output = ended.output
    assert ended.status != 0, output
    assert f"step {first}: the loss is not finite for" in output
    assert "steps skipped in a row: 1, more than train.max_skipped_steps 0" in output
    # Step 2 used the weights of step 1. No step has used the weights of step 2 yet.
    assert f"the last good checkpoint is {tmp_path}/run/checkpoints/step-00000001 (delete step-00000002" in output
