"""Every shipped recipe trains with the real command. Only the model, the data and the number of steps are small.

test_quickstart.py runs the quickstart's recipe unchanged.
"""

import json
import re
from pathlib import Path

import pytest
from running import ROOT, launch, metrics

RECIPES = sorted((ROOT / "launch" / "recipes").glob("*.yaml"))


def test_there_are_recipes() -> None:
    assert {"quickstart.yaml", "qwen2.5-vl-3b.yaml"} <= {path.name for path in RECIPES}


@pytest.mark.parametrize("recipe", [path for path in RECIPES if path.stem != "quickstart"], ids=lambda path: path.stem)
def test_a_shipped_recipe_trains(recipe: Path, tmp_path: Path, tiny_model: Path, tiny_shards: Path) -> None:
    run = tmp_path / "run"
    small = [f"model.base={tiny_model}", f"data.shards={tiny_shards}", f"run.dir={run}"]
    output = launch(recipe, 2, [*small, "train.max_steps=2", "eval.every_steps=3"])
    assert "DeepSpeed ZeRO-2" in output
    checking, picked, loading = output.splitlines()[:3]
    assert checking == f"launch train: checking {recipe}, this machine, the shards and the base model"
    assert picked.startswith("launch train: no GPU, ") and loading == f"loading the libraries, and then {tiny_model}"
    assert re.search(r"^step 2  val  loss [\d.]+  accuracy [\d.]+  samples \d+$", output, flags=re.MULTILINE)
    (done,) = [line for line in output.splitlines() if line.startswith("done: ")]
    assert re.match(r"done: 2 steps in \d+:\d\d; best step 2 \(val accuracy [\d.]+\); adapter in ", done)
    assert done.endswith(
        f"; next: bash launch/eval.sh --shards {tiny_shards} --split test --model {tiny_model} "
        f"--adapter {run}/adapter --out {run}/tuned"
    )
    for meaningless in ("untested optimizer", "pip install kernels", "1 steps", "1 ranks"):
        assert meaningless not in output
    assert [row["step"] for row in metrics(run)] == [1, 2]
    facts = json.loads((run / "run.json").read_text())
    assert facts["distributed_type"] == "DEEPSPEED"
    assert facts["quantization"] == "nf4"
    assert facts["optimizer_state_dtypes"] == ["uint8"]
    log = (run / "log.txt").read_text()
    assert "accuracy" in log, "a run with validation must also validate after the last step"
    assert "published the adapter of step 2 of 2: the best by validation, " in log
    assert facts["published"]["step"] == json.loads((run / "adapter" / "kfood.json").read_text())["step"] == 2
    assert (run / "adapter" / "adapter_model.safetensors").is_file()
