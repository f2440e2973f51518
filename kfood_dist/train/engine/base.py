"""One optimiser step on whatever runs below: DeepSpeed ZeRO, DDP, or a single process.

    build_accelerator ──► Accelerator ──► build_engine ──► micro_step × n, step ──► Update: gradient norm, applied

Both engines take a loss that is already normalised over the global batch, and average gradients over ranks; the
caller multiplies by the world size. Neither divides by the accumulation again. Both leave an update out, on all ranks
alike, if the summed gradient is not finite, and see to it that a loss that is not finite makes it so.
"""

import math
from collections.abc import Iterator
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from accelerate import Accelerator, DeepSpeedPlugin, InitProcessGroupKwargs
from accelerate.utils import DistributedType

from kfood_dist.config.recipe import Recipe
from kfood_dist.data.batch.collate import Batch
from kfood_dist.data.plan.plan import Plan
from kfood_dist.errors import LaunchError
from kfood_dist.model.load import DTYPES
from kfood_dist.system.processes import World, limit_waits
from kfood_dist.train.engine import state
from kfood_dist.train.engine.zero_config import INITIAL_SCALE_POWER, SCALE_WINDOW, deepspeed_config

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
        """What fp16's loss scaling remembers: `scale`, and `good_steps` since it last changed; {} without it."""

    @scale_state.setter
    def scale_state(self, state: dict[str, float]) -> None: ...

    def save(self, folder: Path) -> None:
        """Write this rank's part of the master weights and optimiser state, if it has one of its own."""

    def load(self, folder: Path) -> None:
        """Read back what any number of ranks saved, with or without ZeRO. A collective."""


def build_accelerator(recipe: Recipe, plan: Plan, world: World) -> Accelerator:
    """The Accelerator a recipe asks for, checked to be of the stated kind.

    accelerate does not choose gloo for DeepSpeed on CPU, and turns silently into DDP when asked for the CPU.
    """
    cpu = not torch.cuda.is_available()
    timeout = collective_timeout(recipe)
    process_group = [InitProcessGroupKwargs(backend="gloo" if cpu else "nccl", timeout=timeout)]
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
    config = deepspeed_config(recipe, plan.accumulation, world.size, plan.micro_batch)
    accelerator = Accelerator(
        mixed_precision={"fp32": "no"}.get(recipe.model.precision, recipe.model.precision),
        gradient_accumulation_steps=plan.accumulation,
        deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=config),
        kwargs_handlers=process_group,
    )
    if accelerator.distributed_type != DistributedType.DEEPSPEED:
        raise LaunchError(
            f"DeepSpeed was asked for, but accelerate set up {accelerator.distributed_type}",
            "start through launch/train.sh, or set train.zero_stage=0 to train without DeepSpeed",
        )
    _limit_deepspeed_waits(timeout)
    return accelerator


def collective_timeout(recipe: Recipe) -> timedelta:
    """How long a rank waits for others before the watch begins: longer than the watch does, which names who stalls."""
    return timedelta(seconds=2 * recipe.train.stall_timeout_s + 60)


