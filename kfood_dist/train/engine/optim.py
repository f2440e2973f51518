"""The optimiser and its learning rate.

The learning rate is a pure function of the step. It is set before each update, so no scheduler state has to be saved.
"""

import math
from typing import Any

import torch

from kfood_dist.config.sections import Optim


def build_optimizer(groups: list[dict[str, Any]], optim: Optim) -> torch.optim.Optimizer:
    """Return AdamW over groups of parameters, each with its own `lr`.

    It is torch's AdamW, or that of bitsandbytes with 8-bit block-wise states (arXiv 2110.02861). It is never the paged
    variant, which breaks on resume (bitsandbytes #782, #1381).
    """
    options: dict[str, Any] = {
        "lr": optim.learning_rate,
        "betas": (optim.beta1, optim.beta2),
        "eps": optim.eps,
        "weight_decay": optim.weight_decay,
    }
    if optim.name == "adamw8bit":
        from bitsandbytes.optim import AdamW8bit

        return AdamW8bit(groups, **options)
    return torch.optim.AdamW(groups, **options)


def learning_rate_at(step: int, max_steps: int, optim: Optim, peak: float) -> float:
    """Return the learning rate of `step` (from 0) of `max_steps`: linear warm-up to `peak`, then decay to the floor."""
    warmup_steps = math.ceil(optim.warmup_ratio * max_steps)
    if step < warmup_steps:
        return peak * (step + 1) / (warmup_steps + 1)
    progress = (step - warmup_steps) / max(1, max_steps - warmup_steps)
    decay = {
        "cosine": 0.5 * (1 + math.cos(math.pi * progress)),
        "linear": 1 - progress,
        "constant": 1.0,
    }[optim.schedule]
    floor = optim.min_learning_rate_ratio
    return peak * (floor + (1 - floor) * decay)


def state_dtypes(optimizer: torch.optim.Optimizer) -> list[str]:
    """Return the dtypes of an optimiser's current moment tensors, as sorted names. Empty before the first step."""
    moments = ("state1", "state2", "exp_avg", "exp_avg_sq")
    dtypes = {
        str(value.dtype).removeprefix("torch.")
        for state in optimizer.state.values()
        for name, value in state.items()
        if name in moments and torch.is_tensor(value)
    }
    return sorted(dtypes)
