"""The loop around the engine: the random numbers of a step, validation, and the steps that are saved."""

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from kfood_dist.data.batch.collate import SkippedSample
from kfood_dist.model.objective.base import Outcome
from kfood_dist.system.world import World
from kfood_dist.train import validate
from kfood_dist.train.loop import Trainer, seed_step
from kfood_dist.train.run.checkpoint import Validation
from kfood_dist.train.saving import Saver
from kfood_dist.train.validate import Validator


def test_random_numbers_depend_on_seed_step_and_rank() -> None:
    def drawn(*words: int) -> tuple[float, ...]:
        seed_step(*words)
        return tuple(torch.rand(4).tolist())

    assert drawn(1, 2, 3) == drawn(1, 2, 3)
    assert len({drawn(*words) for words in ((1, 2, 3), (0, 2, 3), (1, 0, 3), (1, 2, 0))}) == 4


def test_a_step_as_good_as_the_best_is_saved_between_two_regular_saves(monkeypatch: pytest.MonkeyPatch) -> None:
    assert saved_steps(monkeypatch, [measured(accuracy=a, loss=1.0) for a in (0.2, 0.6, 0.6, 0.4, 0.5)]) == [1, 2, 3, 5]


def test_the_best_step_can_be_the_one_with_the_lowest_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    by_loss = [measured(accuracy=0.1 * i, loss=x, best_by="loss") for i, x in enumerate((3.0, 2.0, 2.5, 2.0, 2.1))]
    assert saved_steps(monkeypatch, by_loss) == [1, 2, 4, 5], "a later step with an equal loss is saved too"


def measured(**facts: Any) -> Validation:
    return Validation.model_validate(facts)


def saved_steps(monkeypatch: pytest.MonkeyPatch, validations: list[Validation]) -> list[int]:
    """Return which of five steps are saved if each is validated."""
    saver, saved = object.__new__(Saver), []
    saver.every_steps, saver.best_score, saver.retry_at = 100, -math.inf, 0
    trainer = object.__new__(Trainer)
    trainer.world, trainer.max_steps, trainer.saver = World(), 5, saver
    trainer.log = SimpleNamespace(step=lambda row: None)
    found = iter(validations)
    trainer.validator = SimpleNamespace(is_due=lambda done, last: True, evaluate=lambda done: next(found))

    def save(self: Saver, done: int, measured: Validation, insist: bool) -> bool:
        saved.append(done)
        self.best_score = max(self.best_score, measured.score)
        return True

    monkeypatch.setattr(Trainer, "train_step", lambda self, step, batches: {})
    monkeypatch.setattr(Trainer, "_write_run_json", lambda self, done: None)
    monkeypatch.setattr(Saver, "save", save)
    assert trainer._take_steps(0, iter(())) == 5
    return saved


def test_validation_uses_the_first_max_samples() -> None:
    validator = object.__new__(Validator)
    validator.collator = SimpleNamespace(shards=range(9))
    for asked, found in ((4, 4), (None, 9), (20, 9)):
        validator.recipe = SimpleNamespace(eval=SimpleNamespace(max_samples=asked))
        assert validator.ids.tolist() == list(range(found))


@pytest.mark.parametrize(("skipped", "more"), [(20, None), (23, "validation: 3 more skipped")])
def test_validation_names_the_first_twenty_skipped_samples(
    monkeypatch: pytest.MonkeyPatch, skipped: int, more: str | None
) -> None:
    batch = SimpleNamespace(
        ids=(0,), refused=[SkippedSample(f"key{i}", "damaged") for i in range(skipped)], to=lambda device: batch
    )
    output: list[str] = []
    module = torch.nn.Module()
    module.weight, module.best = lambda batch: 1, "accuracy"
    validator = Validator(
        recipe=SimpleNamespace(
            eval=SimpleNamespace(max_samples=None, batch_size=64, split="val"),
            data=SimpleNamespace(num_workers=0, worker_start=None),
        ),
        world=World(),
        device=torch.device("cpu"),
        collator=SimpleNamespace(shards=range(1 + skipped)),
        module=module,
        engine=SimpleNamespace(forward=lambda batch: Outcome(torch.tensor(0.5), None, torch.tensor([True]))),
        log=SimpleNamespace(say=output.append, evaluation=lambda *words: None),
        watch=SimpleNamespace(heartbeat=lambda what: None),
        stop=SimpleNamespace(is_requested=lambda: False),
    )
    monkeypatch.setattr(validate, "stream", lambda *words, **named: (one for one in [batch]))
    assert validator.evaluate(1) == measured(loss=0.5, accuracy=1 / (1 + skipped))
    assert output == [f"validation: key{i} skipped: damaged" for i in range(20)] + ([more] if more else [])
