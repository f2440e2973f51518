"""Pictures made by a model's own transformers processor, for every model that has no faster way here.

    RGB (H, W, 3) uint8 ──► image processor ──► pixel_values float32, and its other outputs
                       └──► expand ──► the tokens that stand for a picture of this size

The processor runs in the loader process, on every picture. It returns floats: four to eight times the bytes of uint8.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from kfood_dist.data.picture.layout import QwenLayout
from kfood_dist.data.picture.protocol import Picture

if TYPE_CHECKING:
    import torch

Facts = dict[str, np.ndarray]


class Processed:
    """`Pictures` made by a transformers image processor.

    `expand` returns the tokens of a picture, int64 (n,), from the picture and the processor's outputs except the
    pixels. All pictures of one size get the same tokens. `token_types` names the model's input that marks image
    tokens, if there is one. `layout` arranges the pictures of a Qwen-VL model.
    """

    def __init__(
        self,
        image_processor: Any,
        expand: Callable[[np.ndarray, Facts], np.ndarray],
        placeholder: int,
        image_token: int,
        kept: frozenset[int] = frozenset(),
        token_types: str = "",
        layout: QwenLayout | None = None,
    ):
        self.placeholder = placeholder
        self.image_token = image_token
        self.kept = kept | {placeholder, image_token}
        self._image_processor = image_processor
        self._expand = expand
        self._token_types = token_types
        self._layout = layout
        self._ids: dict[tuple[int, ...], np.ndarray] = {}

    def encode(self, rgb: np.ndarray, out: np.ndarray | None = None) -> Picture:
        # The axis of the channels is given, because a processor would have to guess it for a very small picture.
        made = self._image_processor(images=[rgb], return_tensors="np", input_data_format="channels_last")
        facts = {name: np.asarray(value) for name, value in made.items()}
        pixels = facts.pop("pixel_values").astype(np.float32)
        if rgb.shape not in self._ids:
            self._ids[rgb.shape] = self._expand(rgb, facts)
        return Picture(pixels, facts, self._ids[rgb.shape])

    def arrange(
        self, facts: Facts, is_image: np.ndarray, lengths: Sequence[int]
    ) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        return (facts, {}) if self._layout is None else self._layout.arrange(facts, is_image, lengths)

    def to_model(self, pixels: "torch.Tensor", facts: dict[str, Any], is_image: "torch.Tensor") -> dict[str, Any]:
        types = {self._token_types: is_image} if self._token_types else {}
        return {"pixel_values": pixels, **types, **facts}
