"""The traps of loading, quantising and adapting a Qwen2.5-VL, each on the real classes."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForImageTextToText, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from kfood_dist.config import LINEAR_LAYERS, Lora
from kfood_dist.errors import ModelError
from kfood_dist.model.adapters import adapted_modules, attach_lora, read_adapter_facts, save_adapter, target_pattern
from kfood_dist.model.base import LANGUAGE_MODEL, VISION_TOWER, load_config, require_base
from kfood_dist.model.load import count_parameters, linear_types, load_base, quantization_config, require_quantized

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def quantized(tiny_model: Path) -> Any:
    return load_base(str(tiny_model), "nf4", "bf16", "sdpa", CPU)


@pytest.fixture(scope="module")
def real_3b() -> Any:
    """The real 3B shape on the meta device: no memory, no weights."""
    config = Qwen2_5_VLConfig(**json.loads((Path(__file__).parent / "qwen2_5_vl_3b.json").read_text()))
    with torch.device("meta"):
        return Qwen2_5_VLForConditionalGeneration(config)


def test_on_the_real_3b_the_adapter_fits_252_layers_and_is_under_one_percent(real_3b: Any) -> None:
    total_before = count_parameters(real_3b)[1]
    with torch.device("meta"):
        adapted = attach_lora(real_3b.requires_grad_(False), Lora())
    names = adapted_modules(adapted.get_base_model())
    assert len(names) == 36 * 7
    assert all(name.startswith("model.language_model.layers.") for name in names)
    trainable, total = count_parameters(adapted)
    # r × (in + out) per layer: q, o 2048→2048; k, v 2048→256; gate, up 2048→11008; down 11008→2048.
    per_layer = 16 * (2 * (2048 + 2048) + 2 * (2048 + 256) + 3 * (2048 + 11008))
    assert trainable == 36 * per_layer == 29_933_568
    assert total == total_before + trainable
    assert 0.0075 < trainable / total < 0.0085


def test_a_list_of_suffixes_would_also_adapt_the_vision_tower(real_3b: Any) -> None:
    """The trap itself: if this ever fails, the anchored expression is no longer needed."""
    names = [name for name, module in real_3b.named_modules() if isinstance(module, torch.nn.Linear)]
    by_suffix = [n for n in names if n.startswith(VISION_TOWER) and n.rsplit(".", 1)[-1] in LINEAR_LAYERS]
    assert len(by_suffix) == 96
    assert not [n for n in by_suffix if re.fullmatch(target_pattern(LINEAR_LAYERS), n)]


def test_exactly_the_language_model_is_4_bit(quantized: Any) -> None:
    types = linear_types(quantized)
    assert types[LANGUAGE_MODEL] == {"Linear4bit": 4 * 7}
    assert set(types[VISION_TOWER]) == {"Linear"}
    assert types["lm_head"] == {"Linear": 1}


def test_a_skip_list_that_matches_nothing_is_noticed(tiny_model: Path) -> None:
    """`visual` is what older releases called the tower; transformers 5 then quantises it without a word."""
    config = quantization_config(torch.bfloat16)
    config.llm_int8_skip_modules = ["visual", "lm_head"]
    wrong = AutoModelForImageTextToText.from_pretrained(
        tiny_model, quantization_config=config, dtype=torch.bfloat16, device_map={"": CPU}
    )
    assert linear_types(wrong)[VISION_TOWER].get("Linear4bit")
    with pytest.raises(ModelError, match="4-bit layers are not where they belong"):
        require_quantized(wrong)


def test_quantization_is_nf4_double_quantised_and_stored_for_zero3() -> None:
    config = quantization_config(torch.bfloat16)
    assert config.bnb_4bit_quant_type == "nf4"
    assert config.bnb_4bit_use_double_quant
    assert config.bnb_4bit_quant_storage == config.bnb_4bit_compute_dtype == torch.bfloat16


def test_what_is_not_quantised_stays_bf16_and_only_the_adapter_trains(tiny_model: Path) -> None:
    """`prepare_model_for_kbit_training` would turn the vision tower to float32."""
    model = attach_lora(load_base(str(tiny_model), "nf4", "bf16", "sdpa", CPU), Lora())
    dtypes = {p.dtype for name, p in model.named_parameters() if not p.requires_grad}
    assert dtypes == {torch.bfloat16}
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trained
    assert all(".language_model.layers." in name and ".lora_" in name for name in trained)
    assert model.training


def test_fp16_is_made_on_the_host_and_only_then_moved(tiny_model: Path) -> None:
    """The meta device stands for a card: it holds no numbers, so whatever is cast there fails."""
    model = load_base(str(tiny_model), "none", "fp16", "sdpa", torch.device("meta"))
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    halves = {name.startswith(VISION_TOWER): parameter.dtype for name, parameter in model.named_parameters()}
    assert halves == {True: torch.float32, False: torch.float16}


def test_4_bit_parameters_count_as_the_numbers_they_stand_for(tiny_model: Path, quantized: Any) -> None:
    full = AutoModelForImageTextToText.from_pretrained(tiny_model)
    assert count_parameters(quantized)[1] == count_parameters(full)[1]


def test_an_unknown_target_is_refused(tiny_model: Path) -> None:
    model = load_base(str(tiny_model), "none", "fp32", "sdpa", CPU)
    with pytest.raises(ModelError, match=r"\['qkv'\] are not in each of the language model's 4 layers"):
        attach_lora(model, Lora(target_modules=("q_proj", "qkv")))


def test_the_adapter_loads_with_plain_peft(tiny_model: Path, tmp_path: Path) -> None:
    from peft import PeftModel

    model = attach_lora(load_base(str(tiny_model), "none", "fp32", "sdpa", CPU), Lora())
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    save_adapter(model, tmp_path, {"prompt": "이름은?"})
    plain = PeftModel.from_pretrained(
        AutoModelForImageTextToText.from_pretrained(tiny_model, dtype=torch.float32), tmp_path
    )
    ids = torch.tensor([[1, 2, 3, 4]])
    with torch.no_grad():
        assert torch.equal(plain.eval()(input_ids=ids).logits, model.eval()(input_ids=ids).logits)
    assert read_adapter_facts(tmp_path) == {"prompt": "이름은?"}


def test_a_folder_without_an_adapter_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="holds no adapter"):
        read_adapter_facts(tmp_path)


def test_a_base_that_is_not_there_is_refused_with_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"does not exist"):
        require_base(str(tmp_path / "missing"))
    with pytest.raises(ModelError, match=r"lacks config\.json, \*\.safetensors"):
        require_base(str(tmp_path))


def test_a_hub_name_out_of_reach_says_how_to_bring_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ModelError, match=r"hf download nobody/no-such-model --local-dir"):
        require_base("nobody/no-such-model")


def test_a_model_without_a_vision_tower_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "qwen2"}')
    with pytest.raises(ModelError, match="has no vision tower"):
        load_config(str(tmp_path))
