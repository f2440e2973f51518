"""The parts of a model: which is 4-bit, frozen or recomputed, and how many parameters train."""

from collections import Counter
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn

from kfood_dist.errors import ModelError
from kfood_dist.model.family import HEAD, LANGUAGE_MODEL, VISION_TOWER


def recompute_activations(module: Any) -> None:
    """Recompute a transformers model's activations in the backward pass instead of keeping them.

    Not re-entrant: that would need inputs which require gradients, and the hook for it in transformers 5 also reaches
    the frozen vision tower.
    """
    # transformers renamed the method during 5.x.
    enable = getattr(module, "activation_checkpointing_enable", None) or module.gradient_checkpointing_enable
    enable({"use_reentrant": False})
    module.disable_input_require_grads()  # it was enabled along, whether needed or not


def linear_types(model: nn.Module) -> dict[str, dict[str, int]]:
    """How many linear layers of which type each part has, adapters aside: {"model.visual": {"Linear": 5}, …}."""
    parts: dict[str, Counter[str]] = {LANGUAGE_MODEL: Counter(), VISION_TOWER: Counter(), HEAD: Counter()}
    for name, module in model.named_modules():
        for part, counts in parts.items():
            if name.startswith(part) and isinstance(module, nn.Linear) and ".lora_" not in name:
                counts[type(module).__name__] += 1
    return {part: dict(counts) for part, counts in parts.items()}


def require_quantized(model: nn.Module) -> None:
    """Raise ModelError unless exactly the language model's linear layers are 4-bit."""
    types = linear_types(model)
    inside = set(types[LANGUAGE_MODEL])
    outside = set(types[VISION_TOWER]) | set(types[HEAD])
    if inside != {"Linear4bit"} or "Linear4bit" in outside:
        raise ModelError(
            f"4-bit layers are not where they belong: {types}",
            "use the versions of launch/constraints.txt; a newer transformers may have renamed the model's parts",
        )


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """(trainable, total) parameters; a 4-bit weight counts as the numbers it stands for, not its packed bytes."""
    trainable = total = 0
    for parameter in model.parameters():
        state = getattr(parameter, "quant_state", None)
        numel = state.shape.numel() if state is not None else getattr(parameter, "ds_numel", parameter.numel())
        total += numel
        trainable += numel if parameter.requires_grad else 0
    return trainable, total


def freeze_forward(tower: Any) -> None:
    """Let the frozen tower keep nothing for the backward pass, and compute in float32 where its weights are float32.

    Under fp16 they are (`load_base`), since its activations outgrow fp16; autocast would compute in fp16 all the same.
    """
    forward = tower.forward

    def run(pixel_values: torch.Tensor, *args: Any, **options: Any) -> Any:
        with ExitStack() as stack:
            stack.enter_context(torch.no_grad())
            if pixel_values.dtype == torch.float32:
                stack.enter_context(torch.autocast(pixel_values.device.type, enabled=False))
            return forward(pixel_values, *args, **options)

    tower.forward = run
