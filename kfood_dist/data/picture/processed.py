"""Pictures as a model's own transformers processor makes them: for every model without a quicker way of its own.

    RGB (H, W, 3) uint8 ──► image processor ──► pixel_values float32, and what else it hands out
                       └──► expand ──► the tokens that stand for a picture of this size

It runs in the loader process, on every picture, and gives floats: four to eight times as many bytes as uint8.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from kfood_dist.data.picture.protocol import Picture

if TYPE_CHECKING:
    import torch

Facts = dict[str, np.ndarray]


class Processed:
    """`Pictures` through a transformers image processor.

    `expand` gives the tokens of a picture, int64 (n,), from the picture and what the processor made of it besides
    pixels; pictures of one size have as many. `token_types` names the model's input that marks image tokens, if any.
    """

    def __init__(
        self,
        image_processor: Any,
        expand: Callable[[np.ndarray, Facts], np.ndarray],
        placeholder: int,
        image_token: int,
        kept: frozenset[int] = frozenset(),
        token_types: str = "",
    ):
        self.placeholder = placeholder
        self.image_token = image_token
        self.kept = kept | {placeholder, image_token}
        self._image_processor = image_processor
        self._expand = expand
        self._token_types = token_types
        self._ids: dict[tuple[int, ...], np.ndarray] = {}

    def encode(self, rgb: np.ndarray, out: np.ndarray | None = None) -> Picture:
        # The channels' place is said, since a processor would have to guess it of a very small picture.
        made = self._image_processor(images=[rgb], return_tensors="np", input_data_format="channels_last")
        facts = {name: np.asarray(value) for name, value in made.items()}
        pixels = facts.pop("pixel_values").astype(np.float32)
        if rgb.shape not in self._ids:
            self._ids[rgb.shape] = self._expand(rgb, facts)
        return Picture(pixels, facts, self._ids[rgb.shape])

    def to_model(
        self, pixels: "torch.Tensor", facts: "dict[str, torch.Tensor]", is_image: "torch.Tensor"
    ) -> "dict[str, torch.Tensor]":
        types = {self._token_types: is_image} if self._token_types else {}
        return {"pixel_values": pixels, **types, **facts}
