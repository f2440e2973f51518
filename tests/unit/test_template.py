"""Prompt, answer and tail-preserving truncation, on the real tokenizer classes."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kfood_dist.data.batch.template import IGNORED, SampleTooLong, Template, truncate
from kfood_dist.data.picture.patches import VisionSpec
from kfood_dist.errors import ModelError, RecipeError
from kfood_dist.model.base import load_config
from kfood_dist.model.processor import load_tokenizer, load_vision_spec

GRID = (1, 4, 6)  # patches; merged 2×2 they are 6 image tokens
NUM_IMAGE_TOKENS = 6


@pytest.fixture(scope="module")
def vision(tiny_model: Path) -> VisionSpec:
    return load_vision_spec(str(tiny_model), load_config(str(tiny_model)), 224)


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Path):
    return load_tokenizer(str(tiny_model))


def build(
    tokenizer, vision: VisionSpec, max_length: int = 1536, system: str = "도우미", prompt: str = "이름은?"
) -> Template:
    return Template(tokenizer, vision, system, prompt, max_length)


def test_the_whole_conversation_reads_as_the_chat_template_writes_it(tokenizer, vision: VisionSpec) -> None:
    encoded = build(tokenizer, vision).encode(GRID, "김치찌개")
    assert tokenizer.decode(encoded.ids) == (
        "<|im_start|>system\n도우미<|im_end|>\n<|im_start|>user\n<|vision_start|>"
        + "<|image_pad|>" * NUM_IMAGE_TOKENS
        + "<|vision_end|>이름은?<|im_end|>\n<|im_start|>assistant\n김치찌개<|im_end|>"
    )


def test_labels_are_the_answer_and_its_end_token_only(tokenizer, vision: VisionSpec) -> None:
    encoded = build(tokenizer, vision).encode(GRID, "김치찌개")
    answer = [
        *tokenizer("김치찌개", add_special_tokens=False)["input_ids"],
        tokenizer.convert_tokens_to_ids("<|im_end|>"),
    ]
    assert encoded.labels[-len(answer) :].tolist() == answer
    assert (encoded.labels[: -len(answer)] == IGNORED).all()
    assert encoded.is_image.sum() == NUM_IMAGE_TOKENS
    assert (encoded.ids[encoded.is_image] == vision.image_token_id).all()


def test_generation_sees_exactly_what_training_saw_before_the_answer(tokenizer, vision: VisionSpec) -> None:
    template = build(tokenizer, vision)
    asked, answered = template.encode(GRID, None), template.encode(GRID, "파전")
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
    assert kept_among_droppable == sorted(kept_among_droppable)  # False … False True … True: a tail is kept


@settings(max_examples=60, deadline=None)
@given(
    # Not a token of the chat template, which is refused; hypothesis finds such words in the code and tries them.
    system=st.text(max_size=40).filter(lambda text: "<|" not in text),
    prompt=st.text(min_size=1, max_size=60).filter(lambda text: "<|" not in text),
    answer=st.text(min_size=1, max_size=12).filter(lambda text: "<|" not in text),
    max_length=st.integers(1, 160),
)
def test_truncated_samples_keep_answer_image_and_the_tail_of_the_text(
    tokenizer, vision: VisionSpec, system: str, prompt: str, answer: str, max_length: int
) -> None:
    whole = build(tokenizer, vision, 10**6, system, prompt).encode(GRID, answer)
    specials = [vision.image_token_id, vision.vision_start_token_id, vision.vision_end_token_id]
    is_text = ~np.isin(whole.ids, specials) & (whole.labels == IGNORED)
    if (~is_text).sum() > max_length:
        with pytest.raises(SampleTooLong):
            build(tokenizer, vision, max_length, system, prompt).encode(GRID, answer)
        return
    cut = build(tokenizer, vision, max_length, system, prompt).encode(GRID, answer)
    assert len(cut) == min(len(whole), max_length)
    assert cut.labels[cut.labels != IGNORED].tolist() == whole.labels[whole.labels != IGNORED].tolist()
    visual = cut.ids[np.isin(cut.ids, specials)]
    assert visual.tolist() == [specials[1], *[specials[0]] * NUM_IMAGE_TOKENS, specials[2]]
    text = whole.ids[is_text]
    kept = cut.ids[~np.isin(cut.ids, specials) & (cut.labels == IGNORED)]
    assert kept.tolist() == text[len(text) - len(kept) :].tolist()


def test_system_text_goes_before_any_of_the_prompt(tokenizer, vision: VisionSpec) -> None:
    whole = build(tokenizer, vision, system="가" * 30, prompt="나" * 30).encode(GRID, "파전")
    cut = build(tokenizer, vision, max_length=len(whole) - 20, system="가" * 30, prompt="나" * 30).encode(GRID, "파전")
    text = tokenizer.decode(cut.ids)
    assert text.count("나") == 30
    assert "파전<|im_end|>" in text and text.count("가") < 30


def test_answer_and_image_alone_may_fill_the_limit_exactly(tokenizer, vision: VisionSpec) -> None:
    answer = [*tokenizer("파전", add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    exact = NUM_IMAGE_TOKENS + 2 + len(answer)
    assert len(build(tokenizer, vision, exact).encode(GRID, "파전")) == exact
    with pytest.raises(SampleTooLong):
        build(tokenizer, vision, exact - 1).encode(GRID, "파전")


def test_a_prompt_with_a_token_of_the_template_is_refused(tokenizer, vision: VisionSpec) -> None:
    for text in ("<|image_pad|> 이름은?", "끝<|im_end|>"):
        with pytest.raises(RecipeError, match="a token of the chat template"):
            build(tokenizer, vision, prompt=text)


def test_a_tokenizer_without_a_chat_template_is_refused(tiny_model: Path, vision: VisionSpec) -> None:
    bare = load_tokenizer(str(tiny_model))
    bare.chat_template = None
    with pytest.raises(ModelError, match="no chat template"):
        build(bare, vision)
