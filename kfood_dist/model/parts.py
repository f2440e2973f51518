"""The parts of a model: which ones train and how, which are 4-bit, frozen or recomputed, and what the optimiser gets.

recipe's `parts` ──► apply_parts ──► LoRA in parts with `lora`, all weights of parts with `full`, the rest frozen
                └──► parameter_groups ──► one group for each learning rate
"""

from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from kfood_dist.config.sections import Lora, Parts
from kfood_dist.errors import ModelError
from kfood_dist.model.adapters import attach_lora
from kfood_dist.model.family import HEAD, LANGUAGE_MODEL, Family, family_of

_NEWER = "use the versions of launch/constraints.txt; a newer transformers may have renamed the model's parts"


def apply_parts(base: Any, parts: Parts, lora: Lora) -> Any:
    """Let the parts of a frozen base train as a recipe's `parts` say, and return the PeftModel.

    Raises ModelError if a layer lacks a target of LoRA, or if a linear layer belongs to no part.
    """
    family = family_of(base.config)
    linear_types(base, family)
    model = attach_lora(base, family, parts, lora)
    whole = set(parts.parts_in_full())
    for name, parameter in base.named_parameters():
        part = family.part_of(name)
        if (LANGUAGE_MODEL if part == HEAD else part) in whole and ".lora_" not in name:
            _train_in_full(parameter)
    if parts.tower.train == "frozen":
        for module in _frozen_before_trained(base, family, parts.connector.train != "frozen"):
            freeze_forward(module)
    return model


def _train_in_full(parameter: nn.Parameter) -> None:
    """Let a parameter train in float32, like its master weights. ZeRO-3 holds it in parts, and casts by itself."""
    if not hasattr(parameter, "ds_id"):
        parameter.data = parameter.data.float()
    parameter.requires_grad_(True)


def _frozen_before_trained(base: nn.Module, family: Family, connector_trains: bool) -> Iterator[nn.Module]:
    """Yield the largest modules of a frozen tower and its connector that have nothing trained before or inside them."""
    tower, connector = base.get_submodule(family.tower), base.get_submodule(family.connector)
    if not connector_trains:
        yield tower
        if not family.connector_is_inside:
            yield connector
    elif family.connector_is_inside:
        yield from _beside(tower, connector)
    else:
        yield tower


def _beside(module: nn.Module, inner: nn.Module) -> Iterator[nn.Module]:
    """Yield the largest modules with parameters that make up `module` without `inner`, which is inside it."""
    for child in module.children():
        if any(descendant is inner for descendant in child.modules()):
            yield from _beside(child, inner) if child is not inner else ()
        elif isinstance(child, nn.ModuleList):  # a ModuleList has no forward
            yield from child
        elif next(child.parameters(), None) is not None:
            yield child


def parameter_groups(module: nn.Module, family: Family, parts: Parts, learning_rate: float) -> list[dict[str, Any]]:
    """Return the optimiser's groups, each with `name`, `lr` and `params`.

    One group, named "", has all parts that train at the recipe's learning rate. Each part with its own learning rate
    has a group with the part's name.
    """
    groups: dict[str, dict[str, Any]] = {}
    for path, parameter in module.named_parameters():
        if parameter.requires_grad:
            part = family.part_of(path.partition("base_model.model.")[2])
            part = LANGUAGE_MODEL if part in (HEAD, None) else part
            own = getattr(parts, part).learning_rate
            name = "" if own is None else part
            group = groups.setdefault(name, {"name": name, "lr": own or learning_rate, "params": []})
            group["params"].append(parameter)
    return list(groups.values())


def recompute_activations(module: Any) -> None:
    """Recompute a transformers model's activations in the backward pass instead of keeping them.

    It is not re-entrant. That would need inputs that require gradients, and transformers 5 sets the hook for them on
    the frozen vision tower too.
    """
    # transformers renamed the method during 5.x.
    enable = getattr(module, "activation_checkpointing_enable", None) or module.gradient_checkpointing_enable
    enable({"use_reentrant": False})
    module.disable_input_require_grads()  # the call above enabled it too, needed or not


def linear_types(model: nn.Module, family: Family) -> dict[str, dict[str, int]]:
    """Count the linear layers of each part by type, without adapters: {"tower": {"Linear": 5}, …}.

    Raises ModelError if a linear layer belongs to no part.
    """
    parts: dict[str, Counter[str]] = {part: Counter() for part in family.paths}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and ".lora_" not in name:
            part = family.part_of(name)
            if part is None:
                raise ModelError(f"{name} belongs to no known part of a {family.title}", _NEWER)
            parts[part][type(module).__name__] += 1
    return {part: dict(counts) for part, counts in parts.items()}


def require_quantized(model: nn.Module, family: Family) -> None:
    """Raise ModelError unless all linear layers of the language model, and no others, are 4-bit."""
    types = linear_types(model, family)
    inside = set(types.pop(LANGUAGE_MODEL))
    if inside != {"Linear4bit"} or any("Linear4bit" in counts for counts in types.values()):
        raise ModelError(
            f"4-bit layers are not where they belong: language_model {inside}, {types}",
            _NEWER,
        )


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """Return the (trainable, total) parameter counts. A 4-bit weight counts as its numbers, not as its packed bytes."""
    trainable = total = 0
    for parameter in model.parameters():
        state = getattr(parameter, "quant_state", None)
        numel = state.shape.numel() if state is not None else getattr(parameter, "ds_numel", parameter.numel())
        total += numel
        trainable += numel if parameter.requires_grad else 0
    return trainable, total


def freeze_forward(module: Any) -> None:
    """Let a frozen module keep nothing for the backward pass."""
    module.forward = torch.no_grad()(module.forward)
