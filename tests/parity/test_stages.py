"""4-bit QLoRA and bf16 LoRA follow one loss curve: DDP, each ZeRO stage, one process, a loop in plain PyTorch."""

import json
from pathlib import Path
from typing import Any

import pytest
from plain import plain_losses
from running import metrics, train, write_recipe

STEPS = 20
WAYS = {  # ZeRO stage, ranks, accumulation: always 8 samples
    "ddp": (0, 2, 2),
    "zero1": (1, 2, 2),
    "zero2": (2, 2, 2),
    "zero3": (3, 2, 2),
    "one rank": (0, 1, 4),
}


class Runs:
    """One run per way, of one quantisation."""

    def __init__(self, folder: Path, model: Path, shards: Path, quantization: str):
        self.folders: dict[str, Path] = {}
        for way, (stage, ranks, accumulation) in WAYS.items():
            here = folder / way.replace(" ", "-")
            here.mkdir()
            section = {"zero_stage": stage, "gradient_accumulation_steps": accumulation, "max_steps": STEPS}
            # Dropout differs by rank on purpose, so it would tell one rank from two.
            sections: dict[str, Any] = {"model": {"quantization": quantization}, "lora": {"dropout": 0.0}}
            recipe = write_recipe(here / "recipe.yaml", model, shards, **sections, train=section)
            train(recipe, ranks)
            self.folders[way] = here / "run"
        self.plain = plain_losses(folder / "one-rank" / "recipe.yaml")

    def losses(self, way: str) -> list[float]:
        return [row["loss"] for row in metrics(self.folders[way])]


@pytest.fixture(scope="module", params=["nf4", "none"])
def runs(request, tmp_path_factory, tiny_model: Path, tiny_shards: Path) -> Runs:
    return Runs(tmp_path_factory.mktemp("stages"), tiny_model, tiny_shards, request.param)


def test_the_loss_falls(runs: Runs) -> None:
    assert runs.plain[-1] < 0.5 * runs.plain[0]


@pytest.mark.parametrize("way", WAYS)
def test_the_curve_is_that_of_plain_pytorch(runs: Runs, way: str) -> None:
    apart = [abs(mine / plain - 1) for mine, plain in zip(runs.losses(way), runs.plain, strict=True)]
    assert max(apart) < 0.01, f"{way}: {apart}"


KINDS = [("ddp", "MULTI_CPU"), ("zero1", "DEEPSPEED"), ("zero2", "DEEPSPEED"), ("zero3", "DEEPSPEED")]


@pytest.mark.parametrize(("way", "kind"), KINDS)
def test_run_json_says_what_really_ran(runs: Runs, way: str, kind: str) -> None:
    facts = json.loads((runs.folders[way] / "run.json").read_text())
    stage = WAYS[way][0]
    assert facts["distributed_type"] == kind
    assert (facts["zero_stage"], facts["world_size"]) == (stage, 2)
    linear = {"nf4": "Linear4bit", "none": "Linear"}[facts["quantization"]]
    assert facts["linear_layers"]["model.language_model"] == {linear: 28}
    assert set(facts["linear_layers"]["model.visual"]) == {"Linear"}
    assert facts["linear_layers"]["lm_head"] == {"Linear": 1}
    assert facts["optimizer"] == "bitsandbytes.optim.adamw.AdamW8bit"
    # bitsandbytes keeps moments of tensors under 4,096 numbers in 32 bits; ZeRO's flat partitions are larger.
    assert facts["optimizer_state_dtypes"] == (["uint8"] if stage else ["float32", "uint8"])
    assert facts["adapted_modules"] == 28
    assert facts["parameter_dtypes"]["model.visual"] == ["bfloat16"]
    assert facts["trainable_parameters"] == 262_144
    assert facts["total_parameters"] > 3_000_000
    assert facts["versions"]["deepspeed"] and facts["command"]
