"""Qwen2-VL trains like Qwen2.5-VL. Each test checks on the real class what another model type could get wrong."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from asking import PROMPT, model_inputs
from bases import write_qwen2_vl
from test_loss import build

from kfood_dist.cli import main
from kfood_dist.config.sections import Data
from kfood_dist.data.batch.collate import StreamingCollator
from kfood_dist.data.batch.template import Template
from kfood_dist.data.plan.plan import MicroBatch
from kfood_dist.data.shards.reader import open_split
from kfood_dist.data.task.dish import DishTask
from kfood_dist.doctor import checks as doctor
from kfood_dist.model.adapters import adapted_modules, save_adapter
from kfood_dist.model.family import FAMILIES
from kfood_dist.model.parts import linear_types
from kfood_dist.model.processor import build_template


@pytest.fixture(scope="module")
def qwen2_vl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("qwen2_vl")
    write_qwen2_vl(folder)
    return folder


@pytest.fixture(scope="module")
def template(qwen2_vl: Path) -> Template:
    return build_template(str(qwen2_vl), Data(shards="."))


@pytest.fixture(scope="module")
def collator(template: Template, tiny_shards: Path) -> StreamingCollator:
    samples = open_split(tiny_shards, "train")
    return StreamingCollator(samples, template, DishTask("", PROMPT, samples.classes))


def test_qwen2_vl_is_accepted_and_named(qwen2_vl: Path) -> None:
    (found,) = doctor.check_model(str(qwen2_vl), None)
    assert (found.level, found.what) == (doctor.OK, f"{qwen2_vl}: qwen2_vl, 64 tokens for a picture")


def test_the_loss_equals_the_models_own(qwen2_vl: Path, template: Template, collator: Any) -> None:
    """The model's own loss is the mean over label tokens, with the pixel values of its own processor."""
    from transformers import AutoImageProcessor, Qwen2VLForConditionalGeneration

    module, batch = build(qwen2_vl, template.pictures), collator[MicroBatch(0, 0, (0, 1, 2, 3), 0)]
    assert isinstance(module.model.get_base_model(), Qwen2VLForConditionalGeneration)
    pictures = [collator.shards.read(i).pictures[0] for i in range(4)]
    processor = AutoImageProcessor.from_pretrained(qwen2_vl)
    inputs = model_inputs(batch, template.pictures)
    shown = processor(images=[decoded(picture) for picture in pictures], return_tensors="pt")
    assert torch.allclose(inputs["pixel_values"], shown["pixel_values"], atol=2e-6)
    assert torch.equal(inputs["image_grid_thw"], shown["image_grid_thw"])
    own = module.model(**{**inputs, **shown}, labels=batch.labels).loss
    assert module(batch)[0].item() == pytest.approx(own.item() * batch.num_label_tokens, rel=1e-5)


def decoded(jpeg: bytes) -> Any:
    from kfood_dist.data.picture.images import decode_rgb

    return decode_rgb(jpeg)


def test_positions_spread_over_the_picture(qwen2_vl: Path, template: Template, collator: Any) -> None:
    """Text advances on all three axes. The picture's 8 × 8 tokens share one time and spread over height and width."""
    batch = collator[MicroBatch(0, 0, (0,), 0)]
    model = build(qwen2_vl, template.pictures).model.get_base_model().model
    inputs = model_inputs(batch, template.pictures)
    inputs.pop("pixel_values")
    positions = model.compute_3d_position_ids(**inputs, video_grid_thw=None, inputs_embeds=None, past_key_values=None)
    start = int(batch.is_image[0].argmax())
    ahead, behind = list(range(start)), [start + 8 + i for i in range(batch.input_ids.shape[1] - start - 64)]
    expected = [[0] * 64, [i // 8 for i in range(64)], [i % 8 for i in range(64)]]
    assert positions[:, 0].tolist() == [ahead + [start + n for n in axis] + behind for axis in expected]


def test_4_bit_layers_and_adapters_are_only_in_the_language_model(qwen2_vl: Path, template: Template) -> None:
    model = build(qwen2_vl, template.pictures, "nf4", "bf16").model.get_base_model()
    types = linear_types(model, FAMILIES["qwen2_vl"])
    assert types["language_model"] == {"Linear4bit": 4 * 7}
    assert set(types["tower"]) == {"Linear"} and types["head"] == {"Linear": 1}
    names = adapted_modules(model)
    assert len(names) == 4 * 7 and all(name.startswith("model.language_model.layers.") for name in names)


def test_a_few_steps_train_the_model_and_its_adapter_answers(
    qwen2_vl: Path, template: Template, collator: Any, pictures: Path, tmp_path: Path, capsys: Any
) -> None:
    module = build(qwen2_vl, template.pictures, "nf4", "bf16").train()
    optimizer = torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], lr=3e-3)
    losses = []
    for step in range(6):
        batch = collator[MicroBatch(step, 0, tuple(range(4)), 0)]
        loss = module(batch)[0] / batch.num_label_tokens
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 1.5, losses
    facts = Data(shards=".").model_dump(include={"system", "prompt", "image_size", "max_length"})
    save_adapter(module.model, tmp_path / "adapter", facts | {"resize": "squash"})
    words = ["--model", str(qwen2_vl), "--adapter", str(tmp_path / "adapter"), "--alternatives", "0"]
    assert main(["predict", str(next(pictures.rglob("Img_*"))), *words]) == 0
    assert 0 < json.loads(capsys.readouterr().out.splitlines()[-1])["confidence"] <= 1
