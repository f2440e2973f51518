"""Prompt, answer, and truncation that keeps the tail, on the real tokenizer classes."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from asking import pictures_of
from hypothesis import given, settings
from hypothesis import strategies as st

from kfood_dist.config.sections import Data
from kfood_dist.data.batch.template import IGNORED, Encoded, SampleRefused, SampleTooLong, Template, truncate
from kfood_dist.data.picture.patches import Patches
from kfood_dist.data.task.base import PICTURE, Message
from kfood_dist.data.task.dish import DishTask
from kfood_dist.errors import ModelError, RecipeError
from kfood_dist.model.processor import build_template, load_tokenizer

NUM_IMAGE_TOKENS = 6


@pytest.fixture(scope="module")
def vision(tiny_model: Path) -> Patches:
    return pictures_of(tiny_model)


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Path):
    return load_tokenizer(str(tiny_model))


def build(
    tokenizer, vision: Patches, max_length: int = 1536, system: str = "도우미", prompt: str = "이름은?"
) -> Callable[[str | None], Encoded]:
    """Return a function that encodes an answer to one picture of 6 image tokens."""
    template, picture = Template(tokenizer, vision, max_length), np.full(NUM_IMAGE_TOKENS, vision.image_token)
    messages = DishTask(system, prompt).messages({}, 1)
    return lambda answer: template.encode(messages, [picture], answer)


def test_the_conversation_equals_the_output_of_the_chat_template(tokenizer, vision: Patches) -> None:
    encoded = build(tokenizer, vision)("김치찌개")
    assert tokenizer.decode(encoded.ids) == (
        "<|im_start|>system\n도우미<|im_end|>\n<|im_start|>user\n<|vision_start|>"
        + "<|image_pad|>" * NUM_IMAGE_TOKENS
        + "<|vision_end|>이름은?<|im_end|>\n<|im_start|>assistant\n김치찌개<|im_end|>"
    )


def test_labels_are_only_the_answer_and_its_end_token(tokenizer, vision: Patches) -> None:
    encoded = build(tokenizer, vision)("김치찌개")
    answer = [
        *tokenizer("김치찌개", add_special_tokens=False)["input_ids"],
        tokenizer.convert_tokens_to_ids("<|im_end|>"),
    ]
    assert encoded.labels[-len(answer) :].tolist() == answer
    assert (encoded.labels[: -len(answer)] == IGNORED).all()
    assert encoded.is_image.sum() == NUM_IMAGE_TOKENS
    assert (encoded.ids[encoded.is_image] == vision.image_token).all()


def test_generation_sees_exactly_what_training_saw_before_the_answer(tokenizer, vision: Patches) -> None:
    template = build(tokenizer, vision)
    asked, answered = template(None), template("파전")
    assert answered.ids[: len(asked)].tolist() == asked.ids.tolist()
    assert (asked.labels == IGNORED).all()


@given(st.lists(st.booleans(), max_size=60), st.integers(0, 70))
def test_truncation_drops_the_first_droppable_tokens_and_no_more(droppable: list[bool], max_length: int) -> None:
    flags = np.array(droppable, dtype=bool)
    if len(flags) - flags.sum() > max_length:
        with pytest.raises(SampleTooLong):
            truncate(flags, max_length)
        return
    keep = truncate(flags, max_length)
    assert keep.sum() == min(len(flags), max_length)
    assert keep[~flags].all()
    kept_among_droppable = keep[flags].tolist()
    assert kept_among_droppable == sorted(kept_among_droppable)  # False … False True … True: the tail is kept


@settings(max_examples=60, deadline=None)
@given(
    # Texts with a token of the chat template are refused. Hypothesis finds such tokens in the code and tries them.
    system=st.text(max_size=40).filter(lambda text: "<|" not in text),
    prompt=st.text(min_size=1, max_size=60).filter(lambda text: "<|" not in text),
    answer=st.text(min_size=1, max_size=12).filter(lambda text: "<|" not in text),
    max_length=st.integers(1, 160),
)
def test_truncated_samples_keep_answer_image_and_the_tail_of_the_text(
    tokenizer, vision: Patches, system: str, prompt: str, answer: str, max_length: int
) -> None:
    whole = build(tokenizer, vision, 10**6, system, prompt)(answer)
    spec = vision.spec
    specials = [spec.image_token_id, spec.vision_start_token_id, spec.vision_end_token_id]
    is_text = ~np.isin(whole.ids, specials) & (whole.labels == IGNORED)
    if (~is_text).sum() > max_length:
        with pytest.raises(SampleTooLong):
            build(tokenizer, vision, max_length, system, prompt)(answer)
        return
    cut = build(tokenizer, vision, max_length, system, prompt)(answer)
    assert len(cut) == min(len(whole), max_length)
    assert cut.labels[cut.labels != IGNORED].tolist() == whole.labels[whole.labels != IGNORED].tolist()
    visual = cut.ids[np.isin(cut.ids, specials)]
    assert visual.tolist() == [specials[1], *[specials[0]] * NUM_IMAGE_TOKENS, specials[2]]
    text = whole.ids[is_text]
    kept = cut.ids[~np.isin(cut.ids, specials) & (cut.labels == IGNORED)]
    assert kept.tolist() == text[len(text) - len(kept) :].tolist()


def test_system_text_is_cut_before_the_prompt(tokenizer, vision: Patches) -> None:
    whole = build(tokenizer, vision, system="가" * 30, prompt="나" * 30)("파전")
    cut = build(tokenizer, vision, max_length=len(whole) - 20, system="가" * 30, prompt="나" * 30)("파전")
    text = tokenizer.decode(cut.ids)
    assert text.count("나") == 30
    assert "파전<|im_end|>" in text and text.count("가") < 30


def test_answer_and_image_may_fill_the_limit_exactly(tokenizer, vision: Patches) -> None:
    answer = [*tokenizer("파전", add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    exact = NUM_IMAGE_TOKENS + 2 + len(answer)
    assert len(build(tokenizer, vision, exact)("파전")) == exact
    with pytest.raises(SampleTooLong):
        build(tokenizer, vision, exact - 1)("파전")


def test_a_prompt_with_a_token_of_the_template_is_refused(tiny_model: Path) -> None:
    for text in ("<|image_pad|> 이름은?", "끝<|im_end|>"):
        with pytest.raises(RecipeError, match=r"data\.system or data\.prompt holds .*, which is a token of the chat"):
            build_template(str(tiny_model), Data(shards=".", prompt=text))


def test_a_sample_with_a_token_of_the_template_is_refused(tokenizer, vision: Patches) -> None:
    with pytest.raises(SampleRefused, match=r"its text holds <\|image_pad\|>"):
        build(tokenizer, vision)("밥<|image_pad|>")


def test_several_pictures_are_in_their_places(tokenizer, vision: Patches) -> None:
    messages = (Message("user", (PICTURE, "앞", PICTURE, PICTURE, "뒤")),)
    pictures = [np.full(n, vision.image_token) for n in (2, 1, 3)]
    encoded = Template(tokenizer, vision, 1536).encode(messages, pictures, "밥")
    shown = ["<|vision_start|>" + "<|image_pad|>" * n + "<|vision_end|>" for n in (2, 1, 3)]
    assert f"{shown[0]}앞{shown[1]}{shown[2]}뒤" in tokenizer.decode(encoded.ids)
    assert encoded.is_image.sum() == 6
    with pytest.raises(ModelError, match="exactly one image token"):
        Template(tokenizer, vision, 1536).encode(messages, pictures[:2], "밥")


def test_a_template_that_drops_a_text_is_refused(tiny_model: Path, vision: Patches) -> None:
    """LLaVA's template drops a system text that is a string."""
    forgetful = load_tokenizer(str(tiny_model))
    forgetful.chat_template = (
        "{% for message in messages if message.role != 'system' %}{% for part in message.content %}"
        "{{ part.text or '<|vision_start|><|image_pad|><|vision_end|>' }}{% endfor %}{% endfor %}"
    )
    with pytest.raises(ModelError, match=r"drops the text '도우미' → .*data\.system=\"\""):
        build(forgetful, vision)("밥")
    assert len(build(forgetful, vision, system="")("밥"))


def test_a_tokenizer_without_a_chat_template_is_refused(tiny_model: Path, vision: Patches) -> None:
    bare = load_tokenizer(str(tiny_model))
    bare.chat_template = None
    with pytest.raises(ModelError, match="no chat template"):
        build(bare, vision)
