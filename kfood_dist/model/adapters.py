"""LoRA on the language model alone: attach, count, save, start from a saved one, and whether a saved one fits.

The target is one anchored expression, not a list of suffixes: the vision tower's MLPs share the names gate_proj,
up_proj and down_proj and would be adapted too, silently.
"""

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from kfood_dist.config.recipe import Lora, Recipe
from kfood_dist.errors import ModelError
from kfood_dist.model.base import load_config
from kfood_dist.model.family import LANGUAGE_MODEL

if TYPE_CHECKING:
    import torch
    from torch import nn

PROMPT_FILE = "kfood.json"
_PREFIX = "base_model.model."  # of an adapter's tensors, before the names of the base's modules
_COPY = "copy the adapter's folder from its run again"


def target_pattern(target_modules: tuple[str, ...]) -> str:
    """The expression peft matches against whole module names."""
    names = "|".join(map(re.escape, target_modules))
    return rf"{re.escape(LANGUAGE_MODEL)}\.layers\.\d+\.\w+\.({names})"


def attach_lora(model: Any, lora: Lora) -> Any:
    """Wrap a frozen base in LoRA adapters; returns the PeftModel.

    Raises ModelError if a target is missing in any layer of the language model.
    """
    from peft import LoraConfig, get_peft_model

    pattern = target_pattern(lora.target_modules)
    _require_matches(model, pattern, lora.target_modules)
    config = LoraConfig(r=lora.r, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=pattern)
    return get_peft_model(model, config)


def _require_matches(model: "nn.Module", pattern: str, target_modules: tuple[str, ...]) -> None:
    found = sorted(name for name, _ in model.named_modules() if re.fullmatch(pattern, name))
    num_layers = len(model.get_submodule(LANGUAGE_MODEL).layers)  # type: ignore[arg-type]
    missing = [t for t in target_modules if sum(n.endswith(f".{t}") for n in found) != num_layers]
    if missing:
        raise ModelError(
            f"lora.target_modules {missing} are not in each of the language model's {num_layers} layers",
            "name linear layers of the language model, such as q_proj or down_proj",
        )


def adapted_modules(model: "nn.Module") -> list[str]:
    """Names of the modules that carry an adapter."""
    return [name for name, module in model.named_modules() if hasattr(module, "lora_A")]


def save_adapter(model: Any, folder: Path, facts: dict[str, Any], state: dict[str, Any] | None = None) -> None:
    """Write the adapter in PEFT's layout, with `facts` (prompt, image size, …) beside it as kfood.json."""
    # "auto" would ask the hub, at every checkpoint, whether the base's vocabulary has changed.
    model.save_pretrained(folder, state_dict=state, save_embedding_layers=False)
    text = json.dumps(facts, ensure_ascii=False, indent=2) + "\n"
    (folder / PROMPT_FILE).write_text(text, encoding="utf-8", errors="backslashreplace")


def read_adapter_facts(folder: Path) -> dict[str, Any]:
    """What `save_adapter` kept beside an adapter; empty for an adapter made elsewhere.

    Raises ModelError if the folder holds no adapter.
    """
    if not (folder / "adapter_config.json").is_file() or not (folder / "adapter_model.safetensors").is_file():
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
        read_adapter_facts(recipe.model.adapter)
        _require_same_form(recipe.model.adapter, recipe.lora)


def _require_same_form(folder: Path, lora: Lora) -> None:
    try:
        config = dict(json.loads((folder / "adapter_config.json").read_text(encoding="utf-8")))
        modules = sorted({name.partition(".lora_")[0].rpartition(".")[2] for name in _weight_names(folder)})
    except (OSError, ValueError, TypeError, SafetensorError) as error:
        raise ModelError(f"adapter {folder} cannot be read ({error})", "copy it from its run again") from None
    own = {"r": lora.r, "lora_alpha": lora.alpha, "target_modules": sorted(lora.target_modules)}
    found = {"r": config.get("r"), "lora_alpha": config.get("lora_alpha"), "target_modules": modules}
    words = {"r": "lora.r", "lora_alpha": "lora.alpha", "target_modules": "lora.target_modules"}
    differing = [f"{words[key]} is {own[key]}, its own {found[key]}" for key in own if own[key] != found[key]]
    if differing:
        raise ModelError(
            f"model.adapter {folder} is of another form: {'; '.join(differing)}",
            "give the recipe the adapter's own values, or leave model.adapter out",
        )


def _weight_names(folder: Path) -> list[str]:
    with safe_open(folder / "adapter_model.safetensors", framework="numpy") as file:
        return list(file.keys())


def load_adapter(model: Any, folder: Path) -> None:
    """Put a saved adapter's weights into a PeftModel's fresh ones. Raises ModelError if they are of another model."""
    from peft import set_peft_model_state_dict
    from safetensors.torch import load_file

    weights = load_file(folder / "adapter_model.safetensors")
    try:
        result = set_peft_model_state_dict(model, weights)
        faults = [f"the model knows no {name}" for name in result.unexpected_keys]
        faults += [f"it lacks {name}" for name in result.missing_keys if ".lora_" in name]
    except RuntimeError as error:  # another shape
        faults = [str(error).strip().splitlines()[-1].strip()]
    if faults:
        raise ModelError(
            f"adapter {folder} does not fit the base model ({'; '.join(faults[:3])})",
            "name the base that it was trained on as model.base, or copy the adapter from its run again",
        )


def adapter_weights(model: Any) -> dict[str, "torch.Tensor"]:
    """The adapter's whole weights by PEFT's names; under ZeRO-3, which shards them, a collective."""
    from peft import get_peft_model_state_dict

    sharded = [p for p in model.parameters() if p.requires_grad and hasattr(p, "ds_id")]
    if not sharded:
        return get_peft_model_state_dict(model, save_embedding_layers=False)
    import deepspeed

    with deepspeed.zero.GatheredParameters(sharded):
        return {
            name: weight.clone()
            for name, weight in get_peft_model_state_dict(model, save_embedding_layers=False).items()
        }


def require_adapter_fits(base: str, adapter: Path) -> None:
    """Raise ModelError unless an adapter has every matrix its config asks for, no other, and all fit layers of `base`.

    No weights are read. peft itself only warns of matrices that are missing, and goes on with a half-adapted model.
    """
    import torch
    from transformers import AutoModelForImageTextToText

    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(load_config(base))
    try:
        with safe_open(adapter / "adapter_model.safetensors", "np") as file:
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, SafetensorError) as error:
        raise ModelError(f"adapter {adapter} is damaged ({error})", "copy it from its run again") from None
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
    found = {name: shape for name, shape in shapes.items() if name.replace(".base_layer", "") not in of_base}
    faults = [f"it lacks {name}" for name in sorted(asked.keys() - found.keys())]
    faults += [f"its config knows no {name}" for name in sorted(found.keys() - asked.keys())]
    faults += [
        f"{name} is {found[name]}, not {asked[name]}"
        for name in sorted(found.keys() & asked.keys())
        if found[name] != asked[name]
    ]
    if faults:
        more = f"; and {len(faults) - 3} faults more" if len(faults) > 3 else ""
        raise ModelError(f"adapter {adapter} is not whole: {'; '.join(faults[:3])}{more}", _COPY)
