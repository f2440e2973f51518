"""The DeepSpeed configuration of a run: memory strategy from the JSON, everything else from the recipe.

    ds_configs/zero<stage>.json + recipe ──► deepspeed_config ──► one dict for DeepSpeed

The recipe sets batch, accumulation, clipping, precision, optimiser and learning rate. If the JSON differs, accelerate
would silently use the JSON, so a difference is refused here.
"""

import json
from pathlib import Path
from typing import Any

from kfood_dist.config.sections import Recipe
from kfood_dist.errors import RecipeError

SHIPPED = Path(__file__).resolve().parents[3] / "ds_configs"

# Loss scaling of fp16, the same with and without DeepSpeed. It starts at 2^16. Each overflow halves it, and this many
# steps in a row without an overflow double it.
INITIAL_SCALE_POWER = 16
SCALE_WINDOW = 2000


# The keys of DeepSpeed's runtime/config.py that a JSON may set: the memory strategy, and what is measured and logged.
_HARMLESS = {
    "zero_optimization", "wall_clock_breakdown", "memory_breakdown", "dump_state", "flops_profiler", "comms_logger",
}  # fmt: skip
# The same for its section `zero_optimization` (runtime/zero/config.py): where tensors are, and how they are sent.
_MEMORY = {
    "stage", "overlap_comm", "contiguous_gradients", "reduce_scatter", "reduce_bucket_size", "allgather_partitions",
    "allgather_bucket_size", "round_robin_gradients", "sub_group_size", "memory_efficient_linear",
    "offload_optimizer", "offload_param", "stage3_max_live_parameters", "stage3_max_reuse_distance",
    "stage3_prefetch_bucket_size", "stage3_param_persistence_threshold", "stage3_model_persistence_threshold",
    "stage3_gather_16bit_weights_on_model_save",
}  # fmt: skip
# The same for `offload_optimizer`. Its other keys split the state or use an optimiser of DeepSpeed.
_OFFLOAD = {"device", "pin_memory"}


def config_path(recipe: Recipe) -> Path:
    """Return the path of a recipe's DeepSpeed JSON: its own, or the shipped one for its ZeRO stage."""
    return recipe.train.deepspeed_config or SHIPPED / f"zero{recipe.train.zero_stage}.json"


def deepspeed_config(
    recipe: Recipe, accumulation: int, world_size: int, micro_batch: int | None = None
) -> dict[str, Any]:
    """Return the complete DeepSpeed configuration. `micro_batch` is the plan's; None: the recipe's.

    Raises RecipeError if the JSON cannot be read or conflicts with the recipe.
    """
    path = config_path(recipe)
    micro_batch = micro_batch or recipe.train.micro_batch_size
    strategy = _read(path)
    owned = {
        "train_batch_size": micro_batch * accumulation * world_size,
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": recipe.optim.max_grad_norm,
        "bf16": _bf16_section(recipe.model.precision),
        "fp16": _fp16_section(recipe.model.precision),
        # Accumulate and sum over ranks in float32: gradients summed in bf16 lose their last bits to the running total.
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
    }
    _require_possible(recipe)
    faults = [
        f"{key} is {strategy[key]} there and {value} in the recipe"
        for key, value in owned.items()
        if key in strategy and strategy[key] != "auto" and strategy[key] != value
    ]
    faults += [
        f"{key} is set there, which says more than how memory is used"
        for key in sorted((set(strategy) - set(owned) - _HARMLESS) | (set(strategy["zero_optimization"]) - _MEMORY))
    ]
    stage = strategy.get("zero_optimization", {}).get("stage")
    if stage != recipe.train.zero_stage:
        faults.append(f"zero_optimization.stage is {stage} there and train.zero_stage is {recipe.train.zero_stage}")
    faults += _offload_faults(strategy["zero_optimization"])
    if faults:
        raise RecipeError(
            f"{path} cannot be used with this recipe: {'; '.join(faults)}",
            "remove these keys from the JSON, or give them the recipe's values; the JSON may set memory use only",
        )
    return {
        **strategy,
        **owned,
        # AdamW8bit is not on DeepSpeed's list, and with offload it would require its own Adam. Our tests cover both.
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 2**31,
    }


def _offload_faults(section: dict[str, Any]) -> list[str]:
    """Return in words what the section offloads but must not.

    Only optimiser state may be offloaded, to the CPU, at ZeRO stages 2 and 3. Tests show that this gives
    the losses of a training without offload.
    """
    tested = "only optimiser state on the CPU at ZeRO stages 2 and 3 is tested against the losses without offload"
    offload = {name: section.get(name) or {} for name in ("offload_optimizer", "offload_param")}
    if faults := [
        f"{name} is {value!r}, not a section" for name, value in offload.items() if not isinstance(value, dict)
    ]:
        return faults
    state = offload["offload_optimizer"].get("device", "none")
    weights = offload["offload_param"].get("device", "none")
    untested = sorted(set(offload["offload_optimizer"]) - _OFFLOAD)
    faults = [f"offload_optimizer.{key} is set there, but {tested}" for key in untested]
    if state not in ("none", "cpu") or (state == "cpu" and section.get("stage") == 1):
        faults.append(f"offload_optimizer to {state} at ZeRO stage {section.get('stage')} is set there, but {tested}")
    if weights != "none":
        faults.append(f"offload_param to {weights} is set there, but {tested}")
    return faults


def _bf16_section(precision: str) -> dict[str, Any]:
    # Set although it is DeepSpeed's default, because a gradient that is not finite must never be applied.
    return {"enabled": True, "check_grad_overflow": True} if precision == "bf16" else {"enabled": False}


def _fp16_section(precision: str) -> dict[str, Any]:
    if precision != "fp16":
        return {"enabled": False}
    return {
        "enabled": True,
        "loss_scale": 0,  # dynamic
        "initial_scale_power": INITIAL_SCALE_POWER,
        "loss_scale_window": SCALE_WINDOW,
        "hysteresis": 1,
        "min_loss_scale": 1,
    }


def _require_possible(recipe: Recipe) -> None:
    """Raise RecipeError if DeepSpeed cannot train in the recipe's precision on this machine."""
    if recipe.model.precision != "fp16":
        return
    if recipe.train.zero_stage == 3:
        raise RecipeError(
            "model.precision fp16 keeps the vision tower in float32, and ZeRO-3 shards weights of one type only",
            "set train.zero_stage to 0, 1 or 2, or model.precision=bf16",
        )
    import torch

    if not torch.cuda.is_available():
        raise RecipeError(
            "model.precision is fp16, which DeepSpeed does not train on a CPU",
            "set train.zero_stage=0, or model.precision=bf16",
        )


def _read(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RecipeError(
            f"DeepSpeed config {path} cannot be read ({error.strerror})",
            "set train.deepspeed_config to a file such as ds_configs/zero2.json",
        ) from None
    except ValueError as error:
        raise RecipeError(f"DeepSpeed config {path} is not JSON ({error})", "correct that line") from None
    if not isinstance(config, dict) or not isinstance(config.get("zero_optimization"), dict):
        raise RecipeError(
            f"DeepSpeed config {path} has no zero_optimization section", "start from ds_configs/zero2.json"
        )
    return config
