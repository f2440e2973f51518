"""Do the pictures, the prompt, the base and the adapter fit each other? Told before any weights are loaded.

settings + manifest ──► require_same_pictures
settings + base + adapter ──► build_template ──► Template, ready to encode
"""

import json
from pathlib import Path
from typing import Any

from kfood_dist.data.batch.template import Template
from kfood_dist.data.shards.manifest import Manifest
from kfood_dist.errors import ModelError, RecipeError
from kfood_dist.evaluate.settings import Settings
from kfood_dist.model import base as base_model
from kfood_dist.model.files import require_base


def require_same_pictures(settings: Settings, manifest: Manifest) -> None:
    """Raise RecipeError unless the packed pictures have the size, and were resized the way, the settings say."""
    if manifest.image_size != settings.image_size:
        raise RecipeError(
            f"the pictures in {manifest.where} are {manifest.image_size} pixels wide, those asked about "
            f"{settings.image_size}",
            f"name shards packed with --image-size {settings.image_size}; without an adapter, "
            f"--set data.image_size={manifest.image_size} does as well",
        )
    if settings.resize not in (None, manifest.resize):
        raise RecipeError(
            f"the pictures in {manifest.where} were resized by {manifest.resize!r}, the adapter's by "
            f"{settings.resize!r}",
            f"name shards packed with --resize {settings.resize}",
        )


def build_template(settings: Settings, base: str, adapter: Path | None) -> Template:
    """The prompt template of `base` under these settings.

    Raises ModelError if `base` is not there or not usable, or the adapter is not one of it; RecipeError if a picture
    of that size does not fit the model or the length.
    """
    require_base(base)
    template = base_model.build_template(base, settings)
    if adapter is not None:
        require_adapter_fits(base, adapter)
    return template


def require_adapter_fits(base: str, adapter: Path) -> None:
    """Raise ModelError unless an adapter has every matrix its config asks for, no other, and all fit layers of `base`.

    No weights are read. peft itself only warns of matrices that are missing, and goes on with a half-adapted model.
    """
    import torch
    from safetensors import SafetensorError, safe_open
    from transformers import AutoModelForImageTextToText

    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(base_model.load_config(base))
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


_PREFIX = "base_model.model."  # of an adapter's tensors, before the names of the base's modules
_COPY = "copy the adapter's folder from its run again"
