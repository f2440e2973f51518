"""The learning rate as a function of the step, and the optimiser that the recipe names."""

import bitsandbytes
import pytest
import torch

from kfood_dist.config.sections import Optim
from kfood_dist.train.engine.optim import build_optimizer, learning_rate_at, state_dtypes


def curve(**options) -> list[float]:
    optim = Optim(learning_rate=1.0, **options)
    return [learning_rate_at(step, 100, optim, optim.learning_rate) for step in range(100)]


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_the_learning_rate_warms_up_then_decays_and_never_starts_at_zero(schedule: str) -> None:
    rates = curve(schedule=schedule, warmup_ratio=0.1)
    assert rates[0] == pytest.approx(1 / 11)
    assert rates[:10] == sorted(rates[:10])
    assert rates[10] == 1.0
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[-1] == 1.0 if schedule == "constant" else 0 < rates[-1] < 0.02


def test_the_decay_ends_at_its_floor() -> None:
    rates = curve(schedule="linear", warmup_ratio=0.0, min_learning_rate_ratio=0.5)
    assert rates[50] == pytest.approx(0.75)
    assert min(rates) > 0.5


def test_adamw8bit_keeps_uint8_moments_and_is_not_the_paged_one() -> None:
    weight = torch.nn.Parameter(torch.randn(64, 256))
    optimizer = build_optimizer([{"params": [weight]}], Optim())
    assert type(optimizer) is bitsandbytes.optim.AdamW8bit
    assert not optimizer.is_paged
    assert state_dtypes(optimizer) == []
    weight.grad = torch.randn_like(weight)
    optimizer.step()
    assert state_dtypes(optimizer) == ["uint8"]


def test_torch_adamw_keeps_float32_moments() -> None:
    weight = torch.nn.Parameter(torch.randn(8, 8))
    optimizer = build_optimizer([{"params": [weight]}], Optim(name="adamw", learning_rate=0.5, beta1=0.8))
    assert optimizer.defaults["lr"] == 0.5 and optimizer.defaults["betas"] == (0.8, 0.999)
    weight.grad = torch.randn_like(weight)
    optimizer.step()
    assert state_dtypes(optimizer) == ["float32"]


@pytest.mark.parametrize("name", ["adamw8bit", "adamw"])
def test_the_recipes_numbers_reach_the_optimiser(name: str) -> None:
    optim = Optim(name=name, learning_rate=0.5, beta1=0.8, beta2=0.7, eps=1e-3, weight_decay=0.25)
    defaults = build_optimizer([{"params": [torch.nn.Parameter(torch.ones(4))]}], optim).defaults
    found = [defaults[key] for key in ("lr", "betas", "eps", "weight_decay")]
    assert found == [0.5, (0.8, 0.7), 1e-3, 0.25]
