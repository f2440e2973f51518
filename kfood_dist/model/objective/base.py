"""What a run minimises: `Objective`, with one small class for each loss. `table.py` names them all.

    batch ──► forward ──► loss, summed over what `weight` counts ──► divided by the global batch's weight (loop.py)

Always holds: `forward` never divides by a number that depends on how the batch is cut, because only the caller knows
the weight of the complete global batch.
"""

from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import nn

from kfood_dist.data.batch.collate import Batch


class Outcome(NamedTuple):
    """The result of a batch of B samples."""

    loss: torch.Tensor  # the sum, float32 scalar
    each: torch.Tensor  # each sample's part of the sum, float32 (B,), without a graph
    correct: torch.Tensor  # which samples are answered right, bool (B,)


class Objective(nn.Module):
    """A PeftModel with its loss, as one module for DeepSpeed to wrap.

    `best` names the validation result that selects the best checkpoint: the highest accuracy or the lowest loss.
    """

    best: ClassVar[Literal["accuracy", "loss"]] = "accuracy"

    def __init__(self, model: Any):
        super().__init__()
        self.model = model

    def weight(self, batch: Batch) -> int:
        """Return the number of label tokens, samples or pairs that the sum is over.

        It is known before the forward pass, without the device.
        """
        raise NotImplementedError

    def forward(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return the three values of an `Outcome` as a plain tuple, because wrappers take tuples apart."""
        raise NotImplementedError
