"""What a run publishes, in peft's layout: LoRA, and all weights of the parts that train in full.

    attach_lora ──► train ──► adapter_weights ──► save_adapter ──► peft or the next run (load_adapter) loads it

The target is one anchored regular expression, not a list of suffixes. The vision tower's MLPs also have layers named
gate_proj, up_proj and down_proj, and suffixes would adapt them too, without a warning. A part that trains in full is
one of peft's `modules_to_save`. It trains in place, because peft would keep a second, frozen copy of it.
"""

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from kfood_dist.config.sections import Lora, Parts, Recipe
from kfood_dist.errors import ModelError, RecipeError
from kfood_dist.model.base import load_config
from kfood_dist.model.family import CONNECTOR, LANGUAGE_MODEL, TOWER, Family
from kfood_dist.system.words import plural

if TYPE_CHECKING:
    import torch
    from torch import nn

PROMPT_FILE = "kfood.json"
WEIGHTS_FILE = "adapter_model.safetensors"
_PREFIX = "base_model.model."  # in the names of an adapter's tensors, before the name in the base
_EXTRA_BASE_WEIGHTS = ("embed", "lm_head")  # weights of the base that peft may save with an adapter
_COPY = "copy the adapter's folder from its run again"


def target_pattern(family: Family, target_modules: tuple[str, ...]) -> str:
    """Return the regular expression for the language model's layers. peft matches it with complete module names."""
    names = "|".join(map(re.escape, target_modules))
    return rf"{re.escape(family.language_model)}\.layers\.\d+\.\w+\.({names})"


def require_parts_possible(family: Family, parts: Parts) -> None:
    """Raise RecipeError for parts that this family cannot train, or that do not go together.

    peft keeps either a full module or the LoRA in it, but not both.
    """
    if parts.tower.train != "frozen" and not family.tower_trains:
        raise RecipeError(
            f"parts.tower is {parts.tower.train}, but the last layers of a {family.title}'s tower get no gradient",
            "set parts.tower=frozen; the connector and the language model can train",
        )
    if parts.tower.train == "full" and parts.connector.train == "lora" and family.connector_is_inside:
        raise RecipeError(
            f"parts.tower is full and parts.connector is lora, but a {family.title}'s connector is inside its tower",
            "set parts.connector to full or frozen",
        )


def attach_lora(model: Any, family: Family, parts: Parts, lora: Lora) -> Any:
    """Wrap a frozen base in LoRA adapters for the parts with `lora`, and return the PeftModel.

    Raises ModelError if any layer of the language model lacks a target.
    """
    from peft import LoraConfig, get_peft_model
    from peft.utils.constants import DUMMY_TARGET_MODULES

    from kfood_dist.model.dropout import speed_up_dropout

    patterns = []
    if parts.language_model.train == "lora":
        patterns.append(target_pattern(family, lora.target_modules))
        _require_matches(model, family, patterns[0], lora.target_modules)
    for part in (CONNECTOR, TOWER):
        if getattr(parts, part).train == "lora":
            patterns += _linear_patterns(model, family, part)
    config = LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules="|".join(patterns) or DUMMY_TARGET_MODULES,
    )
    adapted = get_peft_model(model, config)
    speed_up_dropout(adapted)
    # Needed to load the adapter later. It is set only now, so that peft makes no copies.
    config.modules_to_save = family.paths_in_full(parts.parts_in_full()) or None
    return adapted


def _linear_patterns(model: "nn.Module", family: Family, part: str) -> list[str]:
    """Return an expression for each kind of linear layer of a part. Names that differ only in a number share one."""
    from torch import nn

    names = (name for name, module in model.named_modules() if isinstance(module, nn.Linear))
    own = (re.escape(name) for name in names if family.part_of(name) == part)
    return sorted({re.sub(r"(?<=\.)\d+(?=\\\.)", r"\\d+", name) for name in own})


def _require_matches(model: "nn.Module", family: Family, pattern: str, target_modules: tuple[str, ...]) -> None:
    found = sorted(name for name, _ in model.named_modules() if re.fullmatch(pattern, name))
    num_layers = len(model.get_submodule(family.language_model).layers)  # type: ignore[arg-type]
    missing = [t for t in target_modules if sum(n.endswith(f".{t}") for n in found) != num_layers]
    if missing:
        raise ModelError(
            f"lora.target_modules {missing} are not in each of the language model's {num_layers} layers",
            "name linear layers of the language model, such as q_proj or down_proj",
        )


def adapted_modules(model: "nn.Module") -> list[str]:
    """Return the names of the modules that have an adapter."""
    return [name for name, module in model.named_modules() if hasattr(module, "lora_A")]


