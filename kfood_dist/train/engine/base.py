"""One optimiser step with DeepSpeed ZeRO, with plain data parallelism, or in a single process.

    build_engine (`build.py`) ──► micro_step × n, step ──► Update: gradient norm, applied

Both engines take a loss that is already normalised over the global batch. Both average gradients over ranks, so the
caller multiplies by the world size. Neither divides by the accumulation again. Both skip an update on all ranks if the
summed gradient is not finite. A loss that is not finite always makes that gradient not finite.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import torch

from kfood_dist.data.batch.collate import Batch
from kfood_dist.model.objective.base import Outcome


class Update(NamedTuple):
    """The result of a step."""

    grad_norm: float  # global, before clipping; not finite if the update was skipped
    applied: bool
    loss_scale: float | None  # the factor of the loss under fp16; None otherwise


class Engine(Protocol):
    """The methods that the training loop needs of its engine."""

    optimizer: torch.optim.Optimizer

    def forward(self, batch: Batch) -> Outcome:
        """Return the objective's outcome, without a backward pass."""

    def micro_step(self, batch: Batch, scale: float, last: bool) -> Outcome:
        """Run forward and backward of one micro-batch's loss × scale. The `last` one combines all ranks' gradients."""

    def step(self, learning_rates: Sequence[float]) -> Update:
        """Clip the gradients, update the weights and clear the gradients. If they are not finite, only clear them.

        Every rank does the same. `learning_rates` has one value for each of the optimiser's groups.
        """

    @property
    def scale_state(self) -> dict[str, float]:
        """The state of fp16's loss scaling: `scale`, and `good_steps` since it last changed. {} without scaling."""

    @scale_state.setter
    def scale_state(self, state: dict[str, float]) -> None: ...

    def save(self, folder: Path) -> None:
        """Write this rank's part of the master weights and optimiser state, if the rank has a separate part."""

    def load(self, folder: Path) -> None:
        """Load the state that any number of ranks saved, with or without ZeRO. A collective."""


def scaled(loss: torch.Tensor, scale: float) -> torch.Tensor:
    """Return loss × scale. If the loss is not finite, all of its gradient is NaN.

    An infinite loss can have a finite gradient. The NaN, summed over ranks, makes every rank skip the update.
    """
    return loss * (scale + 0.0 * loss.detach())
