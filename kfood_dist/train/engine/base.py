"""One optimiser step on whatever runs below: DeepSpeed ZeRO, DDP, or a single process.

    build_engine (`build.py`) ──► micro_step × n, step ──► Update: gradient norm, applied

Both engines take a loss that is already normalised over the global batch, and average gradients over ranks; the
caller multiplies by the world size. Neither divides by the accumulation again. Both leave an update out, on all ranks
alike, if the summed gradient is not finite, and see to it that a loss that is not finite makes it so.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import torch

from kfood_dist.data.batch.collate import Batch
from kfood_dist.model.objective.base import Outcome


class Update(NamedTuple):
    """What came of a step."""

    grad_norm: float  # global, before clipping; not finite if the update was left out
    applied: bool
    loss_scale: float | None  # what the loss was multiplied with, under fp16


class Engine(Protocol):
    """What the training loop needs of its engine."""

    optimizer: torch.optim.Optimizer

    def forward(self, batch: Batch) -> Outcome:
        """The objective's outcome, without a backward pass."""

    def micro_step(self, batch: Batch, scale: float, last: bool) -> Outcome:
        """Forward and backward of one micro-batch's loss × scale; on the `last` one all ranks' are summed."""

    def step(self, learning_rates: Sequence[float]) -> Update:
        """Clip, update, clear the gradients; if they are not finite, clear them alone. The same on every rank.

        There is a learning rate for each of the optimiser's groups.
        """

    @property
    def scale_state(self) -> dict[str, float]:
        """What fp16's loss scaling remembers: `scale`, and `good_steps` since it last changed; {} without it."""

    @scale_state.setter
    def scale_state(self, state: dict[str, float]) -> None: ...

    def save(self, folder: Path) -> None:
        """Write this rank's part of the master weights and optimiser state, if it has one of its own."""

    def load(self, folder: Path) -> None:
        """Read back what any number of ranks saved, with or without ZeRO. A collective."""


def scaled(loss: torch.Tensor, scale: float) -> torch.Tensor:
    """loss × scale, with a gradient of NaN throughout if the loss is not finite.

    A loss may be infinite and its gradient not; summed over ranks, the NaN tells every rank to leave the update out.
    """
    return loss * (scale + 0.0 * loss.detach())