def _limit_deepspeed_waits(timeout: timedelta) -> None:
    """Let DeepSpeed's own group of all ranks wait as long as the first: it loads and reduces on that one.

    DeepSpeed makes the group when it is first needed, and gives it no timeout (deepspeed/utils/groups.py).
    """
    from deepspeed.utils import groups

    groups._get_data_parallel_group()
    limit_waits(timeout)


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

    def __init__(self, accelerator: Accelerator, module: torch.nn.Module, optimizer: torch.optim.Optimizer):
        self.trainable: dict[str, Any] = {n: p for n, p in module.named_parameters() if p.requires_grad}
        fp16 = accelerator.mixed_precision == "fp16"
        frozen = [p for p in module.parameters() if not p.requires_grad]
        tower = {p: p.data for p in frozen if fp16 and p.dtype == torch.float32}
        self.engine, _ = accelerator.prepare(module, optimizer)
        self.optimizer = optimizer
        self.rank = accelerator.process_index
        self.stage = self.engine.zero_optimization_stage()
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
        loss_scale = self.scale_state.get("scale")
        self.engine.step()
        return Update(float(self.engine.get_global_grad_norm()), self.engine.was_step_applied(), loss_scale)

    @property
    def scale_state(self) -> dict[str, float]:
        if not self.engine.fp16_enabled():
            return {}
        scaler = self.engine.optimizer.loss_scaler
        return {
            "scale": scaler.cur_scale,
            "good_steps": (scaler.cur_iter - scaler.last_overflow_iter - 1) % scaler.scale_window,
        }

    @scale_state.setter
    def scale_state(self, state: dict[str, float]) -> None:
        scaler = self.engine.optimizer.loss_scaler
        scaler.cur_scale, scaler.cur_iter, scaler.last_overflow_iter = state["scale"], int(state["good_steps"]), -1

    def save(self, folder: Path) -> None:
        state.save(folder / state.file_name(self.rank), self.held(), self.optimizer, self.scale_state)

    def load(self, folder: Path) -> None:
        with state.Saved(folder) as saved:
            saved.require_parameters(
                {n: p.ds_numel if self.stage == 3 else p.numel() for n, p in self.trainable.items()}
            )
            state.load(saved, self.held(), self.optimizer)
            if saved.extra:
                self.scale_state = saved.extra
        self._refresh_weights()

    def held(self) -> list[state.Held]:
        """The flat float32 tensors of this rank, and which parameters lie in them."""
        inner = self.engine.optimizer
        if self.stage == 3:
            return [
                state.Held(flat, tuple(self._stretches_of_stage_3(group)))
                for flat, group in zip(inner.fp32_partitioned_groups_flat, inner.fp16_groups, strict=True)
            ]
        # DeepSpeed takes its BF16_Optimizer for stage 1 with float32 accumulation, which names them otherwise.
        bf16 = hasattr(inner, "fp32_groups_flat_partition")
        flats = inner.fp32_groups_flat_partition if bf16 else inner.single_partition_of_fp32_groups
        stretches: list[list[state.Stretch]] = [[] for _ in flats]
        for name, parameter in self.trainable.items():
            if (mapping := parameter._hp_mapping) is not None:  # None: none of it lies on this rank
                part, place = mapping.lp_fragment_address, mapping.hp_fragment_address
                stretches[mapping.param_group_index].append(state.Stretch(name, part.start, part.numel, place.start))
        return [state.Held(flat, tuple(found)) for flat, found in zip(flats, stretches, strict=True)]

    def _stretches_of_stage_3(self, group: list[Any]) -> Iterator[state.Stretch]:
        """Stage 3 cuts each parameter by itself, into equal parts of which the last may be short or empty."""
        names = {id(parameter): name for name, parameter in self.trainable.items()}
        inner = self.engine.optimizer
        for parameter in group:
            _, at, size = inner.grad_position[inner.get_param_id(parameter)]
            start = self.rank * size
            if (length := min(size, parameter.ds_numel - start)) > 0:
                yield state.Stretch(names[id(parameter)], start, length, at)

    def _refresh_weights(self) -> None:
        """Make the weights that the model computes with those of the masters, as a step's end does."""
        inner = self.engine.optimizer
        if self.stage < 3:
            inner.update_lp_params()
            return
        inner.checkpoint_event_prologue()
        for i in range(len(inner.fp16_groups)):
            inner._reassign_or_swap_out_partitioned_parameters(i)
        inner.checkpoint_event_epilogue()


class PlainEngine:
    """No sharding: DDP over several ranks, or a single process."""

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
        if not self.scaler.is_enabled():
            return {}
        return {"scale": self.scaler.get_scale(), "good_steps": self.scaler.state_dict()["_growth_tracker"]}

    @scale_state.setter
    def scale_state(self, state: dict[str, float]) -> None:
        known = {"scale": state["scale"], "_growth_tracker": int(state["good_steps"])}
        self.scaler.load_state_dict(self.scaler.state_dict() | known)

    def save(self, folder: Path) -> None:
        if self.accelerator.is_main_process:  # every rank has the same
            state.save(folder / state.file_name(0), self.held(), self.optimizer, self.scale_state)

    def load(self, folder: Path) -> None:
        with state.Saved(folder) as saved:
            saved.require_parameters({name: parameter.numel() for name, parameter in self.trainable.items()})
            state.load(saved, self.held(), self.optimizer)
            if saved.extra:
                self.scale_state = saved.extra

    def held(self) -> list[state.Held]:
        """Every parameter whole: the weights the model computes with are the master weights."""
        return [
            state.Held(parameter, (state.Stretch(name, 0, parameter.numel(), 0),))
            for name, parameter in self.trainable.items()
        ]


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
