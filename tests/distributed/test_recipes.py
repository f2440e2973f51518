"""Every shipped recipe trains; only model, data and length are made small. test_quickstart.py launches one for real."""

import json
from pathlib import Path

import pytest
from running import ROOT, metrics, train

RECIPES = sorted((ROOT / "launch" / "recipes").glob("*.yaml"))


def test_there_are_recipes() -> None:
    assert {"quickstart.yaml", "qwen2.5-vl-3b.yaml"} <= {path.name for path in RECIPES}


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_a_shipped_recipe_trains(recipe: Path, tmp_path: Path, tiny_model: Path, tiny_shards: Path) -> None:
    run = tmp_path / "run"
    small = [f"model.base={tiny_model}", f"data.shards={tiny_shards}", f"run.dir={run}"]
    train(recipe, 2, [*small, "train.max_steps=2", "eval.every_steps=2"])
    assert [row["step"] for row in metrics(run)] == [1, 2]
    facts = json.loads((run / "run.json").read_text())
    assert (facts["distributed_type"], facts["zero_stage"]) == ("DEEPSPEED", 2)
    assert facts["quantization"] == "nf4"
    assert facts["optimizer_state_dtypes"] == ["uint8"]
    assert "accuracy" in (run / "log.txt").read_text()
    assert (run / "adapter" / "adapter_model.safetensors").is_file()
