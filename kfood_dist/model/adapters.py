"""What a run hands out, in peft's layout: LoRA, and the whole weights of parts that train in full.

    attach ──► train ──► adapter_weights ──► save_adapter ──► peft loads it; a next run starts from it (load_adapter)

The target is one anchored expression, not a list of suffixes: the vision tower's MLPs share the names gate_proj,
up_proj and down_proj and would be adapted too, silently. A part that trains in full is one of peft's
`modules_to_save`, but trains in place: peft would keep a second, frozen copy of it.
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
_PREFIX = "base_model.model."  # of an adapter's tensors, before the names of the base's modules
_SAVED_ALONG = ("embed", "lm_head")  # weights of the base that peft may save along
_COPY = "copy the adapter's folder from its run again"


def target_pattern(family: Family, target_modules: tuple[str, ...]) -> str:
    """The expression that peft matches against whole module names, for the language model's layers."""
    names = "|".join(map(re.escape, target_modules))
    return rf"{re.escape(family.language_model)}\.layers\.\d+\.\w+\.({names})"


def require_parts_possible(family: Family, parts: Parts) -> None:
    """Raise RecipeError for parts that this family cannot train, or that do not go together.

    peft keeps a module whole or LoRA in it, not both.
    """
    if parts.tower.train != "frozen" and not family.tower_trains:
        raise RecipeError(
            f"parts.tower is {parts.tower.train}, and the last layers of a {family.title}'s tower get no gradient",
            "set parts.tower=frozen; its connector and language model train",
        )
    if parts.tower.train == "full" and parts.connector.train == "lora" and family.connector_is_inside:
        raise RecipeError(
            f"parts.tower is full and parts.connector lora, and a {family.title}'s connector lies in its tower",
            "set parts.connector to full or frozen",
        )


def attach_lora(model: Any, family: Family, parts: Parts, lora: Lora) -> Any:
    """Wrap a frozen base in LoRA adapters where `parts` say so; returns the PeftModel.

    Raises ModelError if a target is missing in any layer of the language model.
    """
    from peft import LoraConfig, get_peft_model
    from peft.utils.constants import DUMMY_TARGET_MODULES

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
    # For those who load the adapter; set now, it makes no copies.
    config.modules_to_save = family.whole_paths(parts.trained_whole()) or None
    return adapted


def _linear_patterns(model: "nn.Module", family: Family, part: str) -> list[str]:
    """An expression for each kind of linear layer of a part; layers that differ in their number alone share one."""
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
    """Names of the modules that carry an adapter."""
    return [name for name, module in model.named_modules() if hasattr(module, "lora_A")]


def save_adapter(model: Any, folder: Path, facts: dict[str, Any], weights: dict[str, Any] | None = None) -> None:
    """Write the adapter in PEFT's layout, with `facts` (prompt, image size, …) beside it as kfood.json.

    `weights` are those of `adapter_weights`, which every rank must have asked for under ZeRO-3.
    """
    from safetensors.torch import save_file

    weights = adapter_weights(model) if weights is None else weights
    lora = {name: weight for name, weight in weights.items() if ".lora_" in name}
    # "auto" would ask the hub, at every checkpoint, whether the base's vocabulary has changed.
    model.save_pretrained(folder, state_dict=lora, save_embedding_layers=False)
    if len(lora) < len(weights):
        # Copies, since a head may share the embedding's weights, and the format shares nothing.
        all_of_it = {name: weight.detach().cpu().clone().contiguous() for name, weight in weights.items()}
        save_file(all_of_it, folder / WEIGHTS_FILE, {"format": "pt"})
    text = json.dumps(facts, ensure_ascii=False, indent=2) + "\n"
    (folder / PROMPT_FILE).write_text(text, encoding="utf-8", errors="backslashreplace")


def read_adapter_facts(folder: Path) -> dict[str, Any]:
    """What `save_adapter` kept beside an adapter; empty for an adapter made elsewhere.

    Raises ModelError if the folder holds no adapter.
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
    """Raise ModelError if the adapter a recipe starts from is missing, or of another form than the recipe's own."""
    if recipe.model.adapter is not None:
        facts = read_adapter_facts(recipe.model.adapter)
        _require_same_parts(recipe.model.adapter, facts, recipe.parts)
        _require_same_form(recipe.model.adapter, recipe.lora, recipe.parts)


