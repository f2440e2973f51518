"""How a base model takes pictures: from its config and its processor settings to `Pictures`.

family's `pictures` ──► patches   ──► Patches, or the processor itself if patches would differ from its output
                   └──► processor ──► Processed
"""

import math
from functools import partial
from typing import Any

import numpy as np

from kfood_dist.data.picture.patches import Patches, PatchSpec
from kfood_dist.data.picture.processed import Processed
from kfood_dist.data.picture.protocol import Pictures
from kfood_dist.errors import ModelError, first_line
from kfood_dist.model.base import REDOWNLOAD
from kfood_dist.model.family import Family, family_of
from kfood_dist.model.files import located


def load_pictures(base: str, config: Any, image_size: int) -> Pictures:
    """Return how `base` takes square pictures of `image_size` pixels.

    Raises ModelError if its processor or the processor's settings cannot be read. Raises RecipeError if pictures of
    this size do not fit the model.
    """
    family = family_of(config)
    return {"patches": _load_patches, "processor": _load_processed}[family.pictures](base, config, family, image_size)


def blank(image_size: int) -> np.ndarray:
    """Return a black square, RGB (size, size, 3) uint8."""
    return np.zeros((image_size, image_size, 3), dtype=np.uint8)


# The values of transformers' Qwen2VLImageProcessor for settings that are not given.
_CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
_CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
_PIXEL_LIMITS = {"shortest_edge": 56 * 56, "longest_edge": 28 * 28 * 1280}


def _load_patches(base: str, config: Any, family: Family, image_size: int) -> Pictures:
    """Take the geometry from the config, and the rest from the processor's settings.

    Loads the processor itself only if uint8 patches would differ from its output, because several releases of
    transformers can build it only with torchvision.
    """
    from transformers.image_processing_base import ImageProcessingMixin

    try:
        settings, _ = ImageProcessingMixin.get_image_processor_dict(located(base))
        spec = _read_spec(config, settings)
        alone = _is_patches_alone(settings, spec, image_size)
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise ModelError(f"the image processor of {base} cannot be read ({first_line(error)})", REDOWNLOAD) from None
    spec.require_fitting(image_size)
    if alone:
        return Patches(spec)
    processor = _load_image_processor(base, config if _is_qwen(settings) else None)
    if "image_grid_thw" not in processor.model_input_names:
        raise ModelError(
            f"the image processor of {base}, {type(processor).__name__}, does not return patches with their grid",
            f"use a {family.title}, or a model whose processor returns image_grid_thw",
        )
    expand = partial(_grid_ids, spec.image_token_id, spec.merge_size)
    token = spec.image_token_id
    return Processed(processor, expand, token, token, spec.kept, family.token_types, spec.layout)


def _grid_ids(image_token: int, merge_size: int, rgb: np.ndarray, facts: dict[str, np.ndarray]) -> np.ndarray:
    """Return one token for each square of `merge_size` × `merge_size` patches."""
    return np.full(int(facts["image_grid_thw"][0].prod()) // merge_size**2, image_token, dtype=np.int64)


def _load_processed(base: str, config: Any, family: Family, image_size: int) -> Pictures:
    """Use the model's own processor, which also returns the tokens that replace a placeholder."""
    from transformers import AutoProcessor

    try:
        processor = AutoProcessor.from_pretrained(located(base), trust_remote_code=False)
        token = int(config.image_token_id)
        expand = partial(_processor_ids, processor, token)
        pictures = Processed(processor.image_processor, expand, token, token, token_types=family.token_types)
        shown = pictures.encode(blank(image_size))
        num_tokens = int((shown.ids == token).sum())
        vision = config.vision_config
        expected = (vision.image_size // vision.patch_size) ** 2 + (config.vision_feature_select_strategy == "full")
    except Exception as error:  # settings of any form reach the library
        raise ModelError(f"the processor of {base} cannot be used ({first_line(error)})", REDOWNLOAD) from None
    side = shown.pixels.shape[-1]
    if (num_tokens, side) != (expected, vision.image_size):
        raise ModelError(
            f"the processor of {base} makes {num_tokens} tokens and {side} pixels per side of a picture, but the "
            f"model takes {expected} and {vision.image_size}",
            REDOWNLOAD,
        )
    return pictures


def _processor_ids(processor: Any, placeholder: int, rgb: np.ndarray, facts: dict[str, np.ndarray]) -> np.ndarray:
    """Return the tokens that the processor puts in place of one placeholder, given the picture."""
    text = processor.tokenizer.decode([placeholder])
    made = processor(text=[text], images=[rgb], add_special_tokens=False, input_data_format="channels_last")
    return np.asarray(made["input_ids"][0], dtype=np.int64)


def _read_spec(config: Any, settings: dict[str, Any]) -> PatchSpec:
    vision = config.vision_config
    return PatchSpec(
        patch_size=vision.patch_size,
        merge_size=vision.spatial_merge_size,
        temporal_patch_size=vision.temporal_patch_size,
        mean=_by_colour(settings.get("image_mean", _CLIP_MEAN)),
        std=_by_colour(settings.get("image_std", _CLIP_STD)),
        image_token_id=config.image_token_id,
        vision_start_token_id=config.vision_start_token_id,
        vision_end_token_id=config.vision_end_token_id,
        window=getattr(vision, "window_size", 0) // vision.spatial_merge_size // vision.patch_size,
    )


def _by_colour(value: Any) -> tuple[float, ...]:
    """Return red, green and blue of a setting, which may be one number for all. Raises ValueError or TypeError."""
    red, green, blue = (value,) * 3 if isinstance(value, int | float) else value
    return float(red), float(green), float(blue)


def _is_qwen(settings: dict[str, Any]) -> bool:
    """Return whether settings are those of Qwen2VLImageProcessor, under any of the names that it has had.

    Qwen2_5_VLImageProcessor of transformers 4.49 does the same. Fast and Pil are its backends. Settings without a type
    count as the processor that belongs to the model's type, as in transformers.
    """
    named = settings.get("image_processor_type") or settings.get("feature_extractor_type") or "Qwen2VLImageProcessor"
    name = str(named).replace("FeatureExtractor", "ImageProcessor").removesuffix("Fast").removesuffix("Pil")
    return name in ("Qwen2VLImageProcessor", "Qwen2_5_VLImageProcessor")


def _is_patches_alone(settings: dict[str, Any], spec: PatchSpec, image_size: int) -> bool:
    """Return whether a processor with these settings only cuts, rescales and normalises such a picture.

    Names and defaults are those of transformers' Qwen2VLImageProcessor, which resizes pictures outside its limits.
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


def _load_image_processor(base: str, config: Any) -> Any:
    """Load transformers' own image processor. With a `config`, it is the one that belongs to that type of model."""
    from transformers import AutoImageProcessor

    try:
        processor = AutoImageProcessor.from_pretrained(located(base), config=config, trust_remote_code=False)
    except Exception as error:  # settings of any form reach the library
        raise ModelError(
            f"the image processor of {base} cannot be loaded ({first_line(error)})",
            "install torchvision if it asks for it (pip install 'kfood_dist[gpu]'), pack pictures of another size, or "
            "take the preprocessor_config.json of the model that this one was tuned from",
        ) from None
    return processor
