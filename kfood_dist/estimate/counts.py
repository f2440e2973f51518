"""What a batch holds, in the units that its floating-point operations are counted in.

    batch on the CPU ──► count_batch ──► Counts ──► sum over micro-batches and ranks ──► Coefficients.cost (flops.py)

Always holds: padding counts nowhere, and neither does a batch without labels. No rank trains on such a batch: the
collator makes it only for a rank whose samples are all skipped.
"""

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any

from kfood_dist.data.batch.collate import Batch


@dataclass(frozen=True)
class Counts:
    """How many of each unit a batch has, or several batches together. A pair is a query with a key that it attends to.

    Patches and tower tokens differ by the class tokens, which CLIP adds to the patches of a picture.
    """

    num_tokens: int = 0  # of the language model, image tokens included
    num_causal_pairs: int = 0  # n (n + 1) / 2 for a row of n tokens
    num_patches: int = 0
    num_tower_tokens: int = 0
    num_window_pairs: int = 0  # in a layer of the tower that attends within windows
    num_full_pairs: int = 0  # in a layer of the tower that attends within pictures
    num_image_tokens: int = 0
    num_labels: int = 0  # positions that predict a label

    def __add__(self, other: "Counts") -> "Counts":
        return Counts(*(getattr(self, field.name) + getattr(other, field.name) for field in fields(self)))


def count_batch(batch: Batch, config: Any) -> Counts:
    """Count a batch before it goes to the device. `config` is the model's transformers config.

    Rows may have any number of pictures. The language model is taken to attend to all earlier tokens of a row.
    """
    if not batch.num_label_tokens:
        return Counts()
    vision = config.vision_config
    grids = list(_grids(batch, vision))
    class_tokens = int(vision.model_type == "clip_vision_model")
    window = _window_side(vision)
    lengths = batch.attention_mask.sum(1)
    num_patches = sum(frames * height * width for frames, height, width in grids)
    return Counts(
        num_tokens=batch.num_tokens,
        num_causal_pairs=int((lengths * (lengths + 1) // 2).sum()),
        num_patches=num_patches,
        num_tower_tokens=num_patches + class_tokens * sum(frames for frames, _, _ in grids),
        num_window_pairs=sum(t * _squares(h, window) * _squares(w, window) for t, h, w in grids) if window else 0,
        num_full_pairs=sum(t * (h * w + class_tokens) ** 2 for t, h, w in grids),
        num_image_tokens=int(batch.is_image.sum()),
        num_labels=len(batch.targets),
    )


def _grids(batch: Batch, vision: Any) -> Iterator[tuple[int, int, int]]:
    """Yield the frames, and the height and width in patches, of each picture of a batch."""
    if "image_grid_thw" in batch.shapes:
        yield from map(tuple, batch.shapes["image_grid_thw"].tolist())
    else:
        num_pictures, _, height, width = batch.pixels.shape
        yield from [(1, height // vision.patch_size, width // vision.patch_size)] * num_pictures


def _window_side(vision: Any) -> int:
    """Return the side of an attention window in patches, or 0 for a tower without windows.

    A window holds complete image tokens, as in transformers' `get_vision_window_index`.
    """
    if not hasattr(vision, "fullatt_block_indexes"):
        return 0
    merge = vision.spatial_merge_size
    return int(vision.window_size // merge // vision.patch_size * merge)


def _squares(length: int, side: int) -> int:
    """Return the sum of the squares of the parts, if a length is cut into parts of `side` and a shorter last one.

    The product of both directions is the number of pairs: a window of a × b patches has (a b)² of them.
    """
    return length // side * side**2 + (length % side) ** 2
