"""The engine without DeepSpeed: DDP on several ranks, or a single process."""

import math
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

import torch
from accelerate import Accelerator

from kfood_dist.data.batch.collate import Batch
from kfood_dist.model.load import DTYPES
from kfood_dist.model.objective.base import Outcome
from kfood_dist.train.engine import state
from kfood_dist.train.engine.base import Update, scaled
from kfood_dist.train.engine.zero_config import INITIAL_SCALE_POWER, SCALE_WINDOW


class PlainEngine:
    """An engine without sharding: DDP over several ranks, or a single process."""

    def __init__(
        self,
        accelerator: Accelerator,
        module: torch.nn.Module,
        optimizer: torch.optim.Optimizer,
        max_grad_norm: float,
        precision: str,
    ):
        self.accelerator = accelerator
        # The model is already on its device, and moving 4-bit weights again is not always allowed.
        self.module = accelerator.prepare(module, device_placement=[False])
        self.optimizer = optimizer
        self.max_grad_norm = max_grad_norm
        self.trainable = {n: p for n, p in module.named_parameters() if p.requires_grad}
        self.dtype = DTYPES[precision]
        self.scaler = torch.amp.GradScaler(
            accelerator.device.type,
            init_scale=2.0**INITIAL_SCALE_POWER,
            growth_interval=SCALE_WINDOW,
            enabled=precision == "fp16",
        )

    def forward(self, batch: Batch) -> Outcome:
        with torch.autocast(self.accelerator.device.type, self.dtype, enabled=self.dtype != torch.float32):
            return Outcome(*self.module(batch))

    def micro_step(self, batch: Batch, scale: float, last: bool) -> Outcome:
        with nullcontext() if last else self.accelerator.no_sync(self.module):
            outcome = self.forward(batch)
            self.scaler.scale(scaled(outcome.loss, scale)).backward()
        return outcome._replace(loss=outcome.loss.detach())

    def step(self, learning_rates: Sequence[float]) -> Update:
        for group, learning_rate in zip(self.optimizer.param_groups, learning_rates, strict=True):
            group["lr"] = learning_rate
        loss_scale = self.scaler.get_scale() if self.scaler.is_enabled() else None
        self.scaler.unscale_(self.optimizer)
        # After DDP's all-reduce, every rank has the same gradients, so all ranks decide the same.
        norm = float(torch.nn.utils.clip_grad_norm_(self.trainable.values(), self.max_grad_norm))
        applied = math.isfinite(norm)
        if applied:
            self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        return Update(norm, applied, loss_scale)

    @property
    def scale_state(self) -> dict[str, float]:
        if not self.scaler.is_enabled():
            return {}
        return {"scale": self.scaler.get_scale(), "good_steps": self.scaler.state_dict()["_growth_tracker"]}

    @scale_state.setter
    def scale_state(self, state: dict[str, float]) -> None:
        known = {"scale": state["scale"], "_growth_tracker": int(state["good_steps"])}
        self.scaler.load_state_dict(self.scaler.state_dict() | known)

    def save(self, folder: Path) -> None:
        if self.accelerator.is_main_process:  # every rank has the same state
            state.save(folder / state.file_name(0), self.fragments(), self.optimizer, self.scale_state)

    def load(self, folder: Path) -> None:
        with state.Saved(folder) as saved:
            saved.require_parameters({name: parameter.numel() for name, parameter in self.trainable.items()})
            state.load(saved, self.fragments(), self.optimizer)
            if saved.extra:
                self.scale_state = saved.extra

    def fragments(self) -> list[state.Fragment]:
        """Return one fragment for each parameter. The model computes with the master weights themselves."""
        return [
            state.Fragment(parameter, (state.Slice(name, 0, parameter.numel(), 0),))
            for name, parameter in self.trainable.items()
        ]
