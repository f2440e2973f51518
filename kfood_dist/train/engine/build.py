"""Build the Accelerator and the engine for a recipe.

recipe ──► build_accelerator ──► Accelerator ──► build_engine ──► PlainEngine | ZeroEngine
"""

import os
from collections.abc import Callable
from datetime import timedelta

import torch
from accelerate import Accelerator, DeepSpeedPlugin, InitProcessGroupKwargs
from accelerate.utils import DistributedType

from kfood_dist.config.sections import Recipe
from kfood_dist.data.plan.plan import Plan
from kfood_dist.errors import LaunchError
from kfood_dist.system.world import World, set_collective_timeouts
from kfood_dist.train.engine.base import Engine
from kfood_dist.train.engine.plain import PlainEngine
from kfood_dist.train.engine.zero import ZeroEngine
from kfood_dist.train.engine.zero_config import deepspeed_config


def build_accelerator(recipe: Recipe, plan: Plan, world: World) -> Accelerator:
    """Return the Accelerator for a recipe, and check that it is of the kind in the recipe.

    accelerate does not choose gloo for DeepSpeed on a CPU, and silently changes to DDP if it is asked for the CPU.
    Raises LaunchError if the Accelerator is of another kind, or if DeepSpeed is started without a launcher.
    """
    cpu = not torch.cuda.is_available()
    timeout = collective_timeout(recipe)
    process_group = [InitProcessGroupKwargs(backend="gloo" if cpu else "nccl", timeout=timeout)]
    if recipe.train.zero_stage == 0:
        # PlainEngine has its own weights of 16 bits and loss scale, because accelerate has no fp16 on a CPU.
        accelerator = Accelerator(
            mixed_precision="no", cpu=cpu, kwargs_handlers=process_group if world.size > 1 else []
        )
        if accelerator.distributed_type == DistributedType.DEEPSPEED:
            raise LaunchError("train.zero_stage is 0, but accelerate set up DeepSpeed", "start through launch/train.sh")
        return accelerator
    if cpu:
        _skip_inference_op_build()
    config = deepspeed_config(recipe, plan.accumulation, world.size, plan.micro_batch)
    if "LOCAL_RANK" not in os.environ:  # accelerate needs it to know that there is a group of ranks, even of one
        raise LaunchError(
            f"train.zero_stage is {recipe.train.zero_stage}, and DeepSpeed needs a launcher even for one process",
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
            f"the recipe asks for DeepSpeed, but accelerate set up {accelerator.distributed_type}",
            "start through launch/train.sh, or set train.zero_stage=0 to train without DeepSpeed",
        )
    _limit_deepspeed_waits(timeout)
    return accelerator


def collective_timeout(recipe: Recipe) -> timedelta:
    """Return how long a rank waits for the others before the watchdog starts.

    It is longer than the watchdog's timeout, because the watchdog names the rank that stalls.
    """
    return timedelta(seconds=2 * recipe.train.stall_timeout_s + 60)


def _limit_deepspeed_waits(timeout: timedelta) -> None:
    """Give DeepSpeed's own group of all ranks the same timeout as the first group.

    DeepSpeed loads and reduces on its own group. It makes the group when it first needs it, and sets no timeout
    (deepspeed/utils/groups.py).
    """
    from deepspeed.utils import groups

    groups._get_data_parallel_group()
    set_collective_timeouts(timeout)


def build_engine(
    accelerator: Accelerator,
    module: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    max_grad_norm: float,
    dtype_of: Callable[[str], torch.dtype],
) -> Engine:
    """Wrap the module and its optimiser for the accelerator's kind of training. `dtype_of` is PlainEngine's."""
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        return ZeroEngine(accelerator, module, optimizer)
    return PlainEngine(accelerator, module, optimizer, max_grad_norm, dtype_of)


def _skip_inference_op_build() -> None:
    """Keep DeepSpeed from compiling its shared-memory collectives when several ranks start on a CPU.

    Only its inference engine calls them. Their build takes half a minute and needs a C++ compiler, ninja and Python's
    headers. If one of these is missing, the build fails with a long trace.
    """
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
