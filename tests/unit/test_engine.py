"""The engine without DeepSpeed on a module of one weight: steps that are not finite are skipped, and fp16's state."""

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator

from kfood_dist.model.load import DTYPES
from kfood_dist.train.engine.base import Update
from kfood_dist.train.engine.plain import PlainEngine
from kfood_dist.train.engine.zero import ZeroEngine


class Slope(torch.nn.Module):
    """A module of one weight. The loss of a batch (slope, offset) is weight × slope + offset: its gradient is slope."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(()))

    def forward(self, batch: tuple[float, float]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        loss = self.weight.float() * batch[0] + batch[1]
        return loss, loss.detach()[None], torch.ones(1, dtype=torch.bool)


def engine_of(precision: str) -> PlainEngine:
    module = Slope()
    optimizer = torch.optim.SGD(module.parameters(), lr=1.0)
    return PlainEngine(Accelerator(cpu=True), module, optimizer, 100.0, dtype_of=lambda _: DTYPES[precision])


def weight_of(engine: PlainEngine) -> float:
    return engine.trainable["weight"].item()


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_loss_that_is_not_finite_in_any_micro_batch_skips_the_step(precision: str) -> None:
    engine = engine_of(precision)
    for micro_batches in ([(1.0, math.inf), (1.0, 0.0)], [(1.0, 0.0), (1.0, math.inf)], [(math.nan, 0.0), (1.0, 0.0)]):
        for i, batch in enumerate(micro_batches):
            engine.micro_step(batch, 1.0, last=i == 1)
        update = engine.step([0.25])
        assert not update.applied and not math.isfinite(update.grad_norm)
        assert weight_of(engine) == 1.0
    engine.micro_step((2.0, 5.0), 1.0, last=True)
    update = engine.step([0.25])
    assert (update.applied, update.grad_norm) == (True, 2.0)
    assert weight_of(engine) == 0.5


def test_an_overflow_halves_the_loss_scale_and_another_run_can_take_it_over() -> None:
    first = engine_of("fp16")
    assert first.scale_state["scale"] == 2**16
    first.micro_step((math.inf, 0.0), 1.0, last=True)
    assert first.step([0.25]).loss_scale == 2**16
    first.micro_step((1.0, 0.0), 1.0, last=True)
    assert first.step([0.25]).loss_scale == 2**15
    second = engine_of("fp16")
    second.scale_state = first.scale_state
    assert second.scale_state == first.scale_state
    second.micro_step((1.0, 0.0), 1.0, last=True)
    assert second.step([0.25]).loss_scale == 2**15


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_only_fp16_scales_the_loss(precision: str) -> None:
    engine = engine_of(precision)
    assert engine.scale_state == {}
    engine.micro_step((1.0, 0.0), 1.0, last=True)
    assert engine.step([0.25]).loss_scale is None


def test_the_zero_engine_reports_the_loss_scale_of_each_update() -> None:
    """DeepSpeed's own scaler runs in a fake engine that reports an overflow and no update, like fp16 on a GPU."""
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler

    scaler = DynamicLossScaler(
        init_scale=2**16, scale_window=2000, min_scale=1, delayed_shift=1, consecutive_hysteresis=False
    )

    class Overflowing:
        optimizer = SimpleNamespace(loss_scaler=scaler, param_groups=[{}], cpu_offload=True)

        def zero_optimization_stage(self) -> int:
            return 2

        def fp16_enabled(self) -> bool:
            return True

        def step(self) -> None:
            scaler.cur_scale /= 2  # as update_scale does, which needs a process group to log it

        def was_step_applied(self) -> bool:
            return False

        def get_global_grad_norm(self) -> float:
            return float("inf")

    accelerator: Any = SimpleNamespace(
        mixed_precision="fp16", process_index=0, prepare=lambda module, optimizer: (Overflowing(), optimizer)
    )
    module = torch.nn.Linear(1, 1)
    engine = ZeroEngine(accelerator, module, torch.optim.AdamW(module.parameters()))
    assert engine.step([1e-3]) == Update(float("inf"), applied=False, loss_scale=2.0**16)
    assert engine.step([1e-3]).loss_scale == 2.0**15
    state = engine.scale_state
    scaler.cur_scale = 1.0
    engine.scale_state = state
    assert scaler.cur_scale == state["scale"] == 2.0**14


def test_a_large_gradient_is_clipped_and_its_norm_before_clipping_is_reported() -> None:
    module = Slope()
    optimizer = torch.optim.SGD(module.parameters(), lr=1.0)
    engine = PlainEngine(Accelerator(cpu=True), module, optimizer, 0.5, dtype_of=lambda _: torch.float32)
    engine.micro_step((2.0, 0.0), 1.0, last=True)
    assert engine.step([1.0]).grad_norm == 2.0
    assert weight_of(engine) == pytest.approx(0.5)


def test_a_checkpoint_saves_the_loss_scale(tmp_path: Path) -> None:
    first = engine_of("fp16")
    first.micro_step((math.inf, 0.0), 1.0, last=True)
    first.step([0.25])
    first.save(tmp_path)
    second = engine_of("fp16")
    second.load(tmp_path)
    assert second.scale_state == first.scale_state == {"scale": 2**15, "good_steps": 0}
