"""A finished run publishes the adapter of its best checkpoint, and says which step it comes from."""

import json
from pathlib import Path

import pytest

from kfood_dist.config.sections import Recipe
from kfood_dist.errors import CheckpointError
from kfood_dist.system.world import World
from kfood_dist.train.main import publish, train
from kfood_dist.train.publish import publish_adapter
from kfood_dist.train.run import checkpoint
from kfood_dist.train.run.stop import StopRequest

FACTS = {
    "data": {"epoch": 0}, "base_fingerprint": "f", "world_size": 1, "distributed_type": "NO", "zero_stage": 0
}  # fmt: skip


def write_some(target: checkpoint.Checkpoint) -> None:
    target.adapter.mkdir()
    (target.adapter / "adapter_model.safetensors").write_text(str(target.step))
    (target.adapter / "kfood.json").write_text(json.dumps({"step": target.step}))


def trained(folder: Path, accuracies: dict[int, float | None], keep: int = 1) -> Path:
    for step, accuracy in accuracies.items():
        validation = None if accuracy is None else {"accuracy": accuracy, "loss": 1.0}
        checkpoint.save(folder / "checkpoints", step, {**FACTS, "validation": validation}, World(), write_some, keep)
    (folder / "run.json").write_text(json.dumps({"world_size": 1}))
    return folder


def recipe(run: Path, **train_section: object) -> Recipe:
    section = {"max_steps": 9, **train_section}
    tree = {"data": {"shards": "shards"}, "model": {"base": "base"}, "run": {"dir": run}, "train": section}
    return Recipe.model_validate(tree)


def published_step(run: Path) -> int:
    """Return the published step, and check that weights, kfood.json and run.json agree on it."""
    weights = int((run / "adapter" / "adapter_model.safetensors").read_text())
    facts = json.loads((run / "run.json").read_text())
    assert facts["world_size"] == 1, "the other facts in run.json stay"
    assert json.loads((run / "adapter" / "kfood.json").read_text())["step"] == weights == facts["published"]["step"]
    assert not (run / ".adapter.partial").exists()
    return weights


@pytest.mark.parametrize(
    ("accuracies", "section", "step", "message"),
    [
        ({3: 0.2, 6: 0.75, 9: 0.5}, {}, 6, "step 6 of 9: the best by validation, 75.0% right"),
        ({3: 0.2, 6: 0.75, 9: 0.5}, {"publish": "last"}, 9, "step 9 of 9: the last, as train.publish says"),
        ({3: 0.2, 6: 0.75, 9: 0.75}, {}, 9, "step 9 of 9: the best by validation, 75.0% right"),
        ({3: 0.0, 6: None, 9: None}, {}, 3, "step 3 of 9: the best by validation, 0.0% right"),
        ({3: None, 9: None}, {}, 9, "step 9 of 9: the last, because no checkpoint was evaluated"),
    ],
)
def test_the_best_checkpoint_by_validation_or_the_last_is_published(
    tmp_path, accuracies, section, step, message
) -> None:
    run = trained(tmp_path, accuracies)
    assert str(publish_adapter(recipe(run, **section))) == f"published the adapter of {message}"
    assert published_step(run) == step


def test_a_finished_run_that_is_started_again_publishes_as_its_recipe_says(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(StopRequest, "listen", lambda self: None)
    run = trained(tmp_path, {3: 0.5, 6: 0.75, 9: 0.5})
    for which, step in (("best", 6), ("last", 9), ("best", 6)):
        assert train(recipe(run, publish=which), None, World(), publish) == 0  # type: ignore[arg-type]
        message = f"already trained, 9 steps; published the adapter of step {step} of 9"
        assert message in capsys.readouterr().out
        assert published_step(run) == step
    assert json.loads((run / "status.json").read_text()) == {"state": "finished", "step": 9}


def test_an_unwritable_run_json_does_not_lose_the_adapter(tmp_path) -> None:
    run = trained(tmp_path, {9: None})
    (run / "run.json").unlink()
    (run / "run.json").mkdir()
    assert "run.json cannot be written (Is a directory)" in str(publish_adapter(recipe(run)))
    assert (run / "adapter" / "adapter_model.safetensors").read_text() == "9"


def test_a_damaged_best_checkpoint_is_named_and_the_published_adapter_stays(tmp_path) -> None:
    run = trained(tmp_path, {3: 0.5, 6: 0.75, 9: 0.5}, keep=3)
    publish_adapter(recipe(run, publish="last"))
    best = run / "checkpoints" / "step-00000006"
    (best / "adapter" / "adapter_model.safetensors").write_text("rotten")
    with pytest.raises(
        CheckpointError, match=r"step-00000006/adapter/.* does not have the bytes that were written → delete"
    ):
        publish_adapter(recipe(run))
    assert published_step(run) == 9
    (best / "COMPLETE").unlink()
    assert publish_adapter(recipe(run)).step == 9


def test_an_unreadable_run_json_is_replaced(tmp_path) -> None:
    run = trained(tmp_path, {9: None})
    for text in ("", "{", "[1]"):
        (run / "run.json").write_text(text)
        publish_adapter(recipe(run))
        assert json.loads((run / "run.json").read_text())["published"]["step"] == 9
