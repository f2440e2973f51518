"""The model's prompt and its pictures: everything known before weights are loaded, and whether it fits together.

base's config, tokenizer, processor settings ──► build_template ──► Template, ready to encode
manifest of packed pictures                  ──► require_same_pictures
"""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

from kfood_dist.data.batch.template import SampleTooLong, Template
from kfood_dist.data.picture.patches import VisionSpec, grid_of
from kfood_dist.data.shards.manifest import Manifest
from kfood_dist.errors import ModelError, RecipeError, first_line
from kfood_dist.model.adapters import require_adapter_fits
from kfood_dist.model.base import REDOWNLOAD, load_config
from kfood_dist.model.files import located


class Asked(Protocol):
    """What is asked of a model: a recipe's `data`, or an evaluation's settings."""

    @property
    def system(self) -> str: ...
    @property
    def prompt(self) -> str: ...
    @property
    def image_size(self) -> int: ...
    @property
    def max_length(self) -> int: ...


def require_same_pictures(manifest: Manifest, image_size: int, resize: str | None = None) -> None:
    """Raise RecipeError unless pictures were packed at the size, and resized the way, that the model is shown.

    `image_size` is in pixels; `resize` None takes any way.
    """
    if manifest.image_size != image_size:
        raise RecipeError(
            f"the pictures in {manifest.where} are {manifest.image_size} pixels wide, not {image_size}",
            f"name shards packed with --image-size {image_size}; without a trained adapter, "
            f"--set data.image_size={manifest.image_size} does as well",
        )
    if resize not in (None, manifest.resize):
        raise RecipeError(
            f"the pictures in {manifest.where} were resized by {manifest.resize!r}, the adapter's by {resize!r}",
            f"name shards packed with --resize {resize}",
        )


def build_template(base: str, asked: Asked, adapter: Path | None = None) -> Template:
    """The template of a base model, known to fit the picture size, the length and the adapter.

    Raises ModelError if the model's small files are not usable, or the adapter is not one of it; RecipeError if what
    is asked does not fit it.
    """
    vision = load_vision_spec(base, load_config(base), asked.image_size)
    template = Template(load_tokenizer(base), vision, asked.system, asked.prompt, asked.max_length)
    try:
        template.encode(grid_of(asked.image_size, vision), None)
    except SampleTooLong:
        raise RecipeError(
            f"data.max_length {asked.max_length} is too short for a picture of {asked.image_size} pixels",
            "raise data.max_length",
        ) from None
    if adapter is not None:
        require_adapter_fits(base, adapter)
    return template


def load_tokenizer(base: str) -> Any:
    """The tokenizer of `base`, with the chat template that its processor would use. Raises ModelError."""
    from transformers import AutoTokenizer

    where = located(base)
    try:
        tokenizer = AutoTokenizer.from_pretrained(where, trust_remote_code=False)
    except Exception as error:  # the tokenizers library raises bare Exceptions
        raise ModelError(f"the tokenizer of {base} cannot be read ({first_line(error)})", REDOWNLOAD) from None
    try:
        tokenizer.chat_template = _chat_template(where) or tokenizer.chat_template
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise ModelError(f"the chat template of {base} cannot be read ({first_line(error)})", REDOWNLOAD) from None
    return tokenizer


def _chat_template(where: str) -> Any:
    """The chat template that belongs to the processor, wherever it is kept; None if only the tokenizer has one.

    Of several templates it is the one named "default", or the only one.
    """
    from transformers.processing_utils import ProcessorMixin

    found = ProcessorMixin.get_processor_dict(where)[0].get("chat_template")
    if isinstance(found, dict) and "default" not in found and len(found) == 1:
        return next(iter(found.values()))
    return found


def load_vision_spec(base: str, config: Any, image_size: int) -> VisionSpec:
    """How `base` wants square pictures of `image_size` pixels: geometry from its config, the rest from its processor.

    Reads the processor's settings, and the processor itself only where uint8 patches would not equal what it gives:
    several releases of transformers build it with torchvision only. Raises ModelError if either cannot be read,
    RecipeError if the size is no whole number of image tokens.
    """
    from transformers.image_processing_base import ImageProcessingMixin

    try:
        settings, _ = ImageProcessingMixin.get_image_processor_dict(located(base))
        spec = _read_spec(config, settings)
        alone = _is_patches_alone(settings, spec, image_size)
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise ModelError(f"the image processor of {base} cannot be read ({first_line(error)})", REDOWNLOAD) from None
    spec.require_fitting(image_size)
    return spec if alone else replace(spec, own_processor=_load_processor(base, config if _is_qwen(settings) else None))


