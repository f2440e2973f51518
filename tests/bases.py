"""Base models in the forms that people have them in: published, cut into shards, in the hub's cache, other families."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from kfood_dist.practice.tiny_model import build_config, preprocessor_settings, train_tokenizer

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def edit(path: Path, **changes: Any) -> None:
    """Change keys of a JSON file; None takes a key away."""
    tree = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in tree.items() if value is not None}))


def cut(folder: Path) -> list[Path]:
    """Put a folder's weights into two shards with an index, as larger models are published; returns the shards."""
    whole = folder / "model.safetensors"
    tensors = load_file(whole)
    whole.unlink()
    names, shards, index = sorted(tensors), [], {}
    for part, chosen in enumerate((names[: len(names) // 2], names[len(names) // 2 :]), 1):
        shards.append(folder / f"model-{part:05d}-of-00002.safetensors")
        save_file({name: tensors[name] for name in chosen}, shards[-1], {"format": "pt"})
        index |= dict.fromkeys(chosen, shards[-1].name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return shards


def publish(folder: Path) -> None:
    """Turn a saved model into the layout of the hub: old parameter names, flat config, rope_scaling of type mrope."""
    weights = folder / "model.safetensors"
    old = {name.removeprefix("model.") if ".visual." in name else name.replace("language_model.", ""): tensor
           for name, tensor in load_file(weights).items()}  # fmt: skip
    save_file(old, weights, {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    text = config.pop("text_config")
    rope = text.pop("rope_parameters")
    text["rope_theta"] = rope["rope_theta"]
    text["rope_scaling"] = {"type": "mrope", "mrope_section": rope["mrope_section"]}
    flat = {**text, **config, "torch_dtype": config.pop("dtype")}
    (folder / "config.json").write_text(json.dumps(flat))
    cut(folder)


def put_into_cache(folder: Path, cache: Path, name: str) -> Path:
    """Put a model's files into a hub cache under `name`, as the hub's client lays them out; returns the snapshot."""
    repository = cache / f"models--{name.replace('/', '--')}"
    snapshot = repository / "snapshots" / COMMIT
    for part in (snapshot, repository / "blobs", repository / "refs"):
        part.mkdir(parents=True)
    (repository / "refs" / "main").write_text(COMMIT)
    for i, path in enumerate(sorted(folder.iterdir())):
        blob = repository / "blobs" / f"{i:040x}"
        blob.write_bytes(path.read_bytes())
        (snapshot / path.name).symlink_to(Path("../../blobs") / blob.name)
    return snapshot


def write_qwen2_vl(folder: Path) -> None:
    """A tiny random Qwen2-VL of the real class, beside the tokenizer and picture settings of the practice model."""
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

    tokenizer = train_tokenizer()
    other = build_config(tokenizer).to_dict()
    text = {k: v for k, v in other["text_config"].items() if k not in ("model_type", "layer_types")}
    ids = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    config = Qwen2VLConfig(
        text_config=text,
        vision_config={"depth": 2, "embed_dim": 128, "hidden_size": 256, "mlp_ratio": 2, "num_heads": 4},
        tie_word_embeddings=True,
        dtype="bfloat16",
        **{name: other[name] for name in ids},
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Qwen2VLForConditionalGeneration(config).to(torch.bfloat16)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    settings = preprocessor_settings() | {"processor_class": "Qwen2VLProcessor"}
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
