"""What the data plane asks of a model's way with pictures: `Pictures`, one small interface for every family.

    RGB (H, W, 3) uint8 ──► encode (a loader process) ──► Picture: pixels, facts, token ids
    pixels and facts of a batch ──► to_model (the device) ──► what the model's forward takes besides its tokens

A row of a batch may have any number of pictures: their arrays are joined along the first axis, in reading order.
"""

from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np

if TYPE_CHECKING:
    import torch


class Picture(NamedTuple):
    """One picture as a loader process hands it on.

    `pixels` is the large array, `facts` are small ones that go with it, such as a grid; their first axes are joined
    over a batch. `ids`, int64 (n,), are the tokens that stand for it in the text.
    """

    pixels: np.ndarray
    facts: dict[str, np.ndarray]
    ids: np.ndarray


class Pictures(Protocol):
    """How one model takes pictures. Picklable, since loader processes hold it; torch is needed for `to_model` alone."""

    placeholder: int  # the token that the chat template writes for a picture
    image_token: int  # the token at whose places the model puts a picture's features
    kept: frozenset[int]  # tokens that truncation may not drop, these two among them

    def encode(self, rgb: np.ndarray, out: np.ndarray | None = None) -> Picture:
        """A picture, RGB (H, W, 3) uint8, for the model; its pixels are written to `out` if that has their shape."""

    def to_model(
        self, pixels: "torch.Tensor", facts: "dict[str, torch.Tensor]", is_image: "torch.Tensor"
    ) -> "dict[str, torch.Tensor]":
        """The model's inputs besides token ids and attention mask, from a batch's joined pictures on its device.

        `is_image`, int64 (B, L), is 1 where a token is `image_token`.
        """