def save_adapter(model: Any, folder: Path, facts: dict[str, Any], weights: dict[str, Any] | None = None) -> None:
    """Write the adapter in peft's layout, and `facts` (prompt, image size, …) beside it as kfood.json.

    `weights` is the result of `adapter_weights`. Under ZeRO-3, every rank must have called that function.
    """
    from safetensors.torch import save_file

    weights = adapter_weights(model) if weights is None else weights
    lora = {name: weight for name, weight in weights.items() if ".lora_" in name}
    # "auto" would ask the hub at every checkpoint whether the base's vocabulary has changed.
    model.save_pretrained(folder, state_dict=lora, save_embedding_layers=False)
    if len(lora) < len(weights):
        # Copies, because a head may share the embedding's weights, and the format cannot hold shared weights.
        all_of_it = {name: weight.detach().cpu().clone().contiguous() for name, weight in weights.items()}
        save_file(all_of_it, folder / WEIGHTS_FILE, {"format": "pt"})
    text = json.dumps(facts, ensure_ascii=False, indent=2) + "\n"
    (folder / PROMPT_FILE).write_text(text, encoding="utf-8", errors="backslashreplace")


def read_adapter_facts(folder: Path) -> dict[str, Any]:
    """Return the facts that `save_adapter` wrote beside an adapter; empty for an adapter of another program.

    Raises ModelError if the folder holds no adapter, or if its kfood.json cannot be read.
    """
    if not (folder / "adapter_config.json").is_file() or not (folder / WEIGHTS_FILE).is_file():
        raise ModelError(
            f"{folder} holds no adapter (adapter_config.json and adapter_model.safetensors)",
            "name the adapter folder of a finished run, such as runs/NAME/adapter",
        )
    path = folder / PROMPT_FILE
    try:
        facts = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{path} cannot be read ({error})", "copy the adapter's folder again") from None
    if not isinstance(facts, dict):
        raise ModelError(f"{path} is not a JSON object", "copy the adapter's folder again")
    return facts


def require_adapter(recipe: Recipe) -> None:
    """Raise ModelError if a recipe's adapter is missing, or if its parts or LoRA settings differ from the recipe's."""
    if recipe.model.adapter is not None:
        facts = read_adapter_facts(recipe.model.adapter)
        _require_same_parts(recipe.model.adapter, facts, recipe.parts)
        _require_same_form(recipe.model.adapter, recipe.lora, recipe.parts)


def _require_same_parts(folder: Path, facts: dict[str, Any], parts: Parts) -> None:
    own, found = parts.train_modes(), facts.get("parts", Parts().train_modes())
    if own != found:
        raise ModelError(
            f"model.adapter {folder} was trained with parts {found}, but the recipe has {own}",
            "set the adapter's parts in the recipe, or remove model.adapter",
        )


def _require_same_form(folder: Path, lora: Lora, parts: Parts) -> None:
    try:
        config = dict(json.loads((folder / "adapter_config.json").read_text(encoding="utf-8")))
        adapted = [name.partition(".lora_")[0] for name in _weight_names(folder) if ".lora_" in name]
        modules = sorted({name.rpartition(".")[2] for name in adapted if "language_model" in name})
    except (OSError, ValueError, TypeError, SafetensorError) as error:
        raise ModelError(f"adapter {folder} cannot be read ({error})", "copy it from its run again") from None
    own = {"r": lora.r, "lora_alpha": lora.alpha, "target_modules": sorted(lora.target_modules)}
    found = {"r": config.get("r"), "lora_alpha": config.get("lora_alpha"), "target_modules": modules}
    words = {"r": "lora.r", "lora_alpha": "lora.alpha", "target_modules": "lora.target_modules"}
    train_modes = parts.train_modes()
    counting = [
        key
        for key in own
        if "lora" in train_modes.values() and (key != "target_modules" or train_modes[LANGUAGE_MODEL] == "lora")
    ]
    differing = [
        f"{words[key]} is {own[key]}, the adapter's is {found[key]}" for key in counting if own[key] != found[key]
    ]
    if differing:
        raise ModelError(
            f"model.adapter {folder} does not match the recipe: {'; '.join(differing)}",
            "set the adapter's values in the recipe, or remove model.adapter",
        )


def _weight_names(folder: Path) -> list[str]:
    with safe_open(folder / WEIGHTS_FILE, framework="numpy") as file:
        return list(file.keys())


def load_adapter(model: Any, folder: Path) -> None:
    """Load a saved adapter's weights into a new PeftModel.

    Raises ModelError if they do not fit the model or are not finite.
    """
    from peft import set_peft_model_state_dict
    from safetensors.torch import load_file

    weights = load_file(folder / WEIGHTS_FILE)
    _require_finite(folder, weights)
    lora = {name: weight for name, weight in weights.items() if ".lora_" in name}
    whole = {name: weight for name, weight in weights.items() if ".lora_" not in name}
    expected = {name for name in _trained(model) if ".lora_" not in name}
    try:
        result = set_peft_model_state_dict(model, lora)
        faults = [f"the model has no {name}" for name in (*result.unexpected_keys, *sorted(whole.keys() - expected))]
        faults += [f"it lacks {name}" for name in result.missing_keys if ".lora_" in name]
        faults += [f"it lacks {name}" for name in sorted(expected - whole.keys())]
        if not faults:
            model.load_state_dict(whole, strict=False)
    except RuntimeError as error:  # a weight has another shape
        faults = [str(error).strip().splitlines()[-1].strip()]
    if faults:
        raise ModelError(
            f"adapter {folder} does not fit the base model ({'; '.join(faults[:3])})",
            "name the base that it was trained on as model.base, or copy the adapter from its run again",
        )


