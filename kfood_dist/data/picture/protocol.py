"""How a model takes pictures, as the data code uses it: `Pictures`, one small interface for every model family.

    RGB (H, W, 3) uint8 ──► encode (a loader process) ──► Picture: pixels, facts, token ids
    facts of a training batch ──► arrange (a loader process) ──► facts for the device, shapes for the host
    pixels, facts and shapes of a batch ──► to_model (the device) ──► the inputs of the model's forward besides tokens

A row of a batch may have any number of pictures: their arrays are joined along the first axis, in reading order.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np

if TYPE_CHECKING:
    import torch


class Picture(NamedTuple):
    """One picture as a loader process passes it on.

    `pixels` is the large array. `facts` are small arrays that go with it, such as a grid. A batch joins both along
    their first axes. `ids`, int64 (n,), are the tokens that stand for the picture in the text.
    """

    pixels: np.ndarray
    facts: dict[str, np.ndarray]
    ids: np.ndarray


class Pictures(Protocol):
    """The way in which one model takes pictures. Picklable, because loader processes hold it.

    Only `to_model` needs torch.
    """

    placeholder: int  # the token that the chat template writes for a picture
    image_token: int  # the token that the model replaces with a picture's features
    kept: frozenset[int]  # tokens that truncation must not drop, including these two

    def encode(self, rgb: np.ndarray, out: np.ndarray | None = None) -> Picture:
        """Encode a picture, RGB (H, W, 3) uint8. Its pixels are written to `out` if that has their shape."""

    def arrange(
        self, facts: dict[str, np.ndarray], is_image: np.ndarray, lengths: Sequence[int]
    ) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Compute what the model would compute from the joined `facts` of a training batch by itself.

        Returns the facts for the device, and those that stay on the host. A device that computes them makes its host
        wait. `is_image`, int64 (B, L), is 1 where a token is `image_token`. Row i has `lengths[i]` tokens and is
        padded on the right.
        """

    def to_model(self, pixels: "torch.Tensor", facts: dict[str, Any], is_image: "torch.Tensor") -> dict[str, Any]:
        """Return the model's inputs besides token ids and attention mask, from a batch's joined pictures on its device.

        `facts` are both results of `arrange`.
        """