# What transformers' Qwen2VLImageProcessor takes for settings that are not written down.
_CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)


_CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


_PIXEL_LIMITS = {"shortest_edge": 56 * 56, "longest_edge": 28 * 28 * 1280}


def _read_spec(config: Any, settings: dict[str, Any]) -> VisionSpec:
    vision = config.vision_config
    return VisionSpec(
        patch_size=vision.patch_size,
        merge_size=vision.spatial_merge_size,
        temporal_patch_size=vision.temporal_patch_size,
        mean=_by_colour(settings.get("image_mean", _CLIP_MEAN)),
        std=_by_colour(settings.get("image_std", _CLIP_STD)),
        image_token_id=config.image_token_id,
        vision_start_token_id=config.vision_start_token_id,
        vision_end_token_id=config.vision_end_token_id,
    )


def _by_colour(value: Any) -> tuple[float, ...]:
    """Red, green and blue of a setting, which may be one number for all. Raises ValueError or TypeError."""
    red, green, blue = (value,) * 3 if isinstance(value, int | float) else value
    return float(red), float(green), float(blue)


def _is_qwen(settings: dict[str, Any]) -> bool:
    """Whether settings are those of Qwen2VLImageProcessor, by any of the names that it has had.

    Qwen2_5_VLImageProcessor, of transformers 4.49, does the same. Fast and Pil are its backends. Settings without a
    type go by the model's, as transformers does.
    """
    named = settings.get("image_processor_type") or settings.get("feature_extractor_type") or "Qwen2VLImageProcessor"
    name = str(named).replace("FeatureExtractor", "ImageProcessor").removesuffix("Fast").removesuffix("Pil")
    return name in ("Qwen2VLImageProcessor", "Qwen2_5_VLImageProcessor")


def _is_patches_alone(settings: dict[str, Any], spec: VisionSpec, image_size: int) -> bool:
    """Whether a processor of these settings does no more to such a picture than cut, rescale and normalise it.

    Names and defaults are those of transformers' Qwen2VLImageProcessor; outside its limits it would resize.
    """
    size: dict[str, Any] = settings.get("size") or _PIXEL_LIMITS
    fewest_pixels: float = settings.get("min_pixels") or size.get("shortest_edge", math.inf)
    most_pixels: float = settings.get("max_pixels") or size.get("longest_edge", 0)
    geometry = {
        "patch_size": spec.patch_size,
        "merge_size": spec.merge_size,
        "temporal_patch_size": spec.temporal_patch_size,
    }
    return (
        _is_qwen(settings)
        and all(settings.get(name, value) == value for name, value in geometry.items())
        and settings.get("do_rescale", True)
        and settings.get("do_normalize", True)
        and math.isclose(settings.get("rescale_factor", 1 / 255), 1 / 255)
        and (fewest_pixels <= image_size**2 <= most_pixels or not settings.get("do_resize", True))
    )


def _load_processor(base: str, config: Any) -> Any:
    """transformers' own image processor; with a `config`, the one that belongs to its type of model."""
    from transformers import AutoImageProcessor

    try:
        processor = AutoImageProcessor.from_pretrained(located(base), config=config, trust_remote_code=False)
    except Exception as error:  # settings of any form reach the library
        raise ModelError(
            f"the image processor of {base} cannot be loaded ({first_line(error)})",
            "install torchvision if it asks for it (pip install 'kfood_dist[gpu]'), pack pictures of another size, or "
            "take the preprocessor_config.json of the model that this one was tuned from",
        ) from None
    if "image_grid_thw" not in processor.model_input_names:
        raise ModelError(
            f"the image processor of {base}, {type(processor).__name__}, gives no patches with their grid",
            "use a Qwen2.5-VL, or a model whose processor hands out image_grid_thw",
        )
    return processor
