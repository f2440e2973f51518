"""Pictures as patches of the Qwen-VL vision tower, in uint8. A worker only reshapes them, the device computes.

    RGB (H, W, 3) uint8 ──► patchify ──► patches (num_patches, p·p·3) uint8, grid (1, H/p, W/p)

Normalisation and repetition in time happen on the device, so a picture is copied to it as one byte per value instead
of eight.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

from kfood_dist.data.picture.layout import QwenLayout
from kfood_dist.data.picture.protocol import Picture
from kfood_dist.errors import RecipeError

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class PatchSpec:
    """The settings for pictures from a base model's config and image processor."""

    patch_size: int
    merge_size: int
    temporal_patch_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    image_token_id: int
    vision_start_token_id: int
    vision_end_token_id: int
    window: int  # side of an attention window in tokens; 0: the tower has no windows

    @property
    def layout(self) -> QwenLayout:
        return QwenLayout(self.merge_size, self.window)

    @property
    def unit(self) -> int:
        """Pixels that one image token spans on each side."""
        return self.patch_size * self.merge_size

    @property
    def kept(self) -> frozenset[int]:
        """Tokens that truncation must not drop."""
        return frozenset({self.image_token_id, self.vision_start_token_id, self.vision_end_token_id})

    def require_fitting(self, image_size: int) -> None:
        """Raise RecipeError unless `image_size`, the side of a square picture in pixels, is a multiple of `unit`."""
        if image_size % self.unit:
            below = image_size // self.unit * self.unit
            raise RecipeError(
                f"data.image_size {image_size} is not a multiple of the model's {self.unit} pixels per image token",
                f"pack with --image-size {below + self.unit}" + (f" or {below}" if below else ""),
            )


class Patches:
    """`Pictures` of a Qwen-VL model whose processor only cuts, rescales and normalises pictures of the packed size."""

    def __init__(self, spec: PatchSpec):
        self.spec = spec
        self.placeholder = self.image_token = spec.image_token_id
        self.kept = spec.kept

    def encode(self, rgb: np.ndarray, out: np.ndarray | None = None) -> Picture:
        patches, grid = patchify(rgb, self.spec, out)
        num_tokens = grid[1] * grid[2] // self.spec.merge_size**2
        return Picture(patches, {"image_grid_thw": np.array([grid])}, _repeated(self.image_token, num_tokens))

    def arrange(
        self, facts: dict[str, np.ndarray], is_image: np.ndarray, lengths: Sequence[int]
    ) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        return self.spec.layout.arrange(facts, is_image, lengths)

    def to_model(self, pixels: "torch.Tensor", facts: dict[str, Any], is_image: "torch.Tensor") -> dict[str, Any]:
        return {"pixel_values": normalise_patches(pixels, self.spec), "mm_token_type_ids": is_image, **facts}


@lru_cache(maxsize=64)
def _repeated(token: int, count: int) -> np.ndarray:
    ids = np.full(count, token, dtype=np.int64)
    ids.flags.writeable = False
    return ids


def patchify(
    rgb: np.ndarray, spec: PatchSpec, out: np.ndarray | None = None
) -> tuple[np.ndarray, tuple[int, int, int]]:
    """Cut RGB (H, W, 3) uint8 into patches (num_patches, p·p·3) uint8 and their grid (time, height, width).

    Patches that merge into one token are next to each other: (H/pm, W/pm, m, m, p, p, channel). This is the order of
    transformers' Qwen2VLImageProcessor, except for the channels. They stay innermost, so that complete rows of a patch
    are copied, in a sixth of the time. The device moves them to the front. The patches are written to `out` if it is
    given and has their shape.
    """
    p, m = spec.patch_size, spec.merge_size
    rows, columns = rgb.shape[0] // p, rgb.shape[1] // p
    shape = (rows * columns, p * p * 3)
    patches = out if out is not None and out.shape == shape else np.empty(shape, dtype=np.uint8)
    line = np.dtype((np.void, p * 3))  # a row of a patch, copied as one item
    lines = np.ascontiguousarray(rgb).reshape(-1).view(line).reshape(rows // m, m, p, columns // m, m)
    into = patches.reshape(-1).view(line).reshape(rows // m, columns // m, m, m, p)
    into[...] = lines.transpose(0, 3, 1, 4, 2)
    return patches, (1, rows, columns)


def normalise_patches(patches: "torch.Tensor", spec: PatchSpec) -> "torch.Tensor":
    """Convert uint8 patches (n, p·p·3) to pixel_values (n, 3·T·p·p) float32, normalised and repeated T times in time.

    Equals transformers' Qwen2VLImageProcessor, which rescales by 1/255, then computes (x - mean) / std per channel.
    """
    p, t = spec.patch_size, spec.temporal_patch_size
    mean, std = _mean_and_std(spec, patches.device)
    pixels = (patches.view(-1, p * p, 3).permute(0, 2, 1).unsqueeze(2).float() / 255 - mean) / std
    return pixels.expand(-1, -1, t, -1).reshape(-1, 3 * t * p * p)


@lru_cache(maxsize=8)
def _mean_and_std(spec: PatchSpec, device: "torch.device") -> "tuple[torch.Tensor, torch.Tensor]":
    """Return the constants of the normalisation on `device`, (1, 3, 1, 1). They are copied there only once."""
    import torch

    mean, std = (torch.tensor(values, device=device).view(1, 3, 1, 1) for values in (spec.mean, spec.std))
    return mean, std
