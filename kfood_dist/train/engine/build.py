"""Builds the Accelerator and the engine that a recipe asks for.

recipe ──► build_accelerator ──► Accelerator ──► build_engine ──► PlainEngine | ZeroEngine
"""

import os
from datetime import timedelta

import torch
from accelerate import Accelerator, DeepSpeedPlugin, InitProcessGroupKwargs
from accelerate.utils import DistributedType

from kfood_dist.config.sections import Recipe
from kfood_dist.data.plan.plan import Plan
from kfood_dist.errors import LaunchError
from kfood_dist.system.world import World, limit_waits
from kfood_dist.train.engine.base import Engine
from kfood_dist.train.engine.plain import PlainEngine
from kfood_dist.train.engine.zero import ZeroEngine
from kfood_dist.train.engine.zero_config import deepspeed_config


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
    if "LOCAL_RANK" not in os.environ:  # by which accelerate knows that there is a group of ranks, if only of one
        raise LaunchError(
            f"train.zero_stage is {recipe.train.zero_stage}, and DeepSpeed needs a launcher for one process too",
            "start through launch/train.sh, or set train.zero_stage=0",
        )
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


def _spare_inference_op() -> None:
    """Keep DeepSpeed from compiling its shared-memory collectives when several ranks start on a CPU.

    Only its inference engine calls them; building them takes half a minute, a C++ compiler, ninja and Python's headers,
    and fails with a long trace where one of these is missing.
    """
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
