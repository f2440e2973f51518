"""fp16 with DeepSpeed (only on a GPU): a tower overflow is harmless, and the loss scale falls until gradients fit."""

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from crafted import craft, steepen_head, swell_tower
from running import launch, metrics, write_recipe

STEPS = 8

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU on this machine"),
]


def run_of(folder: Path, model: Path, shards: Path, stage: int) -> list[dict[str, float]]:
    folder.mkdir()
    sections = {"model": {"precision": "fp16"}, "lora": {"dropout": 0.0}}
    section = {"zero_stage": stage, "max_steps": STEPS}
    launch(write_recipe(folder / "recipe.yaml", model, shards, **sections, train=section), 1, gpu=True)
    return metrics(folder / "run")


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_an_overflow_in_the_vision_tower_changes_nothing(stage, tmp_path, tiny_model, tiny_shards) -> None:
    ordinary = run_of(tmp_path / "ordinary", tiny_model, tiny_shards, stage)
    large = craft(tiny_model, tmp_path / "model", swell_tower)
    swollen = run_of(tmp_path / "swollen", large, tiny_shards, stage)
    assert ordinary[0]["loss_scale"] == 2**16
    assert ordinary[-1]["loss"] < 0.8 * ordinary[0]["loss"]
    assert [row["skipped"] for row in swollen] == [row["skipped"] for row in ordinary]
    assert sum(row["skipped"] for row in ordinary) <= 1
    assert [row["loss"] for row in swollen] == pytest.approx([row["loss"] for row in ordinary], rel=0.01)


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_the_loss_scale_is_halved_until_the_gradients_fit(stage, tmp_path, tiny_model, tiny_shards) -> None:
    rows = run_of(tmp_path / "steep", craft(tiny_model, tmp_path / "model", steepen_head), tiny_shards, stage)
    assert rows[0]["skipped"] and not all(row["skipped"] for row in rows)
    for now, then in pairwise(rows):
        assert then["loss_scale"] == now["loss_scale"] / (2 if now["skipped"] else 1)
