"""The DeepSpeed JSON may set how memory is used, but nothing that conflicts with the recipe."""

import json
from pathlib import Path
from typing import Any

import pytest

from kfood_dist.config.sections import Recipe
from kfood_dist.errors import RecipeError
from kfood_dist.train.engine.zero_config import SHIPPED, deepspeed_config


def build(config: Path | None = None, precision: str = "bf16", **train: Any) -> Recipe:
    section = {"micro_batch_size": 4, "deepspeed_config": config, **train}
    model = {"base": "m", "precision": precision}
    return Recipe.model_validate({"data": {"shards": "s"}, "model": model, "run": {"dir": "r"}, "train": section})


@pytest.mark.parametrize("path", sorted(SHIPPED.glob("*.json")), ids=lambda path: path.stem)
def test_each_shipped_json_holds_only_the_memory_strategy(path: Path) -> None:
    assert json.loads(path.read_text()).keys() == {"zero_optimization"}
    stage = int(path.stem[4])
    config = deepspeed_config(build(path, zero_stage=stage), accumulation=8, world_size=2)
    assert config["zero_optimization"]["stage"] == stage
    assert config["gradient_accumulation_steps"] == 8
    assert config["train_micro_batch_size_per_gpu"] == 4
    assert config["train_batch_size"] == 64
    assert config["gradient_clipping"] == 1.0
    assert config["bf16"] == {"enabled": True, "check_grad_overflow": True}


@pytest.mark.parametrize(
    ("extra", "complaint"),
    [
        ({"gradient_accumulation_steps": 1}, "gradient_accumulation_steps is 1 there and 8 in the recipe"),
        ({"train_micro_batch_size_per_gpu": 2}, "train_micro_batch_size_per_gpu is 2 there and 4 in the recipe"),
        ({"train_batch_size": 7}, "train_batch_size is 7 there and 64 in the recipe"),
        ({"gradient_clipping": 5}, "gradient_clipping is 5 there and 1.0 in the recipe"),
        ({"fp16": {"enabled": True}}, "fp16 is"),
        ({"optimizer": {"type": "AdamW"}}, "optimizer is set there"),
        ({"scheduler": {"type": "WarmupLR"}}, "scheduler is set there"),
        ({"amp": {"enabled": True}}, "amp is set there"),
        ({"bfloat16": {"enabled": False}}, "bfloat16 is set there"),
        ({"communication_data_type": "fp16"}, "communication_data_type is fp16 there and fp32 in the recipe"),
        ({"data_types": {"grad_accum_dtype": "bf16"}}, "data_types is"),
        ({"progressive_layer_drop": {"enabled": True}}, "progressive_layer_drop is set there"),
        ({"zero_optimization": {"stage": 2, "cpu_offload": True}}, "cpu_offload is set there"),
        ({"zero_optimization": {"stage": 2, "cpu_offload_param": True}}, "cpu_offload_param is set there"),
        ({"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "nvme"}}}, "offload_optimizer to nvme"),
        ({"zero_optimization": {"stage": 2, "offload_param": {"device": "cpu"}}}, "offload_param to cpu"),
        ({"zero_optimization": {"stage": 1, "offload_optimizer": {"device": "cpu"}}}, "to cpu at ZeRO stage 1"),
        ({"zero_optimization": {"stage": 2, "offload_optimizer": {"super_offload": True}}}, "super_offload is set"),
        ({"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu", "ratio": 0.3}}}, "ratio is set"),
        ({"zero_optimization": {"stage": 2, "offload_optimizer": "cpu"}}, "offload_optimizer is 'cpu', not a section"),
        ({"zero_optimization": {"stage": 3}}, r"zero_optimization\.stage is 3 there and train\.zero_stage is 2"),
    ],
)
def test_a_conflict_with_the_recipe_is_refused(tmp_path: Path, extra: dict[str, Any], complaint: str) -> None:
    path = tmp_path / "zero.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": 2}, **extra}))
    with pytest.raises(RecipeError, match=complaint):
        deepspeed_config(build(path), accumulation=8, world_size=2)


def test_auto_and_equal_values_are_no_conflict(tmp_path: Path) -> None:
    path = tmp_path / "zero.json"
    path.write_text(
        json.dumps(
            {
                "zero_optimization": {"stage": 2, "reduce_bucket_size": 10**6, "round_robin_gradients": True},
                "train_batch_size": "auto",
                "gradient_accumulation_steps": 8,
                "communication_data_type": "fp32",
                "wall_clock_breakdown": True,
            }
        )
    )
    assert deepspeed_config(build(path), accumulation=8, world_size=1)["train_batch_size"] == 32


def test_fp16_scales_the_loss_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    config = deepspeed_config(build(precision="fp16"), accumulation=8, world_size=2)
    assert config["bf16"] == {"enabled": False}
    assert (config["fp16"]["enabled"], config["fp16"]["loss_scale"]) == (True, 0)
    with pytest.raises(RecipeError, match=r"ZeRO-3 shards weights of one type only → set train\.zero_stage"):
        deepspeed_config(build(precision="fp16", zero_stage=3), accumulation=8, world_size=2)


def test_fp16_with_deepspeed_is_refused_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(RecipeError, match=r"DeepSpeed does not train on a CPU → set train\.zero_stage=0"):
        deepspeed_config(build(precision="fp16"), accumulation=8, world_size=2)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [("{", "is not JSON"), ("[]", "no zero_optimization section"), ("{}", "no zero_optimization")],
)
def test_an_invalid_or_missing_json_is_refused(tmp_path: Path, text: str, complaint: str) -> None:
    path = tmp_path / "zero.json"
    path.write_text(text)
    with pytest.raises(RecipeError, match=complaint):
        deepspeed_config(build(path), 8, 1)
    with pytest.raises(RecipeError, match="cannot be read"):
        deepspeed_config(build(tmp_path / "missing.json"), 8, 1)
