"""Which changes to a recipe a run may be resumed with."""

from types import SimpleNamespace

import pytest

from kfood_dist.config.sections import Recipe
from kfood_dist.train.build import adapter_facts
from kfood_dist.train.preflight import num_steps
from kfood_dist.train.resume import forbidden_changes


def recipe(**sections: dict[str, object]) -> Recipe:
    whole = {"data": {"shards": "shards"}, "model": {"base": "base"}, "run": {"dir": "run"}}
    return Recipe.model_validate({name: whole.get(name, {}) | sections.get(name, {}) for name in {*whole, *sections}})


@pytest.mark.parametrize(("key", "value", "was"), [("split", "test", "val"), ("max_samples", 8, None)])
def test_what_is_measured_stays_once_something_was(key: str, value: object, was: object) -> None:
    """Or the best checkpoint would be the best of different things."""
    assert forbidden_changes(recipe(), recipe(eval={key: value}), measured=False) == []
    told = [f"eval.{key} was {was} and is now {value}"]
    assert forbidden_changes(recipe(), recipe(eval={key: value, "every_steps": 5}), measured=True) == told


def test_how_often_and_how_long_may_change_and_what_is_learned_may_not() -> None:
    changed = recipe(train={"max_steps": 7}, data={"num_workers": 9}, eval={"every_steps": 5, "batch_size": 3})
    assert forbidden_changes(recipe(), changed, measured=True) == []
    changed = recipe(train={"seed": 1}, lora={"r": 4})
    assert [words.split()[0] for words in forbidden_changes(recipe(), changed, False)] == ["lora.r", "train.seed"]


def test_an_adapter_says_how_it_was_asked() -> None:
    """All that evaluation and prediction repeat; `resize` is the shards' own."""
    asked = recipe(
        data={"system": "s", "prompt": "p", "image_size": 112, "max_length": 99}, model={"precision": "fp32"}
    )
    assert adapter_facts(asked, "letterbox") == {
        "base": "base", "task": "dish", "system": "s", "prompt": "p", "image_size": 112, "resize": "letterbox",
        "max_length": 99, "quantization": "nf4", "precision": "fp32", "attention": "sdpa",
        "parts": {"language_model": "lora", "connector": "frozen", "tower": "frozen"},
    }  # fmt: skip


def test_a_run_is_as_long_as_its_epochs_or_its_steps() -> None:
    plan = SimpleNamespace(steps_per_epoch=4)
    assert num_steps(recipe(train={"epochs": 3}), plan) == 12  # type: ignore[arg-type]
    assert num_steps(recipe(train={"epochs": 3, "max_steps": 5}), plan) == 5  # type: ignore[arg-type]
