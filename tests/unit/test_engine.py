"""The engine without DeepSpeed on a module of one weight: what is not finite is left out, and what fp16 remembers."""

import math

import pytest
import torch
from accelerate import Accelerator

from kfood_dist.train.engine import PlainEngine


class Slope(torch.nn.Module):
    """Its loss is weight × slope + offset, given as a batch: the gradient is the slope, whatever the loss."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(()))

    def forward(self, batch: tuple[float, float]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        loss = self.weight * batch[0] + batch[1]
        return loss, torch.ones(1), loss.detach()[None]


def engine_of(precision: str) -> PlainEngine:
    module = Slope()
    optimizer = torch.optim.SGD(module.parameters(), lr=1.0)
    return PlainEngine(Accelerator(cpu=True), module, optimizer, max_grad_norm=100.0, precision=precision)


def weight_of(engine: PlainEngine) -> float:
    return engine.trainable["weight"].item()


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_an_infinite_loss_with_a_finite_gradient_is_left_out_whichever_micro_batch_it_is(precision: str) -> None:
    engine = engine_of(precision)
    for micro_batches in ([(1.0, math.inf), (1.0, 0.0)], [(1.0, 0.0), (1.0, math.inf)], [(math.nan, 0.0), (1.0, 0.0)]):
        for i, batch in enumerate(micro_batches):
            engine.micro_step(batch, 1.0, last=i == 1)
        update = engine.step(0.25)
        assert not update.applied and not math.isfinite(update.grad_norm)
        assert weight_of(engine) == 1.0
    engine.micro_step((2.0, 5.0), 1.0, last=True)
    update = engine.step(0.25)
    assert (update.applied, update.grad_norm) == (True, 2.0)
    assert weight_of(engine) == 0.5


def test_the_loss_scale_is_halved_by_an_overflow_and_can_be_carried_to_another_run() -> None:
    first = engine_of("fp16")
    assert first.scale_state["scale"] == 2**16
    first.micro_step((math.inf, 0.0), 1.0, last=True)
    assert first.step(0.25).loss_scale == 2**16
    first.micro_step((1.0, 0.0), 1.0, last=True)
    assert first.step(0.25).loss_scale == 2**15
    second = engine_of("fp16")
    second.scale_state = first.scale_state
    assert second.scale_state == first.scale_state
    second.micro_step((1.0, 0.0), 1.0, last=True)
    assert second.step(0.25).loss_scale == 2**15


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_only_fp16_scales_the_loss(precision: str) -> None:
    engine = engine_of(precision)
    assert engine.scale_state == {}
    engine.micro_step((1.0, 0.0), 1.0, last=True)
    assert engine.step(0.25).loss_scale is None