def adapter_weights(model: Any) -> dict[str, "torch.Tensor"]:
    """Return all trained weights by peft's names: LoRA, and parts in full.

    It is a collective under ZeRO-3, which shards them.
    """
    whole = _full_prefixes(model)
    named = [(name, p) for name, p in model.named_parameters() if hasattr(p, "ds_id")]
    sharded = [p for name, p in named if p.requires_grad or name.startswith(whole)]
    if not sharded:
        return _trained(model)
    import deepspeed

    with deepspeed.zero.GatheredParameters(sharded):
        return {name: weight.clone() for name, weight in _trained(model).items()}


def _full_prefixes(model: Any) -> tuple[str, ...]:
    """Return the prefixes of the names of all parameters in modules that train in full."""
    return tuple(f"{_PREFIX}{path}." for path in model.peft_config["default"].modules_to_save or ())


def _trained(model: Any) -> dict[str, "torch.Tensor"]:
    from peft import get_peft_model_state_dict

    # A module that trains in full comes with its frozen parts, and a tied head with its own name, as peft saves them.
    named, prefixes = model.named_parameters(remove_duplicate=False), _full_prefixes(model)
    whole = {name: weight.detach() for name, weight in named if name.startswith(prefixes) and ".lora_" not in name}
    return {**get_peft_model_state_dict(model, save_embedding_layers=False), **whole}


def require_adapter_fits(base: str, adapter: Path) -> None:
    """Raise ModelError unless an adapter has exactly the matrices of its config, and all fit layers of `base`.

    Also raises it for values that are not finite. Reads no weights of the base. peft itself only warns about missing
    matrices, and continues with a partly adapted model.
    """
    import torch
    from safetensors.torch import load_file
    from transformers import AutoModelForImageTextToText

    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(load_config(base))
    try:
        weights = load_file(adapter / WEIGHTS_FILE)
        json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, SafetensorError) as error:
        raise ModelError(f"adapter {adapter} is damaged ({error})", "copy it from its run again") from None
    shapes = {name: tuple(weight.shape) for name, weight in weights.items()}
    modules = dict(model.named_modules())
    for name, shape in shapes.items():
        path, _, part = name.removeprefix(_PREFIX).partition(".lora_")
        features = getattr(modules.get(path), "in_features" if part.startswith("A") else "out_features", None)
        if part and (features,) != (shape[1:2] if part.startswith("A") else shape[:1]):
            raise ModelError(
                f"adapter {adapter} does not fit base model {base}: {path} "
                + ("is not in it" if features is None else f"has {features} features, not {shape}"),
                "name the base model that the adapter was trained on",
            )
    require_adapter_matches_config(model, adapter, shapes)
    _require_finite(adapter, weights)


def _require_finite(adapter: Path, weights: "dict[str, torch.Tensor]") -> None:
    faulty = [name for name, weight in weights.items() if not weight.isfinite().all()]
    if faulty:
        raise ModelError(
            f"adapter {adapter} has values that are not finite in {plural(len(faulty), 'tensor')}, such as {faulty[0]}",
            "use the adapter of an earlier checkpoint, such as runs/NAME/checkpoints/step-00000100/adapter",
        )


def require_adapter_matches_config(model: Any, adapter: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    """Raise ModelError, with the names, unless `shapes` are those of the tensors that the adapter's config asks for.

    Weights of the base that peft saved with an adapter, such as embeddings, are allowed. `model` is a base on the meta
    device. This function adds the adapter's empty layers to it.
    """
    import torch
    from peft import PeftConfig, get_peft_model_state_dict, inject_adapter_in_model

    of_base = {_PREFIX + name for name in model.state_dict()}
    try:
        with torch.device("meta"):
            inject_adapter_in_model(PeftConfig.from_pretrained(str(adapter)), model)
    except (ValueError, TypeError, KeyError) as error:
        raise ModelError(f"{adapter}/adapter_config.json cannot be used ({error})", _COPY) from None
    expected = {_PREFIX + name: tuple(t.shape) for name, t in get_peft_model_state_dict(model).items()}
    found = {n: shape for n, shape in shapes.items() if n in expected or n.replace(".base_layer", "") not in of_base}
    unnamed = (n for n in shapes.keys() - found.keys() if not any(word in n for word in _EXTRA_BASE_WEIGHTS))
    faults = [f"it lacks {name}" for name in sorted(expected.keys() - found.keys())]
    faults += [f"its config does not name {name}" for name in sorted(unnamed)]
    faults += [f"its config does not have {name}" for name in sorted(found.keys() - expected.keys())]
    faults += [
        f"{name} is {found[name]}, not {expected[name]}"
        for name in sorted(found.keys() & expected.keys())
        if found[name] != expected[name]
    ]
    if faults:
        more = f"; and {len(faults) - 3} more faults" if len(faults) > 3 else ""
        raise ModelError(f"adapter {adapter} does not match its config: {'; '.join(faults[:3])}{more}", _COPY)
