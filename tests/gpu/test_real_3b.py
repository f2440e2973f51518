"""A model of the real 3B shape with random weights trains and resumes on one GPU at every ZeRO stage.

The tests are skipped if there is no GPU. `KFOOD_GPU_REPORT=FILE` appends the memory, the speed and the losses to FILE,
one JSON line per variant. With `KFOOD_GPU_REHEARSAL=1` the same code runs on a tiny model on a machine without a GPU,
to check the code itself.
"""

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from statistics import mean
from typing import Any

import pytest
import torch
from running import launch, metrics, write_recipe

from kfood_dist.config.recipe import load_recipe
from kfood_dist.practice.tiny_model import build_config, preprocessor_settings, train_tokenizer

REHEARSAL = os.environ.get("KFOOD_GPU_REHEARSAL") == "1"
SHAPE = Path(__file__).resolve().parents[1] / "unit" / "qwen2_5_vl_3b.json"
STEPS = 20
# ZeRO stage (0: without DeepSpeed), quantisation of the base model, whether activations are recomputed.
VARIANTS = [
    *((stage, weights, True) for weights in ("nf4", "none") for stage in range(4)),
    *((stage, "nf4", False) for stage in (0, 2)),
]

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(not (torch.cuda.is_available() or REHEARSAL), reason="no NVIDIA GPU on this machine"),
]


def random_config(tokenizer: Any) -> Any:
    """Return the real 3B configuration with the practice tokenizer's ids for the special tokens."""
    from transformers import Qwen2_5_VLConfig

    tiny = build_config(tokenizer)
    if REHEARSAL:
        return tiny
    names = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    return Qwen2_5_VLConfig(**{**json.loads(SHAPE.read_text()), **{name: getattr(tiny, name) for name in names}})


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import Qwen2_5_VLForConditionalGeneration

    folder, tokenizer = tmp_path_factory.mktemp("base"), train_tokenizer()
    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = Qwen2_5_VLForConditionalGeneration(random_config(tokenizer)).to(torch.bfloat16)
    model.save_pretrained(folder)
    del model
    torch.cuda.empty_cache()
    tokenizer.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor_settings()))
    return folder


@pytest.fixture(scope="module", params=VARIANTS, ids=lambda v: f"zero{v[0]}-{v[1]}-{'recompute' if v[2] else 'keep'}")
def run(request, base: Path, tmp_path_factory: pytest.TempPathFactory, tiny_shards: Path) -> Iterator[Path]:
    """Train one variant for 20 steps of 32 samples (8 in a rehearsal). A checkpoint is saved at step 10."""
    stage, weights, recompute = request.param
    folder = tmp_path_factory.mktemp("variant")
    section = {
        "micro_batch_size": 4 if REHEARSAL else 16,
        "gradient_accumulation_steps": 2,
        "max_steps": STEPS,
        "save_every_steps": STEPS // 2,
        "zero_stage": stage,
        "gradient_checkpointing": recompute,
    }
    sections = {"model": {"quantization": weights}, "optim": {"learning_rate": 1e-3}}
    recipe = write_recipe(folder / "recipe.yaml", base, tiny_shards, **sections, train=section)
    launch(recipe, 1, gpu=True)
    yield folder / "run"
    shutil.rmtree(folder, ignore_errors=True)


def test_the_model_trains_and_reports_speed_and_memory(run: Path) -> None:
    facts, rows = json.loads((run / "run.json").read_text()), metrics(run)
    weights = load_recipe(run / "recipe.yaml").model.quantization
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    assert mean(row["loss"] for row in rows[-5:]) < mean(row["loss"] for row in rows[:5])
    assert set(facts["linear_layers"]["language_model"]) == {"Linear4bit" if weights == "nf4" else "Linear"}
    assert set(facts["linear_layers"]["tower"]) == {"Linear"}
    assert facts["parameter_dtypes"]["tower"] == ["bfloat16"]
    if not REHEARSAL:  # the tiny model's smallest adapters keep 32-bit moments
        assert facts["optimizer_state_dtypes"] == ["uint8"]
        assert facts["adapted_modules"] == 252
        assert facts["trainable_parameters"] == 29_933_568
    settled = [row["samples_per_second"] for row in rows[5:]]
    report = {
        **{name: facts[name] for name in ("device", "distributed_type", "zero_stage", "versions")},
        "recipe": (run / "recipe.yaml").read_text(),
        "median_samples_per_second": sorted(settled)[len(settled) // 2],
        "peak_memory_gib": max(row["peak_memory_gib"] for row in rows),
        "losses": [row["loss"] for row in rows],
    }
    if target := os.environ.get("KFOOD_GPU_REPORT"):
        with open(target, "a", encoding="utf-8") as file:
            file.write(json.dumps(report, ensure_ascii=False) + "\n")


def test_a_run_resumes_from_its_checkpoint(run: Path) -> None:
    """The losses agree closely, not bit for bit: CUDA's backward passes may add in another order in each run."""
    before = [row["loss"] for row in metrics(run)]
    shutil.rmtree(run / "checkpoints" / f"step-{STEPS:08d}")
    output = launch(run.parent / "recipe.yaml", 1, gpu=True)
    assert f"resumed after step {STEPS // 2}" in output
    after = [row["loss"] for row in metrics(run)]
    assert after[STEPS // 2] == pytest.approx(before[STEPS // 2], rel=1e-3)  # only weights and data count here
    assert after == pytest.approx(before, rel=0.02)
