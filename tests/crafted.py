"""Copies of the tiny model with weights that cause faults: not finite, or beyond the range of fp16."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from asking import labels_of
from safetensors.torch import load_file, save_file

from kfood_dist.data.shards.reader import ShardSplit
from kfood_dist.model.processor import load_tokenizer

EMBEDDING = "model.embed_tokens.weight"  # the names of the published files


def craft(model: Path, folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    """Copy a model to `folder` and edit its weights with `change`. The copy's head does not share the embedding."""
    shutil.copytree(model, folder)
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"] = weights[EMBEDDING].clone()
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["tie_word_embeddings"] = config["text_config"]["tie_word_embeddings"] = False
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def unique_token(model: Path, shards: ShardSplit) -> tuple[str, int]:
    """Return a dish and a token that is in its answer and in no other dish's answer."""
    tokenizer, names = load_tokenizer(str(model)), sorted(set(labels_of(shards)))
    tokens = [set(tokenizer(name, add_special_tokens=False)["input_ids"]) for name in names]
    return names[0], min(tokens[0].difference(*tokens[1:]))


def swell_tower(weights: dict[str, torch.Tensor]) -> None:
    """Make the values between two matrices of the vision tower 2^20 times as large. The tower's output is unchanged."""
    mlp = "visual.blocks.1.mlp"
    for name in ("up_proj.weight", "up_proj.bias"):
        weights[f"{mlp}.{name}"] *= 2.0**20
    weights[f"{mlp}.down_proj.weight"] *= 2.0**-20


def steepen_head(weights: dict[str, torch.Tensor]) -> None:
    """Make the gradients behind the head 2^10 times as large. The logits are unchanged."""
    weights["model.norm.weight"] *= 2.0**-10
    weights["lm_head.weight"] *= 2.0**10
