"""The frozen base: 4-bit NF4 language model, everything else in the compute type.

Always holds after `load_base`: every linear layer of the language model is 4-bit and none elsewhere (checked by
type, since a wrong skip list is silent in transformers), nothing requires a gradient, the model is in training mode;
under fp16 vision tower and connector are float32, because their activations outgrow fp16 (llama.cpp #17534).
"""

from typing import Any

import torch
from torch import nn

from kfood_dist.errors import ModelError
from kfood_dist.model.base import load_config
from kfood_dist.model.family import LANGUAGE_MODEL, Family, family_of
from kfood_dist.model.files import fetched_folder
from kfood_dist.model.parts import require_quantized
from kfood_dist.model.tensors import require_fitting, require_loaded, require_whole_packs

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def quantization_config(dtype: torch.dtype, family: Family) -> Any:
    """NF4 with double quantisation (QLoRA, arXiv 2305.14314), of the language model alone.

    Naming any list drops transformers' own default that spares the head, so it stands here too. Storage has the
    compute type because ZeRO-3 and FSDP can only shard weights of one floating type.
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

    Training mode from the start, because on a CPU with AVX512-BF16 the first forward in evaluation mode repacks
    4-bit weights for inference, after which training is wrong or fails. Raises ModelError, also for a base that lacks a
    tensor, has one in another shape or one too many: by name, and before the weights are read.
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
    # In float32 a 3B model takes 15 GB, more than many a card without bf16 has.
    cast_on_host = precision == "fp16" and quantization == "none"
    if not is_deepspeed_zero3_enabled():  # which places the weights itself, and refuses to be told where
        options["device_map"] = {"": "cpu" if cast_on_host else device}
    # Under fp16 all is read as float32 first: fp16 has neither the range nor the small numbers of a bf16 file.
    options["dtype"] = torch.float32 if precision == "fp16" else dtype
    try:
        folder = fetched_folder(base)
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
        require_quantized(model, family)
    if precision == "fp16":
        cast_to_fp16(model, family)
    if cast_on_host:
        model.to(device)
    return model.requires_grad_(False).train()


def cast_to_fp16(model: nn.Module, family: Family) -> None:
    """Turn what is float32 in the language model and its head into fp16.

    Raises ModelError for a weight beyond fp16's range.
    """
    for name, parameter in model.named_parameters():
        if parameter.dtype != torch.float32 or family.sees(name):
            continue
        half = parameter.detach().half()
        if not torch.equal(half.isfinite(), parameter.isfinite()):
            raise ModelError(f"{name} holds weights that fp16 cannot", "set model.precision to bf16 or fp32")
        parameter.data = half
