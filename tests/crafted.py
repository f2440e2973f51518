"""Copies of the tiny model with weights made to fail: not finite, or beyond the range of fp16."""

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
    """A copy of a model in `folder` whose weights `change` has edited; its head no longer shares the embedding."""
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
    """A dish, and a token that its answer has and no other dish's."""
    tokenizer, names = load_tokenizer(str(model)), sorted(set(labels_of(shards)))
    tokens = [set(tokenizer(name, add_special_tokens=False)["input_ids"]) for name in names]
    return names[0], min(tokens[0].difference(*tokens[1:]))


def swell_tower(weights: dict[str, torch.Tensor]) -> None:
    """Make what lies between two matrices of the vision tower 2^20 times as large; what comes out stays as it was."""
    mlp = "visual.blocks.1.mlp"
    for name in ("up_proj.weight", "up_proj.bias"):
        weights[f"{mlp}.{name}"] *= 2.0**20
    weights[f"{mlp}.down_proj.weight"] *= 2.0**-20


def steepen_head(weights: dict[str, torch.Tensor]) -> None:
    """Make gradients behind the head 2^10 times as large; the logits stay as they were."""
    weights["model.norm.weight"] *= 2.0**-10
    weights["lm_head.weight"] *= 2.0**10
