"""The base model's folder, config, tokenizer and pictures: everything known before its weights are loaded.

`model.base` (folder or hub name) ──► require_base ──► load_config, load_tokenizer, load_vision_spec
"""

import math
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from kfood_dist.data.patches import VisionSpec
from kfood_dist.errors import ModelError

# Where the parts of a Qwen2.5-VL lie in transformers 5, as module paths from the model's root.
LANGUAGE_MODEL = "model.language_model"
VISION_TOWER = "model.visual"
HEAD = "lm_head"

HUB_TIMEOUT_S = 5.0


def require_base(base: str) -> None:
    """Raise ModelError, within seconds, unless `base` is a complete local folder or a reachable hub name."""
    folder = Path(base)
    if folder.is_dir():
        _require_files(folder)
    elif folder.is_absolute() or base.startswith((".", "~")) or base.count("/") != 1:
        raise ModelError(
            f"base model folder {folder} does not exist",
            "set model.base to a folder that holds config.json and *.safetensors, or to a hub name like owner/name",
        )
    else:
        _require_on_hub(base)


def _require_files(folder: Path) -> None:
    missing = [
        pattern
        for pattern in ("config.json", "*.safetensors", "tokenizer_config.json")
        if not any(folder.glob(pattern))
    ]
    if missing:
        raise ModelError(
            f"base model folder {folder} lacks {', '.join(missing)}",
            "download the whole model into it, or set model.base to another folder",
        )


def _require_on_hub(name: str) -> None:
    import huggingface_hub

    if isinstance(huggingface_hub.try_to_load_from_cache(name, "config.json"), str):
        return
    try:
        huggingface_hub.HfApi().model_info(name, timeout=HUB_TIMEOUT_S)
    except Exception as error:  # the hub client's errors have no common root; all mean: not to be had from here
        raise ModelError(
            f"base model '{name}' is neither a folder here, nor in the hub cache, nor reachable on the hub "
            f"({type(error).__name__})",
            f"check the name, or on a machine with access run `hf download {name} --local-dir DIR`, copy DIR here "
            "and set model.base=DIR",
        ) from None


def base_folder(base: str) -> Path | None:
    """Where the files of `base` lie on this machine: its folder, or that of the hub's cache; None if not here yet."""
    if os.path.isdir(base):
        return Path(base)
    import huggingface_hub

    try:
        cached = huggingface_hub.try_to_load_from_cache(base, "config.json")
    except ValueError:  # not a hub name; `require_base` says so
        return None
    return Path(cached).parent if isinstance(cached, str) else None


def fetched_folder(base: str) -> Path:
    """Where the files of `base` lie on this machine, its weights too; from the hub, they are downloaded first."""
    if os.path.isdir(base):
        return Path(base)
    import huggingface_hub

    return Path(huggingface_hub.snapshot_download(base, allow_patterns=["*.json", "*.safetensors"]))


def load_config(base: str) -> Any:
    """The transformers config of `base`."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(base)
    except (OSError, ValueError) as error:
        raise ModelError(
            f"the config of base model {base} cannot be read ({_first_line(error)})", _REDOWNLOAD
        ) from None
    if not hasattr(config, "vision_config") or not hasattr(config, "image_token_id"):
        raise ModelError(
            f"base model {base} is a {config.model_type}, which has no vision tower this trainer knows",
            "use a Qwen2.5-VL model",
        )
    return config


def load_tokenizer(base: str) -> Any:
    """The tokenizer of `base`, with its chat template."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(base)
    except (OSError, ValueError) as error:
        raise ModelError(f"the tokenizer of {base} cannot be read ({_first_line(error)})", _REDOWNLOAD) from None


def load_vision_spec(base: str, config: Any, image_size: int) -> VisionSpec:
    """How `base` wants square pictures of `image_size` pixels: geometry from its config, the rest from its processor.

    Reads the processor's settings, and the processor itself only where uint8 patches would not equal what it gives:
    several releases of transformers build it with torchvision only. Raises ModelError if either cannot be read,
    RecipeError if the size is no whole number of image tokens.
    """
    from transformers.image_processing_base import ImageProcessingMixin

    try:
        settings, _ = ImageProcessingMixin.get_image_processor_dict(base)
        mean, std = settings["image_mean"], settings["image_std"]
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"the image processor of {base} cannot be read ({_first_line(error)})", _REDOWNLOAD) from None
    vision = config.vision_config
    spec = VisionSpec(
        patch_size=vision.patch_size,
        merge_size=vision.spatial_merge_size,
        temporal_patch_size=vision.temporal_patch_size,
        mean=tuple(mean),
        std=tuple(std),
        image_token_id=config.image_token_id,
        vision_start_token_id=config.vision_start_token_id,
        vision_end_token_id=config.vision_end_token_id,
    )
    spec.require_fitting(image_size)
    if _is_patches_alone(settings, spec, image_size):
        return spec
    return replace(spec, own_processor=_load_processor(base))


def _is_patches_alone(settings: dict[str, Any], spec: VisionSpec, image_size: int) -> bool:
    """Whether a processor of these settings does no more to such a picture than cut, rescale and normalise it.

    Names and defaults are those of transformers' Qwen2VLImageProcessor; outside its limits it would resize.
    """
    size = settings.get("size") or {}
    fewest_pixels = settings.get("min_pixels") or size.get("shortest_edge") or 56 * 56
    most_pixels = settings.get("max_pixels") or size.get("longest_edge") or 28 * 28 * 1280
    geometry = {
        "patch_size": spec.patch_size,
        "merge_size": spec.merge_size,
        "temporal_patch_size": spec.temporal_patch_size,
    }
    return (
        str(settings.get("image_processor_type")).removesuffix("Fast") == "Qwen2VLImageProcessor"
        and all(settings.get(name, value) == value for name, value in geometry.items())
        and settings.get("do_rescale", True)
        and settings.get("do_normalize", True)
        and math.isclose(settings.get("rescale_factor", 1 / 255), 1 / 255)
        and (fewest_pixels <= image_size**2 <= most_pixels or not settings.get("do_resize", True))
    )


def _load_processor(base: str) -> Any:
    from transformers import AutoImageProcessor

    try:
        processor = AutoImageProcessor.from_pretrained(base)
    except (OSError, ValueError, ImportError) as error:
        raise ModelError(
            f"the image processor of {base} cannot be loaded ({_first_line(error)})",
            "install torchvision if it asks for it (pip install 'kfood_dist[gpu]'), or pack pictures of another size",
        ) from None
    if "image_grid_thw" not in processor.model_input_names:
        raise ModelError(
            f"the image processor of {base}, {type(processor).__name__}, gives no patches with their grid",
            "use a Qwen2.5-VL, or a model whose processor hands out image_grid_thw",
        )
    return processor


_REDOWNLOAD = "download the model again, or set model.base to another"


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
