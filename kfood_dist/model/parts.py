"""The parts of a model: which is trained and how, which is 4-bit, frozen or recomputed, and what the optimiser gets.

recipe's `parts` ──► apply_parts ──► LoRA where it is asked for, whole weights where `full`, the rest frozen
                └──► parameter_groups ──► one group for each learning rate
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn

from kfood_dist.config.sections import Lora, Parts
from kfood_dist.errors import ModelError
from kfood_dist.model.adapters import attach_lora
from kfood_dist.model.family import HEAD, LANGUAGE_MODEL, Family, family_of

_NEWER = "use the versions of launch/constraints.txt; a newer transformers may have renamed the model's parts"


def apply_parts(base: Any, parts: Parts, lora: Lora) -> Any:
    """Make of a frozen base what a recipe's `parts` ask for; returns the PeftModel.

    Raises ModelError if a target of LoRA is not where it is asked for, or a linear layer belongs to no part.
    """
    family = family_of(base.config)
    linear_types(base, family)
    model = attach_lora(base, family, parts, lora)
    whole = set(parts.trained_whole())
    for name, parameter in base.named_parameters():
        part = family.part_of(name)
        if (LANGUAGE_MODEL if part == HEAD else part) in whole and ".lora_" not in name:
            _train_whole(parameter)
    if parts.tower.train == "frozen":
        for module in _before_what_trains(base, family, parts.connector.train != "frozen"):
            freeze_forward(module)
    return model


def _train_whole(parameter: nn.Parameter) -> None:
    """Let a parameter train, in float32 as its master weights are; ZeRO-3, which holds it in parts, casts by itself."""
    if not hasattr(parameter, "ds_id"):
        parameter.data = parameter.data.float()
    parameter.requires_grad_(True)


def _before_what_trains(base: nn.Module, family: Family, connector_trains: bool) -> Iterator[nn.Module]:
    """The largest modules of a frozen tower, and of its connector, that nothing trained lies before or inside."""
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
    """The largest modules with parameters that make up `module` without `inner`, which lies in it."""
    for child in module.children():
        if any(descendant is inner for descendant in child.modules()):
            yield from _beside(child, inner) if child is not inner else ()
        elif isinstance(child, nn.ModuleList):  # which has no forward of its own
            yield from child
        elif next(child.parameters(), None) is not None:
            yield child


def parameter_groups(module: nn.Module, family: Family, parts: Parts, learning_rate: float) -> list[dict[str, Any]]:
    """The optimiser's groups: `name`, `lr` and `params`; one for all parts that train at the recipe's learning rate.

    `name` is "" there, else the part's.
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

    Not re-entrant: that would need inputs which require gradients, and the hook for it in transformers 5 also reaches
    the frozen vision tower.
    """
    # transformers renamed the method during 5.x.
    enable = getattr(module, "activation_checkpointing_enable", None) or module.gradient_checkpointing_enable
    enable({"use_reentrant": False})
    module.disable_input_require_grads()  # it was enabled along, whether needed or not


def linear_types(model: nn.Module, family: Family) -> dict[str, dict[str, int]]:
    """How many linear layers of which type each part has, adapters aside: {"tower": {"Linear": 5}, …}.

    Raises ModelError for a linear layer that no part claims.
    """
    parts: dict[str, Counter[str]] = {part: Counter() for part in family.paths}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and ".lora_" not in name:
            part = family.part_of(name)
            if part is None:
                raise ModelError(f"{name} belongs to no part of a {family.title} that is known here", _NEWER)
            parts[part][type(module).__name__] += 1
    return {part: dict(counts) for part, counts in parts.items()}


def require_quantized(model: nn.Module, family: Family) -> None:
    """Raise ModelError unless exactly the language model's linear layers are 4-bit."""
    types = linear_types(model, family)
    inside = set(types.pop(LANGUAGE_MODEL))
    if inside != {"Linear4bit"} or any("Linear4bit" in counts for counts in types.values()):
        raise ModelError(
            f"4-bit layers are not where they belong: language_model {inside}, {types}",
            _NEWER,
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


def freeze_forward(module: Any) -> None:
    """Let a frozen module keep nothing for the backward pass, and compute in float32 where its weights are float32.

    Under fp16 they are (`load_base`), since a tower's activations outgrow fp16; autocast would compute in fp16 all
    the same.
    """
    forward = module.forward

    def run(features: torch.Tensor, *args: Any, **options: Any) -> Any:
        with ExitStack() as stack:
            stack.enter_context(torch.no_grad())
            if features.dtype == torch.float32:
                stack.enter_context(torch.autocast(features.device.type, enabled=False))
            return forward(features, *args, **options)

    module.forward = run
