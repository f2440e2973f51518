"""A base model that was saved again is the same model. A model that computes something else is another model."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

from kfood_dist.errors import CheckpointError
from kfood_dist.model.identity import config_changes, fingerprint, legacy_fingerprint, read_config
from kfood_dist.train.resume import require_same_base
from kfood_dist.train.run import checkpoint

# The published config, and the form that transformers 4.5x saves: keys twice, old keys, and keys in other places.
FLAT = {
    "model_type": "qwen2_5_vl", "architectures": ["Qwen2_5_VLForConditionalGeneration"], "torch_dtype": "bfloat16",
    "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "rms_norm_eps": 1e-06, "rope_theta": 1000000.0, "sliding_window": 32768,
    "use_sliding_window": False, "tie_word_embeddings": True, "transformers_version": "4.41.2", "use_cache": True,
    "vision_token_id": 151654, "image_token_id": 151655, "vocab_size": 1000,
    "rope_scaling": {"type": "mrope", "mrope_section": [8, 12, 12]},
    "vision_config": {"depth": 2, "hidden_size": 128, "num_heads": 4, "in_chans": 3, "window_size": 112},
}  # fmt: skip
NESTED = {
    **{key: value for key, value in FLAT.items() if key not in ("architectures", "rope_scaling")},
    "text_config": {
        **{key: value for key, value in FLAT.items() if key not in ("vision_config", "model_type", "torch_dtype")},
        "model_type": "qwen2_5_vl_text",
        "_name_or_path": "elsewhere",
        "rope_scaling": {"type": "default", "rope_type": "default", "mrope_section": [8, 12, 12]},
    },
    "transformers_version": "4.55.0",
}


def changed(config: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    """Return a copy of a config with another value at a path such as `vision_config.window_size`."""
    copy: dict[str, Any] = json.loads(json.dumps(config))
    *parents, key = path.split(".")
    at = copy
    for parent in parents:
        at = at[parent]
    at[key] = value
    return copy


def test_the_published_config_and_its_saved_forms_mean_the_same() -> None:
    assert config_changes(FLAT, NESTED) == config_changes(NESTED, FLAT) == []
    assert config_changes(FLAT, changed(FLAT, "transformers_version", "6.0")) == []


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("rope_theta", 10000.0, "text_config.rope_parameters.rope_theta was 1000000.0 and is now 10000.0"),
        ("rms_norm_eps", 1e-5, "text_config.rms_norm_eps was 1e-06 and is now 1e-05"),
        ("num_attention_heads", 8, "text_config.num_attention_heads was 4 and is now 8"),
        ("rope_scaling.mrope_section", [12, 12, 8], "text_config.rope_parameters.mrope_section was "),
        ("vision_config.window_size", 56, "vision_config.window_size was 112 and is now 56"),
        ("image_token_id", 7, "image_token_id was 151655 and is now 7"),
    ],
)
def test_a_setting_that_changes_the_computation_is_named(path: str, value: Any, message: str) -> None:
    (change,) = config_changes(FLAT, changed(FLAT, path, value))
    assert change.startswith(message)


@pytest.fixture
def saved_again(tiny_model: Path, tmp_path: Path) -> Path:
    """Return the same weights, saved by transformers: several shards, an index, other metadata and a new config."""
    copy = shutil.copytree(tiny_model, tmp_path / "again")
    (copy / "model.safetensors").unlink()
    model = AutoModelForImageTextToText.from_pretrained(tiny_model, dtype="auto")
    model.save_pretrained(copy, max_shard_size="2MB")
    config = json.loads((copy / "config.json").read_text()) | {"transformers_version": "9.9", "_name_or_path": "x"}
    (copy / "config.json").write_text(json.dumps(dict(reversed(config.items()))))
    assert len(list(copy.glob("model-*.safetensors"))) > 1
    return copy


def test_the_fingerprint_depends_only_on_the_tensors(tiny_model: Path, saved_again: Path, tmp_path: Path) -> None:
    known, tensors = fingerprint(tiny_model), load_file(tiny_model / "model.safetensors")
    assert fingerprint(saved_again) == known != legacy_fingerprint(saved_again)
    renamed = {
        f"model.{n}" if n.startswith("visual.") else n.replace("model.", "model.language_model.", 1): t
        for n, t in tensors.items()
    }
    renamed["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    (tmp_path / "renamed").mkdir()
    save_file(renamed, tmp_path / "renamed" / "model.safetensors", {"saved": "again"})
    assert fingerprint(tmp_path / "renamed") == known
    bias = "visual.blocks.0.attn.qkv.bias"
    for other in (
        {bias: tensors[bias] + 1},
        {bias: tensors[bias].half()},
        {bias: tensors[bias][None]},
        {"lm_head.weight": tensors["model.embed_tokens.weight"] + 1},
        {"another": torch.ones(1)},
    ):
        save_file(tensors | other, tmp_path / "renamed" / "model.safetensors")
        assert fingerprint(tmp_path / "renamed") != known


def written_for(base: Path, folder: Path, **facts: Any) -> checkpoint.Checkpoint:
    """Write the record of a checkpoint of a run on `base`."""
    folder.mkdir()
    record = {
        "format_version": checkpoint.FORMAT_VERSION, "step": 1, "data": {}, "world_size": 1, "distributed_type": "NO",
        "zero_stage": 0, "files": {}, "base_fingerprint": fingerprint(base), "base_config": read_config(base), **facts,
    }  # fmt: skip
    (folder / checkpoint.STATE_FILE).write_text(json.dumps(record))
    return checkpoint.Checkpoint(folder, 1)


def test_a_run_resumes_with_a_saved_copy_of_its_base_model_and_no_other(
    tiny_model: Path, saved_again: Path, tmp_path: Path
) -> None:
    begun = written_for(tiny_model, tmp_path / "step-1")
    require_same_base(begun, tiny_model, "base")
    require_same_base(begun, saved_again, "base")
    text = json.loads((saved_again / "config.json").read_text())
    text["text_config"]["rms_norm_eps"] = 0.5
    (saved_again / "config.json").write_text(json.dumps(text))
    with pytest.raises(
        CheckpointError, match=r"another base model: text_config.rms_norm_eps was 1e-06 and is now 0.5 in"
    ):
        require_same_base(begun, saved_again, "base")
    other = written_for(tiny_model, tmp_path / "other", base_fingerprint="0" * 64)
    with pytest.raises(CheckpointError, match="another base model: its fingerprint was 000000000000, that of base is "):
        require_same_base(other, tiny_model, "base")


def test_an_older_checkpoint_resumes_only_with_exactly_its_own_files(
    tiny_model: Path, saved_again: Path, tmp_path: Path
) -> None:
    older = {"base_fingerprint": legacy_fingerprint(tiny_model), "base_config": None}
    begun = written_for(tiny_model, tmp_path / "step-1", **older)
    require_same_base(begun, tiny_model, "base")
    with pytest.raises(CheckpointError, match=r"another base model: .* identifies that model by its exact files"):
        require_same_base(begun, saved_again, "base")
