"""fp16 without DeepSpeed on a CPU: a run learns, a tower overflow is harmless, and other overflows skip the step.

tests/gpu/test_fp16_zero.py does the same with DeepSpeed.
"""

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from asking import labels_of
from crafted import EMBEDDING, craft, steepen_head, swell_tower, unique_token
from running import metrics, train, write_recipe

from kfood_dist.config.recipe import load_recipe
from kfood_dist.data.shards.reader import open_split
from kfood_dist.launch.start import main
from kfood_dist.train.preflight import preflight

STEPS = 6


def recipe_of(folder: Path, model: Path, shards: Path, /, **sections: dict[str, Any]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return write_recipe(
        folder / "recipe.yaml",
        model,
        shards,
        model={"precision": "fp16", **sections.get("model", {})},
        lora={"dropout": 0.0, **sections.get("lora", {})},
        train={"zero_stage": 0, "max_steps": STEPS, **sections.get("train", {})},
    )


def losses(run: Path) -> list[float]:
    return [row["loss"] for row in metrics(run)]


@pytest.fixture(scope="module")
def ordinary(tmp_path_factory, tiny_model: Path, tiny_shards: Path) -> Path:
    folder = tmp_path_factory.mktemp("ordinary")
    train(recipe_of(folder, tiny_model, tiny_shards), 2)
    return folder / "run"


def test_a_run_learns_with_a_scaled_loss(ordinary: Path) -> None:
    rows = metrics(ordinary)
    assert rows[0]["loss_scale"] == 2**16
    assert sum(row["skipped"] for row in rows) <= 1  # the epoch's last step has few labels, so its gradients are larger
    assert rows[-1]["loss"] < 0.8 * rows[0]["loss"]


def test_an_overflow_in_the_vision_tower_changes_nothing(ordinary, tmp_path, tiny_model, tiny_shards) -> None:
    large = craft(tiny_model, tmp_path / "model", swell_tower)
    train(recipe_of(tmp_path, large, tiny_shards), 2)
    assert losses(tmp_path / "run") == pytest.approx(losses(ordinary), rel=1e-3)
    assert [row["skipped"] for row in metrics(tmp_path / "run")] == [row["skipped"] for row in metrics(ordinary)]


def test_a_step_that_overflows_in_the_language_model_is_skipped_and_named(tmp_path, tiny_model, tiny_shards) -> None:
    """Only one dish's token has a direction that the first layer amplifies beyond fp16, but not beyond bf16."""
    shards = open_split(tiny_shards, "train")
    dish, token = unique_token(tiny_model, shards)

    def change(weights: dict[str, torch.Tensor]) -> None:
        for name in (EMBEDDING, "visual.merger.mlp.2.weight", "visual.merger.mlp.2.bias"):
            weights[name].select(-1 if name == EMBEDDING else 0, 0).zero_()
        weights["model.layers.0.self_attn.o_proj.weight"][0].zero_()
        weights[EMBEDDING][token, 0] = 64.0  # after normalisation 16, the square root of the width
        weights["model.layers.0.mlp.up_proj.weight"][0, 0] = 8192.0
        weights["model.layers.0.mlp.down_proj.weight"][:, 0] *= 2.0**-8  # keeps the gradients small

    large = craft(tiny_model, tmp_path / "model", change)
    # Training must not move other tokens into that direction, and large numbers would make 4-bit blocks coarse.
    sections: dict[str, Any] = {"model": {"quantization": "none"}, "lora": {"target_modules": ["q_proj", "v_proj"]}}
    recipe = recipe_of(tmp_path / "fp16", large, tiny_shards, **sections)
    output = train(recipe, 2)
    plan, labels = preflight(load_recipe(recipe), world_size=2), labels_of(shards)
    guilty = {s + 1 for s in range(STEPS) if any(labels[i] == dish for i in plan.ids(s))}
    assert 0 < len(guilty) < STEPS
    named = {int(line.split()[1]) for line in output.splitlines() if "the loss is not finite for" in line}
    assert named == guilty
    rows = metrics(recipe.parent / "run")
    assert all(rows[step - 1]["skipped"] for step in guilty)
    assert not all(row["skipped"] for row in rows)

    sections["model"]["precision"] = "bf16"
    train(recipe_of(tmp_path / "bf16", large, tiny_shards, **sections), 2)
    assert not any(row["skipped"] for row in metrics(tmp_path / "bf16" / "run"))


def test_the_loss_scale_is_halved_until_the_gradients_fit(tmp_path, tiny_model, tiny_shards) -> None:
    large = craft(tiny_model, tmp_path / "model", steepen_head)
    output = train(recipe_of(tmp_path, large, tiny_shards), 2)
    rows = metrics(tmp_path / "run")
    assert rows[0]["skipped"] and not all(row["skipped"] for row in rows)
    for now, then in pairwise(rows):
        assert then["loss_scale"] == now["loss_scale"] / (2 if now["skipped"] else 1)
        assert (now["grad_norm"] is None) == bool(now["skipped"])
    assert all(row["loss"] is not None for row in rows)
    assert "step 1 skipped: a gradient is beyond fp16 at loss scale 65536, which is halved" in output
    assert f"skipped so far {rows[-1]['skipped_in_all']}" in output


def test_deepspeed_is_refused_before_anything_starts(
    tmp_path: Path, tiny_model: Path, tiny_shards: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = recipe_of(tmp_path, tiny_model, tiny_shards, train={"zero_stage": 2})
    assert main(["train", str(recipe), "--processes", "2"]) == 2
    assert "DeepSpeed does not train on a CPU → set train.zero_stage=0" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
