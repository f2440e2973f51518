"""The loss and the update do not depend on how 16 samples are cut into ranks, micro-batches and accumulation."""

from pathlib import Path

import numpy as np
import pytest
from running import metrics, train, write_recipe
from safetensors.numpy import load_file
from sweep import swept

from kfood_dist.data.shards.reader import open_split

# Ranks, micro-batch, accumulation, and tokens per micro-batch. A sample has about 80 tokens.
CUTS = {
    "1 × 16": (1, 16, 1, None),
    "2 × 8": (2, 8, 1, None),
    "2 × 4 × 2": (2, 4, 2, None),
    "2 × tokens": (2, 4, 2, 250),
}


@pytest.fixture(scope="module", params=[0, 2, 3, *swept([1])], ids=lambda stage: f"zero{stage}")
def runs(request, tmp_path_factory, tiny_model: Path, tiny_shards: Path) -> dict[str, Path]:
    """Return runs of two steps in float32 without dropout, one for each cut of the same 16 samples."""
    out = {}
    for name, (ranks, micro_batch, accumulation, tokens) in CUTS.items():
        if request.param != 2 and name not in ("2 × 4 × 2", "2 × tokens"):
            continue
        folder = tmp_path_factory.mktemp("cut")
        cut = {"micro_batch_size": micro_batch, "gradient_accumulation_steps": accumulation, "max_steps": 2}
        recipe = write_recipe(
            folder / "recipe.yaml",
            tiny_model,
            tiny_shards,
            model={"quantization": "none", "precision": "fp32"},
            lora={"dropout": 0.0},
            optim={"name": "adamw"},
            train={**cut, "tokens_per_micro_batch": tokens, "zero_stage": request.param},
        )
        train(recipe, ranks)
        out[name] = folder / "run"
    return out


@pytest.fixture(scope="module")
def reference(tmp_path_factory, tiny_model: Path, tiny_shards: Path) -> Path:
    """Return a run of the same two steps in one process without DeepSpeed, all 16 samples at once."""
    folder = tmp_path_factory.mktemp("reference")
    recipe = write_recipe(
        folder / "recipe.yaml",
        tiny_model,
        tiny_shards,
        model={"quantization": "none", "precision": "fp32"},
        lora={"dropout": 0.0},
        optim={"name": "adamw"},
        train={"micro_batch_size": 16, "gradient_accumulation_steps": 1, "max_steps": 2, "zero_stage": 0},
    )
    train(recipe, 1)
    return folder / "run"


def test_answers_differ_in_length_so_that_a_mean_of_means_would_be_noticed(tiny_shards: Path) -> None:
    shards = open_split(tiny_shards, "train")
    assert len({int(n) for n in shards.index["tokens"]}) > 1


def test_loss_gradient_and_weights_agree_with_one_process(runs: dict[str, Path], reference: Path) -> None:
    expected = metrics(reference)
    weights = load_file(reference / "adapter" / "adapter_model.safetensors")
    for name, run in runs.items():
        for mine, theirs in zip(metrics(run), expected, strict=True):
            assert mine["samples"] == theirs["samples"], name
            assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-5), name
            assert mine["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-4), name
        tuned = load_file(run / "adapter" / "adapter_model.safetensors")
        assert tuned.keys() == weights.keys()
        # Adam divides by the gradient's own size. If a gradient is near zero, rounding may change the sign of a step of
        # lr 1e-3. So 99% of the weights must agree.
        distance = np.concatenate([np.abs(tuned[k] - weights[k]).ravel() for k in weights])
        assert np.quantile(distance, 0.99) < 2e-5, name
