"""The streaming collator: pixels as transformers computes them, padding, refusal, order over worker processes."""

from pathlib import Path

import numpy as np
import pytest
import torch

from kfood_dist.data.collate import Batch, StreamingCollator, stream
from kfood_dist.data.images import decode_rgb
from kfood_dist.data.patches import VisionSpec, patchify
from kfood_dist.data.plan import MicroBatch, Plan
from kfood_dist.data.shards import open_split
from kfood_dist.data.template import IGNORED, Template
from kfood_dist.errors import RecipeError
from kfood_dist.model.base import load_config, load_tokenizer, load_vision_spec
from kfood_dist.model.loss import normalise_patches


@pytest.fixture(scope="module")
def vision(tiny_model: Path) -> VisionSpec:
    return load_vision_spec(str(tiny_model), load_config(str(tiny_model)))


def build(
    tiny_model: Path, tiny_shards: Path, vision: VisionSpec, max_length: int = 1536, **options
) -> StreamingCollator:
    template = Template(load_tokenizer(str(tiny_model)), vision, "", "이 음식의 이름은?", max_length)
    return StreamingCollator(open_split(tiny_shards, "train"), template, **options)


@pytest.mark.parametrize("size", [(28, 28), (56, 84), (224, 224), (448, 336)])
def test_uint8_patches_become_the_image_processors_pixels(
    tiny_model: Path, vision: VisionSpec, size: tuple[int, int]
) -> None:
    from PIL import Image
    from transformers import AutoImageProcessor

    rgb = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    processor = AutoImageProcessor.from_pretrained(tiny_model, min_pixels=28 * 28)
    expected = processor(images=Image.fromarray(rgb), return_tensors="pt")
    patches, grid = patchify(rgb, vision)
    assert patches.dtype == np.uint8
    assert list(grid) == expected["image_grid_thw"][0].tolist()
    pixels = normalise_patches(torch.from_numpy(patches), vision)
    assert pixels.shape == expected["pixel_values"].shape
    assert (pixels - expected["pixel_values"]).abs().max() < 1e-5


def test_a_batch_pads_to_its_longest_and_masks_the_padding(
    tiny_model: Path, tiny_shards: Path, vision: VisionSpec
) -> None:
    collator = build(tiny_model, tiny_shards, vision)
    names = [collator.shards.label(i).name for i in range(len(collator.shards))]
    longest, shortest = (pick(range(len(names)), key=lambda i: len(names[i])) for pick in (max, min))
    batch = collator[MicroBatch(0, 0, (longest, shortest), longest)]
    lengths = batch.attention_mask.sum(1).tolist()
    assert lengths[0] == batch.input_ids.shape[1] > lengths[1]
    assert (batch.input_ids[1, lengths[1] :] == collator.pad_token_id).all()
    assert (batch.labels[1, lengths[1] :] == IGNORED).all()
    assert batch.num_tokens == sum(lengths)
    expected_pixels, _ = patchify(decode_rgb(collator.shards.read(shortest)), vision)
    assert (batch.patches[-len(expected_pixels) :].numpy() == expected_pixels).all()
    assert batch.mm_token_type_ids.sum(1).tolist() == [64, 64]
    label = batch.labels[0][batch.labels[0] != IGNORED]
    assert collator.template.decode(label) == names[longest]


def test_for_generation_the_answers_are_off_and_padding_is_on_the_left(
    tiny_model: Path, tiny_shards: Path, vision: VisionSpec
) -> None:
    batch = build(tiny_model, tiny_shards, vision, for_generation=True)[MicroBatch(0, 0, (0, 1), 0)]
    assert batch.num_label_tokens == 0
    assert batch.attention_mask[:, -1].all()


def test_a_sample_that_cannot_fit_is_refused_by_name_and_a_filler_keeps_the_rank_going(
    tiny_model: Path, tiny_shards: Path, vision: VisionSpec
) -> None:
    collator = build(tiny_model, tiny_shards, vision, max_length=66)  # 64 image tokens and their two brackets
    batch = collator[MicroBatch(0, 0, (0, 1), 2)]
    assert batch.refused == (collator.shards.key(0), collator.shards.key(1))
    assert batch.ids == ()
    assert batch.num_label_tokens == 0
    assert batch.input_ids.shape == (1, 66)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_the_stream_keeps_the_plans_order_whatever_the_workers(
    tiny_model: Path, tiny_shards: Path, vision: VisionSpec, num_workers: int
) -> None:
    collator = build(tiny_model, tiny_shards, vision)
    plan = Plan(len(collator.shards), seed=3, ranks=2, micro_batch=2, accumulation=2)
    expected = [m.ids for m in plan.micro_batches(1, 0, 2 * plan.steps_per_epoch)]
    batches: list[Batch] = list(stream(collator, plan.micro_batches(1, 0, 2 * plan.steps_per_epoch), num_workers))
    assert [b.ids for b in batches] == expected


def test_an_image_size_that_is_no_whole_number_of_tokens_is_refused(vision: VisionSpec) -> None:
    vision.require_fitting(224)
    with pytest.raises(RecipeError, match="pack with --image-size 252 or 224"):
        vision.require_fitting(230)
