"""The loop around the engine: what a step draws, what is measured, and which steps are saved."""

from types import SimpleNamespace

import pytest
import torch

from kfood_dist.data.batch.collate import LeftOut
from kfood_dist.system.world import World
from kfood_dist.train import loop
from kfood_dist.train.loop import Trainer, seed_step


def test_random_numbers_follow_from_seed_step_and_rank() -> None:
    def drawn(*words: int) -> tuple[float, ...]:
        seed_step(*words)
        return tuple(torch.rand(4).tolist())

    assert drawn(1, 2, 3) == drawn(1, 2, 3)
    assert len({drawn(*words) for words in ((1, 2, 3), (0, 2, 3), (1, 0, 3), (1, 2, 0))}) == 4


def test_a_step_between_two_saves_that_is_as_good_as_the_best_is_saved(monkeypatch: pytest.MonkeyPatch) -> None:
    accuracies = iter([0.2, 0.6, 0.6, 0.4, 0.5])
    trainer, saved = object.__new__(Trainer), []
    trainer.recipe = SimpleNamespace(
        train=SimpleNamespace(save_every_steps=100), eval=SimpleNamespace(every_steps=1, split="val")
    )
    trainer.world, trainer.max_steps, trainer.validation = World(), 5, object()
    trainer.log = SimpleNamespace(step=lambda row: None, evaluation=lambda *words: None, say=print)

    def save(self: Trainer, done: int, scores: dict[str, float], insist: bool) -> bool:
        saved.append(done)
        self.best_accuracy = max(self.best_accuracy, scores["accuracy"])
        return True

    monkeypatch.setattr(Trainer, "train_step", lambda self, step, batches: {})
    monkeypatch.setattr(Trainer, "validate", lambda self: {"accuracy": next(accuracies)})
    monkeypatch.setattr(Trainer, "_write_run_json", lambda self, done: None)
    monkeypatch.setattr(Trainer, "save", save)
    assert trainer._take_steps(0, iter(())) == 5
    assert saved == [1, 2, 3, 5], "the later of equals"


def test_a_measurement_takes_the_first_samples_asked_for() -> None:
    trainer = object.__new__(Trainer)
    trainer.validation = SimpleNamespace(shards=range(9))
    for asked, found in ((4, 4), (None, 9), (20, 9)):
        trainer.recipe = SimpleNamespace(eval=SimpleNamespace(max_samples=asked))
        assert trainer.validation_ids.tolist() == list(range(found))


@pytest.mark.parametrize(("left_out", "more"), [(20, None), (23, "validation: 3 more left out")])
def test_a_measurement_names_twenty_of_what_it_leaves_out(
    monkeypatch: pytest.MonkeyPatch, left_out: int, more: str | None
) -> None:
    batch = SimpleNamespace(
        ids=(0,), refused=[LeftOut(f"key{i}", "damaged") for i in range(left_out)], num_label_tokens=1,
        labels=torch.tensor([[-100, 5]]), to=lambda device: batch,
    )  # fmt: skip
    said: list[str] = []
    trainer = object.__new__(Trainer)
    trainer.validation, trainer.world, trainer.device = SimpleNamespace(shards=range(1 + left_out)), World(), "cpu"
    trainer.recipe = SimpleNamespace(
        eval=SimpleNamespace(max_samples=None, batch_size=64), data=SimpleNamespace(num_workers=0, worker_start=None)
    )
    trainer.log = SimpleNamespace(say=said.append)
    trainer.watch = SimpleNamespace(beat=lambda what: None)
    trainer.stop, trainer.took_s = SimpleNamespace(asked=lambda: False), {}
    trainer.module = torch.nn.Module()
    trainer.engine = SimpleNamespace(forward=lambda on_device: (torch.tensor(0.5), torch.tensor([True]), None))
    monkeypatch.setattr(loop, "stream", lambda *words, **named: (one for one in [batch]))
    scores = trainer.validate()
    assert scores == {"loss": 0.5, "accuracy": 1 / (1 + left_out), "samples": 1 + left_out}
    assert said == [f"validation: key{i} left out: damaged" for i in range(20)] + ([more] if more else [])
