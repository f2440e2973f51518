"""One optimiser step on whatever runs below: DeepSpeed ZeRO, DDP, or a single process.

    build_accelerator ──► Accelerator ──► build_engine ──► micro_step × n, step ──► Update: gradient norm, applied

Both engines take a loss that is already normalised over the global batch, and average gradients over ranks; the
caller multiplies by the world size. Neither divides by the accumulation again. Both leave an update out, on all ranks
alike, if the summed gradient is not finite, and see to it that a loss that is not finite makes it so.
"""

import math
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from accelerate import Accelerator, DeepSpeedPlugin, InitProcessGroupKwargs
from accelerate.utils import DistributedType

from kfood_dist.config import Recipe
from kfood_dist.data.collate import Batch
from kfood_dist.errors import CheckpointError, LaunchError
from kfood_dist.model.load import DTYPES
from kfood_dist.runtime import World
from kfood_dist.train.zero import INITIAL_SCALE_POWER, SCALE_WINDOW, deepspeed_config

Output = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # AnswerLoss.forward: loss, hits, losses


class Update(NamedTuple):
    """What came of a step."""

    grad_norm: float  # global, before clipping; not finite if the update was left out
    applied: bool
    loss_scale: float | None  # what the loss was multiplied with, under fp16


class Engine(Protocol):
    """What the training loop needs of its engine."""

    optimizer: torch.optim.Optimizer

    def forward(self, batch: Batch) -> Output:
        """`AnswerLoss.forward`, without a backward pass."""

    def micro_step(self, batch: Batch, scale: float, last: bool) -> Output:
        """Forward and backward of one micro-batch's loss × scale; on the `last` one all ranks' are summed."""

    def step(self, learning_rate: float) -> Update:
        """Clip, update, clear the gradients; if they are not finite, clear them alone. The same on every rank."""

    @property
    def scale_state(self) -> dict[str, float]:
        """What fp16's loss scaling remembers from step to step, to be set again on resume; {} without it."""

    @scale_state.setter
    def scale_state(self, state: dict[str, float]) -> None: ...

    def save(self, folder: Path) -> None:
        """Write trainable weights and optimiser state; every rank calls it."""

    def load(self, folder: Path) -> None:
        """Read back what `save` wrote on the same number of ranks."""


def build_accelerator(recipe: Recipe, accumulation: int, world: World) -> Accelerator:
    """The Accelerator a recipe asks for, checked to be of the stated kind.

    accelerate does not choose gloo for DeepSpeed on CPU, and turns silently into DDP when asked for the CPU.
    """
    cpu = not torch.cuda.is_available()
    process_group = [InitProcessGroupKwargs(backend="gloo")] if cpu else []
    if recipe.train.zero_stage == 0:
        # PlainEngine casts and scales itself: accelerate has no fp16 on a CPU.
        accelerator = Accelerator(
            mixed_precision="no", cpu=cpu, kwargs_handlers=process_group if world.size > 1 else []
        )
        if accelerator.distributed_type == DistributedType.DEEPSPEED:
            raise LaunchError("train.zero_stage is 0, but accelerate set up DeepSpeed", "start through launch/train.sh")
        return accelerator
    if cpu:
        _spare_inference_op()
    config = deepspeed_config(recipe, accumulation, world.size)
    accelerator = Accelerator(
        mixed_precision={"fp32": "no"}.get(recipe.model.precision, recipe.model.precision),
        gradient_accumulation_steps=accumulation,
        deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=config),
        kwargs_handlers=process_group,
    )
    if accelerator.distributed_type != DistributedType.DEEPSPEED:
        raise LaunchError(
            f"DeepSpeed was asked for, but accelerate set up {accelerator.distributed_type}",
            "start through launch/train.sh, or set train.zero_stage=0 to train without DeepSpeed",
        )
    return accelerator


def _spare_inference_op() -> None:
    """Keep DeepSpeed from compiling its shared-memory collectives when several ranks start on a CPU.

    Only its inference engine calls them; building them takes half a minute, a C++ compiler, ninja and Python's headers,
    and fails with a long trace where one of these is missing.
    """
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def build_engine(
    accelerator: Accelerator,
    module: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    max_grad_norm: float,
    precision: str,
) -> Engine:
    """Wrap the module and its optimiser for the accelerator's kind of training."""
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        return ZeroEngine(accelerator, module, optimizer)
    return PlainEngine(accelerator, module, optimizer, max_grad_norm, precision)


def _scaled(loss: torch.Tensor, scale: float) -> torch.Tensor:
    """loss × scale, with a gradient of NaN throughout if the loss is not finite.

    A loss may be infinite and its gradient not; summed over ranks, the NaN tells every rank to leave the update out.
    """
    return loss * (scale + 0.0 * loss.detach())


