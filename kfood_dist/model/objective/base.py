"""What a run minimises: `Objective`, one small class for each loss. `table.py` names them all.

    batch ──► forward ──► loss, summed over what `weight` counts ──► divided by the global batch's weight (loop.py)

Always holds: `forward` divides by nothing that depends on how the batch is cut, because only the caller knows the
weight of the whole global batch.
"""

from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import nn

from kfood_dist.data.batch.collate import Batch


class Outcome(NamedTuple):
    """What came of a batch of B samples."""

    loss: torch.Tensor  # the sum, float32 scalar
    each: torch.Tensor  # each sample's own part of the sum, float32 (B,), without a graph
    correct: torch.Tensor  # which samples the model has right, bool (B,)


class Objective(nn.Module):
    """A PeftModel with its loss, as one module for DeepSpeed and DDP to wrap.

    `best` is the figure of the validation split by which the best checkpoint is chosen: the highest accuracy or the
    lowest loss.
    """

    best: ClassVar[Literal["accuracy", "loss"]] = "accuracy"

    def __init__(self, model: Any):
        super().__init__()
        self.model = model

    def weight(self, batch: Batch) -> int:
        """What the sum is over: label tokens, samples, pairs. Known before the forward pass, without the device."""
        raise NotImplementedError

    def forward(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The three of an `Outcome`, as a plain tuple, since wrappers take tuples apart."""
        raise NotImplementedError
