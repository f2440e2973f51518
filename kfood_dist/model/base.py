"""The base model's folder, config, tokenizer and pictures: everything known before its weights are loaded.

`model.base` (folder or hub name) ──► require_base ──► load_config, load_tokenizer, load_vision_spec
"""

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
    folder = Path(base).expanduser()
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


def load_vision_spec(base: str, config: Any) -> VisionSpec:
    """How `base` wants its pictures: patch geometry from its config, normalisation from its image processor.

    Reads the processor's settings, not the processor: several releases of transformers build it with torchvision only.
    """
    from transformers.image_processing_base import ImageProcessingMixin

    try:
        settings, _ = ImageProcessingMixin.get_image_processor_dict(base)
        mean, std = settings["image_mean"], settings["image_std"]
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"the image processor of {base} cannot be read ({_first_line(error)})", _REDOWNLOAD) from None
    vision = config.vision_config
    return VisionSpec(
        patch_size=vision.patch_size,
        merge_size=vision.spatial_merge_size,
        temporal_patch_size=vision.temporal_patch_size,
        mean=tuple(mean),
        std=tuple(std),
        image_token_id=config.image_token_id,
        vision_start_token_id=config.vision_start_token_id,
        vision_end_token_id=config.vision_end_token_id,
    )


_REDOWNLOAD = "download the model again, or set model.base to another"


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
