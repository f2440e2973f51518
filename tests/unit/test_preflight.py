"""Which changes to a recipe a run may be resumed with."""

import pytest

from kfood_dist.config import Recipe
from kfood_dist.train.preflight import forbidden_changes


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
