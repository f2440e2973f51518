"""Common mistakes in loading, quantising and adapting a Qwen2.5-VL, each tested on the real classes."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from asking import adapted
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from kfood_dist.config.sections import LINEAR_LAYERS, Lora, Parts
from kfood_dist.errors import ModelError
from kfood_dist.model.adapters import adapted_modules, read_adapter_facts, save_adapter, target_pattern
from kfood_dist.model.base import load_config
from kfood_dist.model.family import FAMILIES
from kfood_dist.model.files import require_base
from kfood_dist.model.load import load_base, quantization_config
from kfood_dist.model.parts import apply_parts, count_parameters, linear_types, require_quantized

CPU = torch.device("cpu")
QWEN = FAMILIES["qwen2_5_vl"]


@pytest.fixture(scope="module")
def quantized(tiny_model: Path) -> Any:
    return load_base(str(tiny_model), "nf4", "bf16", "sdpa", CPU)


@pytest.fixture(scope="module")
def real_3b() -> Any:
    """The real 3B model on the meta device, which takes no memory and has no weights."""
    config = Qwen2_5_VLConfig(**json.loads((Path(__file__).parent / "qwen2_5_vl_3b.json").read_text()))
    with torch.device("meta"):
        return Qwen2_5_VLForConditionalGeneration(config)


def test_on_the_real_3b_the_adapter_fits_252_layers_and_is_under_one_percent(real_3b: Any) -> None:
    total_before = count_parameters(real_3b)[1]
    with torch.device("meta"):
        model = apply_parts(real_3b.requires_grad_(False), Parts(), Lora())
    names = adapted_modules(model.get_base_model())
    assert len(names) == 36 * 7
    assert all(name.startswith("model.language_model.layers.") for name in names)
    trainable, total = count_parameters(model)
    # r × (in + out) per layer: q, o 2048→2048; k, v 2048→256; gate, up 2048→11008; down 11008→2048.
    per_layer = 16 * (2 * (2048 + 2048) + 2 * (2048 + 256) + 3 * (2048 + 11008))
    assert trainable == 36 * per_layer == 29_933_568
    assert total == total_before + trainable
    assert 0.0075 < trainable / total < 0.0085


def test_a_list_of_suffixes_would_also_adapt_the_vision_tower(real_3b: Any) -> None:
    """This is why `target_pattern` is anchored. If this test ever fails, an anchored expression is no longer needed."""
    names = [name for name, module in real_3b.named_modules() if isinstance(module, torch.nn.Linear)]
    by_suffix = [n for n in names if n.startswith(QWEN.tower) and n.rsplit(".", 1)[-1] in LINEAR_LAYERS]
    assert len(by_suffix) == 96
    assert not [n for n in by_suffix if re.fullmatch(target_pattern(QWEN, LINEAR_LAYERS), n)]


def test_exactly_the_language_model_is_4_bit(quantized: Any) -> None:
    types = linear_types(quantized, QWEN)
    assert types["language_model"] == {"Linear4bit": 4 * 7}
    assert set(types["tower"]) == {"Linear"}
    assert types["connector"] == {"Linear": 2}
    assert types["head"] == {"Linear": 1}


def test_a_layer_that_belongs_to_no_part_is_an_error(tiny_model: Path) -> None:
    model = load_base(str(tiny_model), "none", "fp32", "sdpa", CPU)
    model.value_head = torch.nn.Linear(2, 2)
    with pytest.raises(ModelError, match=r"value_head belongs to no known part of a Qwen2\.5-VL"):
        apply_parts(model, Parts(), Lora())


def test_a_skip_list_that_matches_nothing_is_noticed(tiny_model: Path) -> None:
    """Older releases called the tower `visual`. With that name, transformers 5 quantises it without a warning."""
    config = quantization_config(torch.bfloat16, QWEN)
    config.llm_int8_skip_modules = ["visual", "lm_head"]
    wrong = AutoModelForImageTextToText.from_pretrained(
        tiny_model, quantization_config=config, dtype=torch.bfloat16, device_map={"": CPU}
    )
    assert linear_types(wrong, QWEN)["tower"].get("Linear4bit")
    with pytest.raises(ModelError, match="4-bit layers are not where they belong"):
        require_quantized(wrong, QWEN)


def test_quantization_is_nf4_double_quantised_and_stored_for_zero3() -> None:
    config = quantization_config(torch.bfloat16, QWEN)
    assert config.bnb_4bit_quant_type == "nf4"
    assert config.bnb_4bit_use_double_quant
    assert config.bnb_4bit_quant_storage == config.bnb_4bit_compute_dtype == torch.bfloat16


def test_unquantised_weights_stay_bf16_and_only_the_adapter_trains(tiny_model: Path) -> None:
    """`prepare_model_for_kbit_training` would cast the vision tower to float32."""
    model = adapted(tiny_model, "nf4", "bf16")
    dtypes = {p.dtype for name, p in model.named_parameters() if not p.requires_grad}
    assert dtypes == {torch.bfloat16}
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trained
    assert all(".language_model.layers." in name and ".lora_" in name for name in trained)
    assert model.training


def test_weights_are_cast_to_fp16_on_the_host_and_then_moved(tiny_model: Path) -> None:
    """The meta device takes the place of a GPU: it holds no numbers, so a cast on it fails."""
    model = load_base(str(tiny_model), "none", "fp16", "sdpa", torch.device("meta"))
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    halves = {name.startswith(QWEN.tower): parameter.dtype for name, parameter in model.named_parameters()}
    assert halves == {True: torch.float32, False: torch.float16}


def test_4_bit_parameters_count_as_many_as_unquantised_ones(tiny_model: Path, quantized: Any) -> None:
    full = AutoModelForImageTextToText.from_pretrained(tiny_model)
    assert count_parameters(quantized)[1] == count_parameters(full)[1]


def test_an_unknown_target_is_refused(tiny_model: Path) -> None:
    model = load_base(str(tiny_model), "none", "fp32", "sdpa", CPU)
    with pytest.raises(ModelError, match=r"\['qkv'\] are not in each of the language model's 4 layers"):
        apply_parts(model, Parts(), Lora(target_modules=("q_proj", "qkv")))


def test_the_adapter_loads_with_plain_peft(tiny_model: Path, tmp_path: Path) -> None:
    from peft import PeftModel

    model = adapted(tiny_model)
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


def test_a_missing_or_incomplete_base_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"does not exist"):
        require_base(str(tmp_path / "missing"))
    with pytest.raises(ModelError, match=r"lacks config\.json, \*\.safetensors"):
        require_base(str(tmp_path))


def saved_otherwise(base: Path, copy: Path, change: Callable[[dict[str, Any]], dict[str, Any]], **config: Any) -> str:
    """Copy a base model with other tensors and settings, and return the folder."""
    shutil.copytree(base, copy)
    tensors = change(load_file(base / "model.safetensors"))
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, copy / "model.safetensors", {"format": "pt"})
    (copy / "config.json").write_text(json.dumps(json.loads((base / "config.json").read_text()) | config))
    return str(copy)


QKV, UP = "visual.blocks.1.attn.qkv.weight", "model.layers.1.mlp.up_proj.weight"
DAMAGED: dict[str, tuple[Callable[[dict[str, Any]], dict[str, Any]], dict[str, Any], str]] = {
    "tower": (lambda w: {n: w[n] for n in w if n != QKV}, {}, "it lacks model.visual.blocks.1.attn.qkv.weight"),
    "language": (lambda w: {n: w[n] for n in w if n != UP}, {}, "it lacks model.language_model.layers.1.mlp.up_proj.w"),
    "shape": (lambda w: w | {UP: w[UP][:-1]}, {}, r"layers.1.mlp.up_proj.weight is \(511, 256\), not \(512, 256\)"),
    "besides": (lambda w: w | {"v_head.weight": w[UP]}, {}, "the config does not have v_head.weight"),
    "head": (lambda w: w, {"tie_word_embeddings": False}, "it lacks lm_head.weight"),
}


@pytest.mark.parametrize("quantization", ["none", "nf4"])
@pytest.mark.parametrize("damage", DAMAGED)
def test_a_base_whose_tensors_do_not_fit_its_config_is_refused_by_name(
    tiny_model: Path, tmp_path: Path, damage: str, quantization: str
) -> None:
    change, config, message = DAMAGED[damage]
    base = saved_otherwise(tiny_model, tmp_path / "base", change, **config)
    with pytest.raises(ModelError, match=f"the weights of base model {base} do not fit its config: .*{message}"):
        load_base(base, quantization, "bf16", "sdpa", CPU)


RENAMED: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "published": lambda w: w,
    "transformers 5": lambda w: {
        f"model.{n}" if n.startswith("visual.") else n.replace("model.", "model.language_model.", 1): w[n] for n in w
    },
    "tied head written": lambda w: w | {"lm_head.weight": w["model.embed_tokens.weight"]},
    "old buffers": lambda w: w | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)},
}


@pytest.mark.parametrize("names", RENAMED)
def test_every_layout_of_the_same_weights_is_loaded(tiny_model: Path, tmp_path: Path, names: str) -> None:
    base = saved_otherwise(tiny_model, tmp_path / "base", RENAMED[names])
    loaded, plain = (load_base(folder, "none", "bf16", "sdpa", CPU).state_dict() for folder in (base, str(tiny_model)))
    assert loaded.keys() == plain.keys()
    assert all(torch.equal(loaded[name], plain[name]) for name in plain)


def test_a_base_stored_in_4_bit_is_loaded_if_it_is_complete(tiny_model: Path, quantized: Any, tmp_path: Path) -> None:
    packed = shutil.copytree(tiny_model, tmp_path / "packed")
    quantized.save_pretrained(packed)
    load_base(str(packed), "nf4", "bf16", "sdpa", CPU)
    lacking = saved_otherwise(packed, tmp_path / "lacking", DAMAGED["tower"][0])
    with pytest.raises(ModelError, match=DAMAGED["tower"][2]):
        load_base(lacking, "nf4", "bf16", "sdpa", CPU)
    for number, part in enumerate(("", ".absmax", ".nested_absmax", ".quant_map", ".quant_state.bitsandbytes__nf4")):
        name = UP + part
        lacking = saved_otherwise(packed, tmp_path / f"part-{number}", lambda w, n=name: {k: w[k] for k in w if k != n})
        with pytest.raises(ModelError, match=f"it lacks {name} "):
            load_base(lacking, "nf4", "bf16", "sdpa", CPU)
    short = saved_otherwise(packed, tmp_path / "short", lambda w: w | {UP: w[UP][:-4]})
    with pytest.raises(ModelError, match=rf"{UP} is \(65528,\), not \(65536,\)"):
        load_base(short, "nf4", "bf16", "sdpa", CPU)


def test_an_unreachable_hub_name_says_how_to_download_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ModelError, match=r"hf download nobody/no-such-model --local-dir"):
        require_base("nobody/no-such-model")


@pytest.mark.parametrize("kind", ["qwen2", "qwen3_vl", "phi3_v", "llava_next"])
def test_an_untested_model_type_is_refused_by_name(tmp_path: Path, kind: str) -> None:
    """This includes a type with its own code, for which transformers would ask at the console."""
    foreign = {"AutoConfig": "configuration_x.Config", "AutoModelForCausalLM": "modeling_x.Model"}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind, "auto_map": foreign}))
    message = (
        rf"is a {kind}, which .* → use a Qwen2.5-VL \(qwen2_5_vl\) or Qwen2-VL \(qwen2_vl\) or LLaVA-1.5 \(llava\)"
    )
    # require_base refuses the type before it looks for files that a text model does not have.
    for check in (load_config, require_base):
        with pytest.raises(ModelError, match=message):
            check(str(tmp_path))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{}", "names no model type"),
        ("[]", "cannot be read"),
        ("{", "cannot be read"),
        ('{"model_type": ["qwen2_vl"]}', r"is a \['qwen2_vl'\]"),
        ('{"model_type": "qwen2_5_vl", "hidden_size": "wide"}', "cannot be read .*'hidden_size'"),
    ],
)
def test_an_invalid_config_is_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ModelError, match=message):
        load_config(str(tmp_path))


def test_a_pickled_base_is_refused_and_not_read(tmp_path: Path, tiny_model: Path) -> None:
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    for refuse in (require_base, lambda base: load_base(base, "none", "fp32", "sdpa", torch.device("cpu"))):
        with pytest.raises(ModelError):
            refuse(str(folder))
