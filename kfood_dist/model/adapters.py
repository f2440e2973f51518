"""LoRA on the language model alone: attach, count, save.

The target is one anchored expression, not a list of suffixes: the vision tower's MLPs share the names gate_proj,
up_proj and down_proj and would be adapted too, silently.
"""

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kfood_dist.config import Lora
from kfood_dist.errors import ModelError
from kfood_dist.model.base import LANGUAGE_MODEL

if TYPE_CHECKING:
    from torch import nn

PROMPT_FILE = "kfood.json"


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
    (folder / PROMPT_FILE).write_text(json.dumps(facts, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")


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
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
