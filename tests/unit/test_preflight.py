"""Which changes to its recipe a run may resume with."""

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
def test_the_validation_set_cannot_change_after_the_first_evaluation(key: str, value: object, was: object) -> None:
    """Otherwise the best checkpoint would be chosen by results on different samples."""
    assert forbidden_changes(recipe(), recipe(eval={key: value}), evaluated=False) == []
    message = [f"eval.{key} was {was} and is now {value}"]
    assert forbidden_changes(recipe(), recipe(eval={key: value, "every_steps": 5}), evaluated=True) == message


def test_intervals_and_length_may_change_but_not_what_is_learned() -> None:
    changed = recipe(train={"max_steps": 7}, data={"num_workers": 9}, eval={"every_steps": 5, "batch_size": 3})
    assert forbidden_changes(recipe(), changed, evaluated=True) == []
    changed = recipe(train={"seed": 1}, lora={"r": 4})
    assert [words.split()[0] for words in forbidden_changes(recipe(), changed, False)] == ["lora.r", "train.seed"]


def test_an_adapter_keeps_the_settings_it_was_trained_with() -> None:
    """Evaluation and prediction repeat these settings. `resize` comes from the shards."""
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