class ZeroEngine:
    """DeepSpeed ZeRO. Clipping is DeepSpeed's own, configured from the recipe."""

    _TAG = "zero"
    _SCALE_STATE = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")  # of DeepSpeed's DynamicLossScaler

    def __init__(self, accelerator: Accelerator, module: torch.nn.Module, optimizer: torch.optim.Optimizer):
        fp16 = accelerator.mixed_precision == "fp16"
        frozen = [p for p in module.parameters() if not p.requires_grad]
        tower = {p: p.data for p in frozen if fp16 and p.dtype == torch.float32}
        self.engine, _ = accelerator.prepare(module, optimizer)
        self.optimizer = optimizer
        if fp16:
            # DeepSpeed has turned every weight into fp16; the tower must stay in float32.
            for parameter, data in tower.items():
                parameter.data = data
            # At the least scale it would end the run with a bare Exception; the loop's own limit comes first.
            self.engine.optimizer.loss_scaler.raise_error_at_min_scale = False

    def forward(self, batch: Batch) -> Output:
        return self.engine(batch)

    def micro_step(self, batch: Batch, scale: float, last: bool) -> Output:
        self.engine.set_gradient_accumulation_boundary(last)
        loss, hits, losses = self.engine(batch)
        self.engine.backward(_scaled(loss, scale), scale_wrt_gas=False)
        return loss.detach(), hits, losses

    def step(self, learning_rate: float) -> Update:
        for group in self.engine.optimizer.param_groups:
            group["lr"] = learning_rate
        loss_scale = self.scale_state.get("cur_scale")
        self.engine.step()
        return Update(float(self.engine.get_global_grad_norm()), self.engine.was_step_applied(), loss_scale)

    @property
    def scale_state(self) -> dict[str, float]:
        if not self.engine.fp16_enabled():
            return {}
        return {name: getattr(self.engine.optimizer.loss_scaler, name) for name in self._SCALE_STATE}

    @scale_state.setter
    def scale_state(self, state: dict[str, float]) -> None:
        for name, value in state.items():
            setattr(self.engine.optimizer.loss_scaler, name, value)

    def save(self, folder: Path) -> None:
        self.engine.save_checkpoint(str(folder), tag=self._TAG, save_latest=False, exclude_frozen_parameters=True)

    def load(self, folder: Path) -> None:
        loaded, _ = self.engine.load_checkpoint(
            str(folder), tag=self._TAG, load_module_strict=False, load_lr_scheduler_states=False
        )
        if loaded is None:
            raise CheckpointError(f"{folder} holds no DeepSpeed state", "delete that checkpoint folder and start again")


class PlainEngine:
    """No sharding: DDP over several ranks, or a single process."""

    _FILE = "state-of-all-ranks.pt"

    def __init__(
        self,
        accelerator: Accelerator,
        module: torch.nn.Module,
        optimizer: torch.optim.Optimizer,
        max_grad_norm: float,
        precision: str,
    ):
        self.accelerator = accelerator
        # The model lies on its device already, and moving 4-bit weights again is not always allowed.
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

    def forward(self, batch: Batch) -> Output:
        with torch.autocast(self.accelerator.device.type, self.dtype, enabled=self.dtype != torch.float32):
            return self.module(batch)

    def micro_step(self, batch: Batch, scale: float, last: bool) -> Output:
        with nullcontext() if last else self.accelerator.no_sync(self.module):
            loss, hits, losses = self.forward(batch)
            self.scaler.scale(_scaled(loss, scale)).backward()
        return loss.detach(), hits, losses

    def step(self, learning_rate: float) -> Update:
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        loss_scale = self.scaler.get_scale() if self.scaler.is_enabled() else None
        self.scaler.unscale_(self.optimizer)
        # After DDP's sum every rank has the same gradients, and so comes to the same decision.
        norm = float(torch.nn.utils.clip_grad_norm_(self.trainable.values(), self.max_grad_norm))
        applied = math.isfinite(norm)
        if applied:
            self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        return Update(norm, applied, loss_scale)

    @property
    def scale_state(self) -> dict[str, float]:
        return self.scaler.state_dict()

    @scale_state.setter
    def scale_state(self, state: dict[str, float]) -> None:
        if state:
            self.scaler.load_state_dict(state)

    def save(self, folder: Path) -> None:
        if self.accelerator.is_main_process:
            weights = {name: parameter.detach() for name, parameter in self.trainable.items()}
            torch.save({"weights": weights, "optimizer": self.optimizer.state_dict()}, folder / self._FILE)

    def load(self, folder: Path) -> None:
        state = torch.load(folder / self._FILE, map_location="cpu", weights_only=True)
        with torch.no_grad():
            for name, parameter in self.trainable.items():
                parameter.copy_(state["weights"][name])
        self.optimizer.load_state_dict(state["optimizer"])


def adapter_weights(model: Any) -> dict[str, torch.Tensor]:
    """The adapter's whole weights by PEFT's names; under ZeRO-3, which shards them, a collective."""
    from peft import get_peft_model_state_dict

    sharded = [p for p in model.parameters() if p.requires_grad and hasattr(p, "ds_id")]
    if not sharded:
        return get_peft_model_state_dict(model, save_embedding_layers=False)
    import deepspeed

    with deepspeed.zero.GatheredParameters(sharded):
        return {
            name: weight.clone()
            for name, weight in get_peft_model_state_dict(model, save_embedding_layers=False).items()
        }
