"""The frozen base model: a 4-bit NF4 language model, and everything else in the compute type.

Always holds after `load_base`: nothing requires a gradient, and the model is in training mode. With NF4, every linear
layer of the language model is 4-bit, and no other layer is. This is checked by type, because transformers does not warn
of a wrong skip list. Under fp16, the vision tower and the connector are float32, because their activations exceed the
range of fp16 (llama.cpp #17534).
"""

from typing import Any

import torch
from torch import nn

from kfood_dist.errors import ModelError
from kfood_dist.model.base import load_config
from kfood_dist.model.family import LANGUAGE_MODEL, Family, family_of
from kfood_dist.model.files import fetched_folder
from kfood_dist.model.parts import require_quantized
from kfood_dist.model.tensors import require_complete_4bit, require_fitting, require_loaded

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def quantization_config(dtype: torch.dtype, family: Family) -> Any:
    """Return the config for NF4 with double quantisation (QLoRA, arXiv 2305.14314) of only the language model.

    Any list of skipped modules replaces transformers' own default, which skips the head. So the head is in this list
    too. The storage type is the compute type, because ZeRO-3 and FSDP can only shard weights of one floating type.
    """
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        bnb_4bit_quant_storage=dtype,
        llm_int8_skip_modules=[path for part, path in family.paths.items() if part != LANGUAGE_MODEL],
    )


def load_base(base: str, quantization: str, precision: str, attention: str, device: torch.device) -> Any:
    """Load a base model from a folder or the hub, frozen, on `device`, in training mode.

    It is in training mode from the start. On a CPU with AVX512-BF16, the first forward pass in evaluation mode repacks
    4-bit weights for inference, and training after that is wrong or fails.

    Raises ModelError if the base cannot be loaded, lacks a tensor, has one in another shape or one too many. The error
    names the tensors. It comes before the weights are read, unless the files are already 4-bit.
    """
    from safetensors import SafetensorError
    from transformers import AutoModelForImageTextToText
    from transformers.integrations import is_deepspeed_zero3_enabled

    dtype = DTYPES[precision]
    config = load_config(base)
    family = family_of(config)
    options: dict[str, Any] = {"use_safetensors": True}  # never a pickle
    if quantization == "nf4":
        options["quantization_config"] = quantization_config(dtype, family)
    # In float32 a 3B model takes 15 GB, more than many cards without bf16 have.
    cast_on_host = precision == "fp16" and quantization == "none"
    if not is_deepspeed_zero3_enabled():  # ZeRO-3 places the weights itself, and refuses a device map
        options["device_map"] = {"": "cpu" if cast_on_host else device}
    # Under fp16 all is read as float32 first, because fp16 has neither the range nor the small numbers of a bf16 file.
    options["dtype"] = torch.float32 if precision == "fp16" else dtype
    try:
        folder = fetched_folder(base)
        is_packed = hasattr(config, "quantization_config")  # the files are 4-bit: transformers' own check is used
        if is_packed:
            require_complete_4bit(base, folder)
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
    model.name_or_path = model.config.name_or_path = base  # adapters name this as their base, not the cache's folder
    if quantization == "nf4":
        require_quantized(model, family)
    if precision == "fp16":
        cast_to_fp16(model, family)
    if cast_on_host:
        model.to(device)
    return model.requires_grad_(False).train()


def compute_type(name: str, family: Family, precision: str) -> torch.dtype:
    """Return the type that a trained parameter computes in, by its name in an Objective."""
    path = name.partition("base_model.model.")[2]
    return torch.float32 if precision == "fp16" and family.is_visual(path) else DTYPES[precision]


def cast_to_fp16(model: nn.Module, family: Family) -> None:
    """Cast the float32 weights of the language model and its head to fp16.

    Raises ModelError if a weight is outside the range of fp16.
    """
    for name, parameter in model.named_parameters():
        if parameter.dtype != torch.float32 or family.is_visual(name):
            continue
        half = parameter.detach().half()
        if not torch.equal(half.isfinite(), parameter.isfinite()):
            raise ModelError(f"{name} has weights outside the range of fp16", "set model.precision to bf16 or fp32")
        parameter.data = half
