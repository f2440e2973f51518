"""Collators and plain model inputs for tests, as a recipe of the dish task makes them."""

from pathlib import Path
from typing import Any

import torch

from kfood_dist.config.sections import Lora, Parts
from kfood_dist.data.batch.collate import Batch, StreamingCollator, targets_of
from kfood_dist.data.batch.template import IGNORED, Template
from kfood_dist.data.picture.protocol import Pictures
from kfood_dist.data.shards.reader import ShardSplit, open_split
from kfood_dist.data.task.dish import DishTask
from kfood_dist.model.base import load_config
from kfood_dist.model.load import load_base
from kfood_dist.model.parts import apply_parts
from kfood_dist.model.processor import load_tokenizer
from kfood_dist.model.vision import load_pictures

PROMPT = "이 음식의 이름은?"


def pictures_of(model: Path, image_size: int = 224) -> Any:
    """Return the object that prepares pictures for this model."""
    return load_pictures(str(model), load_config(str(model)), image_size)


def asking_dishes(
    model: Path,
    shards: Path | ShardSplit,
    split: str = "train",
    max_length: int = 1536,
    prompt: str = PROMPT,
    **options: Any,
) -> StreamingCollator:
    """Return a collator of the dish task without a system text."""
    samples = open_split(shards, split) if isinstance(shards, Path) else shards
    pictures = pictures_of(model, samples.manifest.image_size)
    template = Template(load_tokenizer(str(model)), pictures, max_length)
    return StreamingCollator(samples, template, DishTask("", prompt, samples.classes), **options)


def adapted(model: Path, quantization: str = "none", precision: str = "fp32", **lora: Any) -> Any:
    """Return the base model with fresh LoRA on its language model."""
    base = load_base(str(model), quantization, precision, "sdpa", torch.device("cpu"))
    return apply_parts(base, Parts(), Lora(**lora))


def model_inputs(batch: Batch, pictures: Pictures) -> dict[str, Any]:
    """Return the keyword arguments of the model's own forward for a batch. It computes positions and windows itself."""
    inputs = pictures.to_model(batch.pixels, batch.facts | batch.shapes, batch.is_image)
    return {
        "input_ids": batch.input_ids,
        "attention_mask": batch.attention_mask,
        **{name: inputs[name] for name in inputs.keys() & {"pixel_values", "image_grid_thw", "mm_token_type_ids"}},
    }


def plain_batch(rows: list[tuple[int, int, int]], pixels: torch.Tensor, **shapes: torch.Tensor) -> Batch:
    """Return a batch whose rows have this many image tokens, text tokens, and labels among the last text tokens."""
    length = max(image + text for image, text, _ in rows)
    places, starts = torch.arange(length), torch.tensor([image + text - labels for image, text, labels in rows])
    images, texts = (torch.tensor([row[i] for row in rows])[:, None] for i in (0, 1))
    real = places < images + texts
    labels = torch.where(real & (places >= starts[:, None]), 7, IGNORED)
    targets = {name: torch.from_numpy(array) for name, array in targets_of(labels.numpy()).items()}
    is_image = (places < images).long()
    return Batch(torch.full(real.shape, 7), real.long(), is_image, labels, pixels, {}, shapes, **targets)


def labels_of(samples: ShardSplit) -> list[str]:
    """Return the dish of every sample."""
    return [samples.read(i).columns["label"] for i in range(len(samples))]
