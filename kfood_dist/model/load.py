"""The frozen base: 4-bit NF4 language model, everything else in the compute type.

Always holds after `load_base`: every linear layer of the language model is 4-bit and none elsewhere (checked by
type, since a wrong skip list is silent in transformers), nothing requires a gradient, the model is in training mode;
under fp16 the vision tower is float32, because its activations outgrow fp16 (llama.cpp #17534).
"""

from collections import Counter
from typing import Any

import torch
from torch import nn

from kfood_dist.errors import ModelError
from kfood_dist.model.base import HEAD, LANGUAGE_MODEL, VISION_TOWER, load_config
from kfood_dist.model.files import fetched_folder
from kfood_dist.model.tensors import require_fitting, require_loaded, require_whole_packs

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def quantization_config(dtype: torch.dtype) -> Any:
    """NF4 with double quantisation (QLoRA, arXiv 2305.14314), vision tower and head left out.

    Naming any list drops transformers' own default that spares the head, so both stand here. Storage has the
    compute type because ZeRO-3 and FSDP can only shard weights of one floating type.
    """
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        bnb_4bit_quant_storage=dtype,
        llm_int8_skip_modules=[VISION_TOWER, HEAD],
    )


def load_base(base: str, quantization: str, precision: str, attention: str, device: torch.device) -> Any:
    """Load a Qwen2.5-VL from a folder or the hub, frozen, on `device`, in training mode.

    Training mode from the start, because on a CPU with AVX512-BF16 the first forward in evaluation mode repacks
    4-bit weights for inference, after which training is wrong or fails. Raises ModelError, also for a base that lacks a
    tensor, has one in another shape or one too many: by name, and before the weights are read.
    """
    from safetensors import SafetensorError
    from transformers import AutoModelForImageTextToText
    from transformers.integrations import is_deepspeed_zero3_enabled

    dtype = DTYPES[precision]
    options: dict[str, Any] = {"use_safetensors": True}  # never a pickle
    if quantization == "nf4":
        options["quantization_config"] = quantization_config(dtype)
    # In float32 a 3B model takes 15 GB, more than many a card without bf16 has.
    halved_on_host = precision == "fp16" and quantization == "none"
    if not is_deepspeed_zero3_enabled():  # which places the weights itself, and refuses to be told where
        options["device_map"] = {"": "cpu" if halved_on_host else device}
    # Under fp16 all is read as float32 first: fp16 has neither the range nor the small numbers of a bf16 file.
    options["dtype"] = torch.float32 if precision == "fp16" else dtype
    try:
        config, folder = load_config(base), fetched_folder(base)
        is_packed = hasattr(config, "quantization_config")  # 4-bit in its files: transformers' own look must do
        if is_packed:
            require_whole_packs(base, folder)
        else:
            require_fitting(base, folder, config)
        model, found = AutoModelForImageTextToText.from_pretrained(
            folder,
            attn_implementation=attention,
            ignore_mismatched_sizes=is_packed,
            output_loading_info=True,
            **options,
        )
        if is_packed:
            require_loaded(base, found)
    except (OSError, ValueError, ImportError, SafetensorError) as error:
        raise ModelError(
            f"base model {base} cannot be loaded ({type(error).__name__}: {str(error).strip()[:300]})",
            "run `kfood doctor`, then check model.base, model.quantization and model.attention",
        ) from error
    model.name_or_path = model.config.name_or_path = base  # what adapters name as their base: never the cache's folder
    if quantization == "nf4":
        require_quantized(model)
    if precision == "fp16":
        halve(model)
    if halved_on_host:
        model.to(device)
    return model.requires_grad_(False).train()


def halve(model: nn.Module) -> None:
    """Turn what is float32 outside the vision tower into fp16. Raises ModelError for a weight beyond fp16's range."""
    for name, parameter in model.named_parameters():
        if parameter.dtype != torch.float32 or name.startswith(f"{VISION_TOWER}."):
            continue
        half = parameter.detach().half()
        if not torch.equal(half.isfinite(), parameter.isfinite()):
            raise ModelError(f"{name} holds weights that fp16 cannot", "set model.precision to bf16 or fp32")
        parameter.data = half


def recompute_activations(module: Any) -> None:
    """Recompute a transformers model's activations in the backward pass instead of keeping them.

    Not re-entrant: that would need inputs which require gradients, and the hook for it in transformers 5 also reaches
    the frozen vision tower.
    """
    # transformers renamed the method during 5.x.
    enable = getattr(module, "activation_checkpointing_enable", None) or module.gradient_checkpointing_enable
    enable({"use_reentrant": False})
    module.disable_input_require_grads()  # it was enabled along, whether needed or not


def linear_types(model: nn.Module) -> dict[str, dict[str, int]]:
    """How many linear layers of which type each part has, adapters aside: {"model.visual": {"Linear": 5}, …}."""
    parts: dict[str, Counter[str]] = {LANGUAGE_MODEL: Counter(), VISION_TOWER: Counter(), HEAD: Counter()}
    for name, module in model.named_modules():
        for part, counts in parts.items():
            if name.startswith(part) and isinstance(module, nn.Linear) and ".lora_" not in name:
                counts[type(module).__name__] += 1
    return {part: dict(counts) for part, counts in parts.items()}


def require_quantized(model: nn.Module) -> None:
    """Raise ModelError unless exactly the language model's linear layers are 4-bit."""
    types = linear_types(model)
    inside = set(types[LANGUAGE_MODEL])
    outside = set(types[VISION_TOWER]) | set(types[HEAD])
    if inside != {"Linear4bit"} or "Linear4bit" in outside:
        raise ModelError(
            f"4-bit layers are not where they belong: {types}",
            "use the versions of launch/constraints.txt; a newer transformers may have renamed the model's parts",
        )


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """(trainable, total) parameters; a 4-bit weight counts as the numbers it stands for, not its packed bytes."""
    trainable = total = 0
    for parameter in model.parameters():
        state = getattr(parameter, "quant_state", None)
        numel = state.shape.numel() if state is not None else getattr(parameter, "ds_numel", parameter.numel())
        total += numel
        trainable += numel if parameter.requires_grad else 0
    return trainable, total