def _require_same_parts(folder: Path, facts: dict[str, Any], parts: Parts) -> None:
    own, found = parts.ways(), facts.get("parts", Parts().ways())
    if own != found:
        raise ModelError(
            f"model.adapter {folder} was trained with parts {found}, and the recipe says {own}",
            "give the recipe the adapter's own parts, or leave model.adapter out",
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
    ways = parts.ways()
    counting = [
        key for key in own if "lora" in ways.values() and (key != "target_modules" or ways[LANGUAGE_MODEL] == "lora")
    ]
    differing = [f"{words[key]} is {own[key]}, its own {found[key]}" for key in counting if own[key] != found[key]]
    if differing:
        raise ModelError(
            f"model.adapter {folder} is of another form: {'; '.join(differing)}",
            "give the recipe the adapter's own values, or leave model.adapter out",
        )


def _weight_names(folder: Path) -> list[str]:
    with safe_open(folder / WEIGHTS_FILE, framework="numpy") as file:
        return list(file.keys())


def load_adapter(model: Any, folder: Path) -> None:
    """Put a saved adapter's weights into a PeftModel's fresh ones.

    Raises ModelError if they do not fit the model or are not finite.
    """
    from peft import set_peft_model_state_dict
    from safetensors.torch import load_file

    weights = load_file(folder / WEIGHTS_FILE)
    _require_finite(folder, weights)
    lora = {name: weight for name, weight in weights.items() if ".lora_" in name}
    whole = {name: weight for name, weight in weights.items() if ".lora_" not in name}
    asked = {name for name in _trained(model) if ".lora_" not in name}
    try:
        result = set_peft_model_state_dict(model, lora)
        faults = [f"the model knows no {name}" for name in (*result.unexpected_keys, *sorted(whole.keys() - asked))]
        faults += [f"it lacks {name}" for name in result.missing_keys if ".lora_" in name]
        faults += [f"it lacks {name}" for name in sorted(asked - whole.keys())]
        if not faults:
            model.load_state_dict(whole, strict=False)
    except RuntimeError as error:  # another shape
        faults = [str(error).strip().splitlines()[-1].strip()]
    if faults:
        raise ModelError(
            f"adapter {folder} does not fit the base model ({'; '.join(faults[:3])})",
            "name the base that it was trained on as model.base, or copy the adapter from its run again",
        )


def adapter_weights(model: Any) -> dict[str, "torch.Tensor"]:
    """All that is trained, by PEFT's names: LoRA, and parts in full. Under ZeRO-3, which shards it, a collective."""
    whole = _whole_prefixes(model)
    named = [(name, p) for name, p in model.named_parameters() if hasattr(p, "ds_id")]
    sharded = [p for name, p in named if p.requires_grad or name.startswith(whole)]
    if not sharded:
        return _trained(model)
    import deepspeed

    with deepspeed.zero.GatheredParameters(sharded):
        return {name: weight.clone() for name, weight in _trained(model).items()}


def _whole_prefixes(model: Any) -> tuple[str, ...]:
    """What the names of all parameters begin with that lie in modules which train in full."""
    return tuple(f"{_PREFIX}{path}." for path in model.peft_config["default"].modules_to_save or ())


def _trained(model: Any) -> dict[str, "torch.Tensor"]:
    from peft import get_peft_model_state_dict

    # All of such a module, frozen parts of it too, and a tied head by its own name: as peft would have it.
    named, prefixes = model.named_parameters(remove_duplicate=False), _whole_prefixes(model)
    whole = {name: weight.detach() for name, weight in named if name.startswith(prefixes) and ".lora_" not in name}
    return {**get_peft_model_state_dict(model, save_embedding_layers=False), **whole}


def require_adapter_fits(base: str, adapter: Path) -> None:
    """Raise ModelError unless an adapter has every matrix its config asks for, no other, and all fit layers of `base`.

    Also raises it for values that are not finite. The base's weights are not read. peft itself only warns of missing
    matrices, and continues with a half-adapted model.
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
    require_whole_adapter(model, adapter, shapes)
    _require_finite(adapter, weights)


def _require_finite(adapter: Path, weights: "dict[str, torch.Tensor]") -> None:
    faulty = [name for name, weight in weights.items() if not weight.isfinite().all()]
    if faulty:
        raise ModelError(
            f"adapter {adapter} has values that are not finite in {plural(len(faulty), 'tensor')}, such as {faulty[0]}",
            "use the adapter of an earlier checkpoint, such as runs/NAME/checkpoints/step-00000100/adapter",
        )


def require_whole_adapter(model: Any, adapter: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    """Raise ModelError, with the names, unless `shapes` are those of the tensors that the adapter's config asks for.

    Weights of the base that peft saved along with an adapter, such as embeddings, may be there too. `model`, a base on
    the meta device, gets the adapter's empty layers.
    """
    import torch
    from peft import PeftConfig, get_peft_model_state_dict, inject_adapter_in_model

    of_base = {_PREFIX + name for name in model.state_dict()}
    try:
        with torch.device("meta"):
            inject_adapter_in_model(PeftConfig.from_pretrained(str(adapter)), model)
    except (ValueError, TypeError, KeyError) as error:
        raise ModelError(f"{adapter}/adapter_config.json cannot be used ({error})", _COPY) from None
    asked = {_PREFIX + name: tuple(t.shape) for name, t in get_peft_model_state_dict(model).items()}
    found = {n: shape for n, shape in shapes.items() if n in asked or n.replace(".base_layer", "") not in of_base}
    unnamed = (n for n in shapes.keys() - found.keys() if not any(word in n for word in _SAVED_ALONG))
    faults = [f"it lacks {name}" for name in sorted(asked.keys() - found.keys())]
    faults += [f"its config names no {name}" for name in sorted(unnamed)]
    faults += [f"its config knows no {name}" for name in sorted(found.keys() - asked.keys())]
    faults += [
        f"{name} is {found[name]}, not {asked[name]}"
        for name in sorted(found.keys() & asked.keys())
        if found[name] != asked[name]
    ]
    if faults:
        more = f"; and {len(faults) - 3} faults more" if len(faults) > 3 else ""
        raise ModelError(f"adapter {adapter} is not whole: {'; '.join(faults[:3])}{more}", _COPY)
