"""The small files of a base model (picture settings, chat template) are read in every form that users have."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from asking import PROMPT, pictures_of
from bases import edit

from kfood_dist.config.sections import Data
from kfood_dist.data.picture.patches import Patches
from kfood_dist.data.picture.processed import Processed
from kfood_dist.data.task.dish import DishTask
from kfood_dist.doctor import checks as doctor
from kfood_dist.errors import ModelError
from kfood_dist.model.processor import build_template, load_tokenizer
from kfood_dist.practice.tiny_model import CHAT_TEMPLATE

SETTINGS = "preprocessor_config.json"


@pytest.fixture
def base(tmp_path: Path, tiny_model: Path) -> Path:
    """Return a copy of the tiny model."""
    return shutil.copytree(tiny_model, tmp_path / "model")


# Picture settings

NAMES: list[dict[str, Any]] = [
    {"image_processor_type": "Qwen2VLImageProcessor"},
    {"image_processor_type": "Qwen2VLImageProcessorFast"},
    {"image_processor_type": "Qwen2VLImageProcessorPil"},
    {"image_processor_type": "Qwen2_5_VLImageProcessor"},
    {"image_processor_type": "Qwen2_5_VLImageProcessorFast"},
    {"image_processor_type": None, "feature_extractor_type": "Qwen2VLFeatureExtractor"},
    {"image_processor_type": None, "feature_extractor_type": "Qwen2_5_VLFeatureExtractor"},
    {"image_processor_type": None},
    {"image_processor_type": None, "image_mean": None, "image_std": None, "min_pixels": None, "max_pixels": None},
    {"image_mean": 0.5, "image_std": 0.25},
]


@pytest.mark.parametrize("nested", [False, True], ids=["own file", "in processor_config.json"])
@pytest.mark.parametrize("changes", NAMES, ids=lambda changes: ",".join(map(str, changes.values())))
def test_a_processor_gives_the_same_pixels_under_each_of_its_names(base: Path, changes: dict, nested: bool) -> None:
    """The pixels go through uint8 patches if those are enough, and through the processor itself if it resizes."""
    from transformers import Qwen2VLImageProcessor

    edit(base / SETTINGS, **changes)
    picture = np.random.default_rng(0).integers(0, 256, (224, 224, 3), dtype=np.uint8)
    for resizing in ({}, {"min_pixels": 300 * 300}):
        edit(base / SETTINGS, **resizing)
        settings = json.loads((base / SETTINGS).read_text())
        if nested:
            (base / "processor_config.json").write_text(json.dumps({"image_processor": settings}))
            (base / SETTINGS).rename(base / "aside.json")
        taking = pictures_of(base)
        if nested:
            (base / "aside.json").rename(base / SETTINGS)
        assert isinstance(taking, Processed if resizing else Patches)
        pixels, facts, _ = taking.encode(picture)
        known = {k: v for k, v in settings.items() if not k.endswith("_type")}
        expected = Qwen2VLImageProcessor(**known)(images=[picture], return_tensors="pt")
        assert facts["image_grid_thw"].tolist() == expected["image_grid_thw"].tolist()
        shown = taking.to_model(torch.from_numpy(pixels), {}, torch.zeros(1, 1))["pixel_values"]
        assert torch.allclose(shown, expected["pixel_values"], atol=2e-6, rtol=0)


@pytest.mark.parametrize("text", ["[]", '{"size": 224}', '{"min_pixels": "few"}', '{"image_mean": [0.5]}', "{"])
def test_invalid_picture_settings_are_refused(base: Path, text: str) -> None:
    (base / SETTINGS).write_text(text)
    with pytest.raises(ModelError, match=r"the image processor of .* cannot be read"):
        pictures_of(base)


@pytest.mark.parametrize("kind", ["SomeImageProcessor", 5])
def test_a_processor_with_its_own_code_is_refused_without_a_prompt(base: Path, kind: object) -> None:
    edit(base / SETTINGS, image_processor_type=kind, auto_map={"AutoImageProcessor": "code.SomeImageProcessor"})
    with pytest.raises(ModelError, match="cannot be loaded"):
        pictures_of(base)


# Chat templates

MARK = "{{- 'MARK' -}}"


def put_nowhere(folder: Path) -> None:
    (folder / "chat_template.jinja").unlink()


def put_into_json(folder: Path, template: str = CHAT_TEMPLATE) -> None:
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": template}))


def put_into_jinja(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)


def put_into_tokenizer_config(folder: Path) -> None:
    edit(folder / "tokenizer_config.json", chat_template=CHAT_TEMPLATE)


def put_into_tokenizer_config_by_name(folder: Path) -> None:
    named = [{"name": "default", "template": CHAT_TEMPLATE}, {"name": "tool_use", "template": MARK}]
    edit(folder / "tokenizer_config.json", chat_template=named)


def put_into_processor_config(folder: Path) -> None:
    (folder / "processor_config.json").write_text(json.dumps({"chat_template": CHAT_TEMPLATE}))


def put_into_folder(folder: Path) -> None:
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "default.jinja").write_text(CHAT_TEMPLATE)
    (folder / "additional_chat_templates" / "tool_use.jinja").write_text(MARK)


def put_alone_into_folder(folder: Path) -> None:
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "vision.jinja").write_text(CHAT_TEMPLATE)


@pytest.mark.parametrize(
    "put",
    [
        put_into_json,
        put_into_jinja,
        put_into_tokenizer_config,
        put_into_tokenizer_config_by_name,
        put_into_processor_config,
        put_into_folder,
        put_alone_into_folder,
    ],
)
def test_a_chat_template_is_found_in_every_possible_file(base: Path, tiny_model: Path, put: Any) -> None:
    put_nowhere(base)
    with pytest.raises(ModelError, match=r"no chat template → use an Instruct model, with its chat_template\.jinja"):
        build_template(str(base), Data(shards="."))
    put(base)
    templates = [build_template(str(path), Data(shards=".")) for path in (base, tiny_model)]
    asked = (*DishTask("", PROMPT).messages({}, 1),), [np.arange(4)], "김"
    found, expected = (template.encode(*asked).ids.tolist() for template in templates)
    assert found == expected


def test_the_processors_template_is_used_before_the_tokenizers(base: Path) -> None:
    """transformers' own processor does the same. Derived models keep a text model's template with the tokenizer."""
    put_nowhere(base)
    edit(base / "tokenizer_config.json", chat_template=TEXT_ONLY["joins"])
    put_into_json(base)
    build_template(str(base), Data(shards="."))


TEXT_ONLY = {
    "joins": "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endfor %}",
    "ignores": "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>{% endfor %}",
    "refuses": "{{ raise_exception('Only text\nis supported') }}",
    "is no template": "{% for m in messages %}",
    "asks too much": "{{ messages[0].content.parts.first }}",
}


@pytest.mark.parametrize("text", TEXT_ONLY.values(), ids=TEXT_ONLY)
def test_a_text_models_template_is_refused_in_one_line(base: Path, text: str) -> None:
    (base / "chat_template.jinja").write_text(text)
    with pytest.raises(ModelError, match=r"refuses a picture \(|does not place exactly one image token") as caught:
        build_template(str(base), Data(shards="."))
    (found,) = doctor.examine("model", lambda: doctor.check_model(str(base), None))
    assert found.level == doctor.FAULT and found.what == f"model: {caught.value.what}"
    assert "\n" not in str(caught.value) and caught.value.remedy.startswith("use the chat template and tokenizer")


def test_an_unreadable_chat_template_is_reported(base: Path) -> None:
    for text in ("", "{", "{}", "[]", "5"):
        (base / "chat_template.json").write_text(text)
        with pytest.raises(ModelError, match=r"the chat template of .* cannot be read"):
            load_tokenizer(str(base))


@pytest.mark.parametrize(
    ("name", "text"), [("tokenizer.json", "{"), ("tokenizer.json", "{}"), ("tokenizer_config.json", "{")]
)
def test_a_damaged_tokenizer_is_reported(base: Path, name: str, text: str) -> None:
    (base / name).write_text(text)
    with pytest.raises(ModelError, match=r"the tokenizer of .* cannot be read"):
        load_tokenizer(str(base))
