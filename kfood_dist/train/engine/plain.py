"""The engine without DeepSpeed: one process, or data parallelism over several ranks.

    micro_step × n ──► gradients added on this rank ──► step: one all-reduce ──► clip ──► update ──► publish

Every rank has all weights and all optimiser state. The ranks communicate once per optimiser step.
"""

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from accelerate import Accelerator

from kfood_dist.data.batch.collate import Batch
from kfood_dist.model.objective.base import Outcome
from kfood_dist.train.engine import state
from kfood_dist.train.engine.base import Update, scaled
from kfood_dist.train.engine.flat import FlatGroup
from kfood_dist.train.engine.zero_config import INITIAL_SCALE_POWER, SCALE_WINDOW


class PlainEngine:
    """An engine without sharding. `dtype_of` gives the type that a parameter computes in, by its name.

    fp16 scales the loss. The optimiser must not have taken a step yet.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        module: torch.nn.Module,
        optimizer: torch.optim.Optimizer,
        max_grad_norm: float,
        dtype_of: Callable[[str], torch.dtype],
    ):
        self.accelerator = accelerator
        self.module = module
        self.optimizer = optimizer
        self.max_grad_norm = max_grad_norm
        named = {parameter: name for name, parameter in module.named_parameters() if parameter.requires_grad}
        self.trainable = {name: parameter for parameter, name in named.items()}
        self.groups = []
        for group in optimizer.param_groups:
            flat = FlatGroup({named[parameter]: parameter for parameter in group["params"]}, dtype_of)
            if accelerator.num_processes > 1:
                dist.broadcast(flat.master.detach(), src=0)
            flat.publish()
            group["params"] = [flat.master]
            self.groups.append(flat)
        self.scaler = torch.amp.GradScaler(
            accelerator.device.type,
            init_scale=2.0**INITIAL_SCALE_POWER,
            growth_interval=SCALE_WINDOW,
            enabled=torch.float16 in map(dtype_of, self.trainable),
        )

    def forward(self, batch: Batch) -> Outcome:
        return Outcome(*self.module(batch))

    def micro_step(self, batch: Batch, scale: float, last: bool) -> Outcome:
        outcome = self.forward(batch)
        self.scaler.scale(scaled(outcome.loss, scale)).backward()
        for group in self.groups:
            group.accumulate()
            if last and self.accelerator.num_processes > 1:
                dist.all_reduce(group.gradient)
                group.gradient.div_(self.accelerator.num_processes)
        return outcome._replace(loss=outcome.loss.detach())

    def step(self, learning_rates: Sequence[float]) -> Update:
        for settings, learning_rate in zip(self.optimizer.param_groups, learning_rates, strict=True):
            settings["lr"] = learning_rate
        loss_scale = self.scaler.get_scale() if self.scaler.is_enabled() else None
        self.scaler.unscale_(self.optimizer)
        # After the all-reduce, every rank has the same gradients, so all ranks decide the same.
        # By parameter, as torch's clip_grad_norm_ does, so that the rounding is the same.
        total = torch.nn.utils.get_total_norm([view for group in self.groups for view in group.gradients])
        norm = float(total)
        applied = math.isfinite(norm)
        if applied:
            masters = [group.master for group in self.groups]
            torch.nn.utils.clip_grads_with_norm_(masters, self.max_grad_norm, total)
            self.scaler.step(self.optimizer)
        self.scaler.update()
        for group in self.groups:
            group.publish()
            group.clear()
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
        for group in self.groups:
            group.publish()

    def fragments(self) -> list[state.Fragment]:
        """Return the master weights of each group of the optimiser."""
        return [group.fragment for group in self.groups]
