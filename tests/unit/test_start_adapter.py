"""A recipe that starts from an adapter takes its weights. An adapter of another form is refused with the difference."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from asking import adapted
from safetensors.torch import load_file

from kfood_dist.config.recipe import build_recipe
from kfood_dist.errors import ModelError
from kfood_dist.model.adapters import load_adapter, require_adapter, require_adapter_fits


def recipe(adapter: Path, **lora):
    tree = {"data": {"shards": "s"}, "model": {"base": "m", "adapter": str(adapter)}, "run": {"dir": "r"}}
    return build_recipe(tree | {"lora": lora}, [], "recipe")


def test_the_weights_are_taken_over(tiny_model: Path, tiny_adapter: Path) -> None:
    from peft import get_peft_model_state_dict

    require_adapter(recipe(tiny_adapter))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = adapted(tiny_model)
    load_adapter(model, tiny_adapter)
    kept, saved = get_peft_model_state_dict(model), load_file(tiny_adapter / "adapter_model.safetensors")
    assert kept.keys() == saved.keys()
    assert all(torch.equal(kept[name], saved[name]) for name in saved)
    assert all(p.requires_grad == (".lora_" in name) for name, p in model.named_parameters())


@pytest.mark.parametrize(
    ("lora", "complaint"),
    [
        ({"r": 8}, "lora.r is 8, the adapter's is 16"),
        ({"alpha": 16}, "lora.alpha is 16, the adapter's is 32"),
        ({"target_modules": ["q_proj"]}, r"lora.target_modules is \['q_proj'\], the adapter's is \['down_proj', "),
    ],
)
def test_an_adapter_of_another_form_is_refused(tiny_adapter: Path, lora: dict, complaint: str) -> None:
    with pytest.raises(ModelError, match=complaint):
        require_adapter(recipe(tiny_adapter, **lora))


def test_a_missing_or_damaged_adapter_is_refused(tmp_path: Path, tiny_adapter: Path) -> None:
    with pytest.raises(ModelError, match="holds no adapter"):
        require_adapter(recipe(tmp_path))
    damaged = shutil.copytree(tiny_adapter, tmp_path / "damaged")
    (damaged / "adapter_model.safetensors").write_bytes(b"x" * 100)
    with pytest.raises(ModelError, match="cannot be read"):
        require_adapter(recipe(damaged))
    shutil.copy(tiny_adapter / "adapter_model.safetensors", damaged)
    (damaged / "adapter_config.json").write_text(json.dumps([1]))
    with pytest.raises(ModelError, match="cannot be read"):
        require_adapter(recipe(damaged))


def test_an_adapter_with_a_value_that_is_not_finite_is_refused(
    tmp_path: Path, tiny_model: Path, tiny_adapter: Path
) -> None:
    """In evaluation and prediction, which ask `require_adapter_fits`, and as the start of a run."""
    from safetensors.torch import save_file

    other = shutil.copytree(tiny_adapter, tmp_path / "other")
    weights = load_file(other / "adapter_model.safetensors")
    name = next(name for name in weights if "layers.3" in name)
    weights[name][0, 0] = torch.nan
    save_file(weights, other / "adapter_model.safetensors")
    complaint = f"values that are not finite in 1 tensor, such as {re.escape(name)} → use the adapter of an earlier"
    with pytest.raises(ModelError, match=complaint):
        load_adapter(adapted(tiny_model), other)
    with pytest.raises(ModelError, match=complaint):
        require_adapter_fits(str(tiny_model), other)


def test_an_adapter_of_another_model_is_refused(tmp_path: Path, tiny_model: Path, tiny_adapter: Path) -> None:
    from safetensors.torch import save_file

    other = shutil.copytree(tiny_adapter, tmp_path / "other")
    weights = load_file(other / "adapter_model.safetensors")
    save_file(
        {name.replace("layers.0", "layers.99"): w for name, w in weights.items()}, other / "adapter_model.safetensors"
    )
    model = adapted(tiny_model)
    with pytest.raises(ModelError, match="does not fit the base model"):
        load_adapter(model, other)
    save_file({name: w[:, :-1].contiguous() for name, w in weights.items()}, other / "adapter_model.safetensors")
    with pytest.raises(ModelError, match="does not fit the base model"):
        load_adapter(model, other)
