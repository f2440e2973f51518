"""Pictures as the vision tower's patches, in uint8: one reshape on the worker, the arithmetic on the device.

    RGB (H, W, 3) uint8 ──► patchify ──► patches (num_patches, p·p·3) uint8, grid (1, H/p, W/p)
                       └──► the model's own image processor, where patches would not equal it ──► float32 pixel values

Normalisation and the repeat in time happen later (`model.loss.normalise_patches`), so a picture crosses to the
device as one byte per value instead of eight.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from kfood_dist.errors import RecipeError


@dataclass(frozen=True)
class VisionSpec:
    """What a base model's config and image processor say about pictures.

    `own_processor` is transformers' image processor where uint8 patches would not equal what it gives, else None.
    """

    patch_size: int
    merge_size: int
    temporal_patch_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    image_token_id: int
    vision_start_token_id: int
    vision_end_token_id: int
    own_processor: Any = None

    @property
    def unit(self) -> int:
        """Pixels that one image token spans on each side."""
        return self.patch_size * self.merge_size

    def require_fitting(self, image_size: int) -> None:
        """Raise RecipeError unless a square picture of this side is a whole number of image tokens."""
        if image_size % self.unit:
            below = image_size // self.unit * self.unit
            raise RecipeError(
                f"data.image_size {image_size} is not a multiple of the model's {self.unit} pixels per image token",
                f"pack with --image-size {below + self.unit}" + (f" or {below}" if below else ""),
            )


def patchify(
    rgb: np.ndarray, spec: VisionSpec, out: np.ndarray | None = None
) -> tuple[np.ndarray, tuple[int, int, int]]:
    """Cut RGB (H, W, 3) uint8 into patches (num_patches, p·p·3) uint8 and their grid (time, height, width).

    Patches that merge into one token lie together: (H/pm, W/pm, m, m, p, p, channel), the order of transformers'
    Qwen2VLImageProcessor. The channels stay innermost, so that whole rows of a patch are copied, in a sixth of the
    time; the device puts them in front. The patches are written to `out` if it is given and of their shape.
    """
    p, m = spec.patch_size, spec.merge_size
    rows, columns = rgb.shape[0] // p, rgb.shape[1] // p
    shape = (rows * columns, p * p * 3)
    patches = out if out is not None and out.shape == shape else np.empty(shape, dtype=np.uint8)
    line = np.dtype((np.void, p * 3))  # a row of a patch: moved as one piece
    lines = np.ascontiguousarray(rgb).reshape(-1).view(line).reshape(rows // m, m, p, columns // m, m)
    into = patches.reshape(-1).view(line).reshape(rows // m, columns // m, m, m, p)
    into[...] = lines.transpose(0, 3, 1, 4, 2)
    return patches, (1, rows, columns)


def encode_picture(
    rgb: np.ndarray, spec: VisionSpec, out: np.ndarray | None = None
) -> tuple[np.ndarray, tuple[int, int, int]]:
    """RGB (H, W, 3) uint8 as `patchify` gives it; or, of a model's own processor, pixel values (n, 3·T·p·p) float32."""
    if spec.own_processor is None:
        return patchify(rgb, spec, out)
    # The channels' place is said, since a processor would have to guess it of a very small picture.
    made = spec.own_processor(images=[rgb], return_tensors="np", input_data_format="channels_last")
    time, rows, columns = (int(n) for n in made["image_grid_thw"][0])
    return np.asarray(made["pixel_values"], dtype=np.float32), (time, rows, columns)


def grid_of(image_size: int, spec: VisionSpec) -> tuple[int, int, int]:
    """The patch grid (time, height, width) of a square picture of this side in pixels."""
    return encode_picture(np.zeros((image_size, image_size, 3), dtype=np.uint8), spec)[1]
