"""The parameters of an optimiser group as one flat tensor, so that each part of an update is one operation.

    master weights (float32) ── publish ──► weights that the model computes with (views of one flat tensor)
    backward of a micro-batch ──► their gradients ── accumulate ──► gradient of the master weights (float32)

Always holds: gradients are added in float32, over micro-batches and over ranks. The parameters of the model are views,
so nothing is copied tensor by tensor. Each parameter begins at a multiple of `BLOCK`, so no two parameters share a
scale of AdamW8bit.
"""

from collections.abc import Callable, Mapping
from itertools import accumulate

import torch
from torch import nn

from kfood_dist.train.engine.state import BLOCK, Fragment, Slice


class FlatGroup:
    """Named parameters with float32 values, laid out in one flat tensor. Call `publish` before the first forward pass.

    `dtype_of` gives the type that a parameter computes in, by its name: float32, or one type of 16 bits.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], dtype_of: Callable[[str], torch.dtype]):
        room = [-(-parameter.numel() // BLOCK) * BLOCK for parameter in parameters.values()]
        starts = list(accumulate(room, initial=0))
        device = next(iter(parameters.values())).device
        self.master = nn.Parameter(torch.zeros(starts[-1], device=device))
        self.master.grad = torch.zeros_like(self.master)
        short = {dtype_of(name) for name in parameters} - {torch.float32}
        # The copy that the model computes with, and its gradient. None if everything computes in float32.
        self._short = torch.zeros_like(self.master, dtype=short.pop()).detach() if short else None
        self._short_gradient = None if self._short is None else torch.zeros_like(self._short)
        self.slices: list[Slice] = []
        for (name, parameter), start in zip(parameters.items(), starts, strict=False):
            place = slice(start, start + parameter.numel())
            self.master.detach()[place] = parameter.detach().flatten()
            values, gradient = self._short, self._short_gradient
            if dtype_of(name) == torch.float32 or values is None or gradient is None:
                values, gradient = self.master.detach(), self.master.grad
            shape = parameter.shape
            parameter.data = values[place].view(shape)
            parameter.grad = gradient[place].view(shape)
            self.slices.append(Slice(name, 0, parameter.numel(), start))

    @property
    def fragment(self) -> Fragment:
        """The master weights, with the place of each parameter in them."""
        return Fragment(self.master, tuple(self.slices))

    @property
    def gradient(self) -> torch.Tensor:
        """The sum of the gradients so far, float32."""
        assert self.master.grad is not None
        return self.master.grad

    @property
    def gradients(self) -> list[torch.Tensor]:
        """The sum of the gradients of each parameter, as flat views."""
        return [self.gradient[piece.at : piece.at + piece.length] for piece in self.slices]

    def accumulate(self) -> None:
        """Add the gradients of a micro-batch to the sum. Gradients of parameters in float32 are added by autograd."""
        if self._short_gradient is not None:
            self.gradient.add_(self._short_gradient)
            self._short_gradient.zero_()

    def publish(self) -> None:
        """Copy the master weights to the weights that the model computes with."""
        if self._short is not None:
            self._short.copy_(self.master.detach())

    def clear(self) -> None:
        """Set the sum of the gradients to zero."""
        self.gradient.zero_()
