"""Samples of several pictures, compared with the models' own processors in transformers."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from asking import pictures_of
from bases import write_llava
from PIL import Image

from kfood_dist.cli import main
from kfood_dist.data.batch.collate import StreamingCollator
from kfood_dist.data.batch.template import Template
from kfood_dist.data.picture.images import decode_rgb
from kfood_dist.data.plan.plan import MicroBatch
from kfood_dist.data.shards.reader import ShardSplit, open_split
from kfood_dist.data.task.question import QuestionTask
from kfood_dist.model.processor import load_tokenizer

QUESTIONS = {1: "무엇인가요?", 2: "두 사진의 음식이 같은가요?", 3: "몇 가지인가요?"}


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory, pictures: Path) -> ShardSplit:
    """Samples of one, two and three pictures."""
    folder = tmp_path_factory.mktemp("several")
    paths = [path.relative_to(pictures).as_posix() for path in sorted(pictures.rglob("Img_*"))]
    rows = [{"images": paths[10 * n : 10 * n + n], "question": QUESTIONS[n], "answer": f"{n}장"} for n in QUESTIONS]
    (folder / "list.jsonl").write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows))
    words = ["--image-root", str(pictures), "--split", "1,0,0"]
    assert main(["pack", str(folder / "list.jsonl"), str(folder / "out"), *words]) == 0
    return open_split(folder / "out", "train")


def collator_of(base: Path, samples: ShardSplit) -> StreamingCollator:
    template = Template(load_tokenizer(str(base)), pictures_of(base), 4096)
    return StreamingCollator(samples, template, QuestionTask("", "{question}"), for_generation=True)


def shown(samples: ShardSplit, i: int) -> list[Image.Image]:
    return [Image.fromarray(decode_rgb(jpeg)) for jpeg in samples.read(i).pictures]


def test_a_llava_gets_the_inputs_that_its_processor_makes(tmp_path: Path, samples: ShardSplit) -> None:
    """Compare tokens and pixels sample by sample, and the pixels of the entire batch."""
    from transformers import AutoProcessor

    write_llava(tmp_path)
    processor, collator = AutoProcessor.from_pretrained(tmp_path), collator_of(tmp_path, samples)
    together = collator[MicroBatch(0, 0, (0, 1, 2), 0)]
    expected = []
    for i in range(3):
        pictures, question = shown(samples, i), samples.read(i).columns["question"]
        content = [*({"type": "image"} for _ in pictures), {"type": "text", "text": question}]
        text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        made = processor(text=[text], images=pictures, return_tensors="pt")
        batch = collator[MicroBatch(0, 0, (i,), 0)]
        assert batch.input_ids.tolist() == made["input_ids"].tolist()
        assert torch.equal(batch.pixels, made["pixel_values"])
        expected.append(made["pixel_values"])
    assert torch.equal(together.pixels, torch.cat(expected))
    assert sorted(len(pixels) for pixels in expected) == [1, 2, 3]


def test_a_qwen_gets_the_patches_and_grids_of_all_pictures_in_order(tiny_model: Path, samples: ShardSplit) -> None:
    from transformers import AutoImageProcessor

    processor, collator = AutoImageProcessor.from_pretrained(tiny_model), collator_of(tiny_model, samples)
    batch = collator[MicroBatch(0, 0, (0, 1, 2), 0)]
    made = processor(images=[picture for i in range(3) for picture in shown(samples, i)], return_tensors="pt")
    inputs = collator.template.pictures.to_model(batch.pixels, batch.facts | batch.shapes, batch.is_image)
    assert inputs["image_grid_thw"].tolist() == made["image_grid_thw"].tolist()
    assert torch.allclose(inputs["pixel_values"], made["pixel_values"], atol=2e-6)
    counts = [len(samples.read(i).pictures) for i in range(3)]
    assert batch.is_image.sum(1).tolist() == [64 * count for count in counts]
    text = collator.template.tokenizer.decode(batch.input_ids[int(np.argmax(counts))])
    assert text.count("<|vision_start|>" + "<|image_pad|>" * 64 + "<|vision_end|>") == 3


def test_a_model_sees_each_picture_of_a_sample_in_its_place(tiny_model: Path, samples: ShardSplit) -> None:
    """A batch has the logits of its single samples. Another order of the pictures gives other logits."""
    from transformers import AutoModelForImageTextToText

    collator = collator_of(tiny_model, samples)
    model = AutoModelForImageTextToText.from_pretrained(tiny_model, dtype=torch.float32).eval()

    def last(batch) -> torch.Tensor:
        inputs = collator.template.pictures.to_model(batch.pixels, batch.facts | batch.shapes, batch.is_image)
        with torch.no_grad():
            return model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, **inputs).logits[:, -1]

    together = last(collator[MicroBatch(0, 0, (0, 1, 2), 0)])
    alone = [collator[MicroBatch(0, 0, (i,), 0)] for i in range(3)]
    assert torch.allclose(together, torch.cat([last(batch) for batch in alone]), atol=1e-4)
    several = next(batch for batch in alone if len(batch.facts["image_grid_thw"]) == 3)
    turned = several.pixels.view(3, -1, several.pixels.shape[1]).flip(0).reshape(several.pixels.shape)
    swapped = type(several)(**{**vars(several), "pixels": turned})
    assert (last(several) - last(swapped)).abs().max() > 1e-3
