"""A skipped step: which samples are named, when the run ends, and which checkpoint counts as good."""

import math
from pathlib import Path

import pytest
import torch

from kfood_dist.data.batch.collate import Batch, SkippedSample
from kfood_dist.errors import TrainingError
from kfood_dist.system.world import World
from kfood_dist.train.engine.base import Update
from kfood_dist.train.run.checkpoint import MARKER
from kfood_dist.train.run.monitor import RunLog
from kfood_dist.train.run.skips import Loss, SkipWatch, last_good, reason

APPLIED = Update(grad_norm=0.5, applied=True, loss_scale=None)
SKIPPED = Update(grad_norm=math.nan, applied=False, loss_scale=None)


def batch(*ids: int) -> Batch:
    nothing = torch.zeros(0)
    return Batch(*[nothing] * 5, {}, {}, *[nothing] * 3, ids=ids)


@pytest.fixture
def watch(tmp_path: Path) -> SkipWatch:
    log = RunLog(tmp_path, World(), 0, max_steps=100, every=1)
    return SkipWatch(2, 0, 100, lambda i: f"train-{i}", tmp_path / "checkpoints", World(), log)


def checkpoint(folder: Path, step: int, complete: bool = True) -> Path:
    path = folder / "checkpoints" / f"step-{step:08d}"
    path.mkdir(parents=True)
    if complete:
        (path / MARKER).touch()
    return path


def test_only_the_samples_whose_loss_is_not_finite_are_named(watch: SkipWatch, tmp_path: Path) -> None:
    filler = torch.tensor([0.0])
    watch.look(6, SKIPPED, [batch(3, 8), batch()], [torch.tensor([math.inf, 1.0]), filler])
    log = (tmp_path / "log.txt").read_text()
    assert "step 7 skipped: the loss is not finite for train-3 (inf)" in log
    assert "train-8" not in log


def test_a_non_finite_gradient_names_up_to_fifty_samples_of_the_step() -> None:
    losses = [Loss(f"train-{i}", 1.0) for i in range(60)]
    message = reason(SKIPPED, losses, [])
    assert message.startswith("a gradient is not finite, though each sample's loss is")
    assert "train-49" in message and "train-50" not in message and message.endswith("and 10 more")


def test_a_step_without_a_usable_sample_names_one_with_its_reason() -> None:
    message = reason(SKIPPED, [], [SkippedSample("train-3", "too long"), SkippedSample("train-4", "too long")])
    assert message == "none of its samples can be used, train-3 for example: too long"


def test_a_run_without_any_update_ends_unless_the_loss_scale_of_fp16_settles(watch: SkipWatch) -> None:
    watch.max_steps = 1
    watch.look(0, Update(math.inf, False, 65536.0), [batch(3)], [torch.tensor([1.0])])
    with pytest.raises(TrainingError, match="no step of the run changed the weights; step 1: the loss is not finite"):
        watch.look(0, SKIPPED, [batch(3)], [torch.tensor([math.nan])])


def test_an_overflow_of_the_loss_scale_names_samples_only_at_scale_1() -> None:
    losses = [Loss("train-0", 1.0)]
    assert reason(Update(math.inf, False, 65536.0), losses, []).endswith("at loss scale 65536, which is halved")
    assert "train-0" in reason(Update(math.inf, False, 1.0), losses, [])
    assert "train-0 (nan)" in reason(Update(math.nan, False, 65536.0), [Loss("train-0", math.nan)], [])


def test_too_many_skipped_steps_in_a_row_end_the_run_and_an_update_resets_the_count(watch, tmp_path: Path) -> None:
    good = checkpoint(tmp_path, 2)
    spoilt = [batch(3)], [torch.tensor([math.nan])]
    for step, update in enumerate((APPLIED, SKIPPED, SKIPPED, APPLIED, SKIPPED, SKIPPED)):
        watch.look(step, update, *spoilt)
    with pytest.raises(TrainingError) as raised:
        watch.look(6, SKIPPED, *spoilt)
    text = str(raised.value)
    assert "steps skipped in a row: 3, more than train.max_skipped_steps 2" in text
    assert "train-3 (nan)" in text and f"the last good checkpoint is {good}" in text and "→" in text


def test_a_checkpoint_is_good_once_a_later_step_was_taken_with_its_weights(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    assert last_good(folder, 3) == "there is no checkpoint yet that is known to be good"
    good = checkpoint(tmp_path, 4)
    checkpoint(tmp_path, 6)
    checkpoint(tmp_path, 8, complete=False)
    # Step 6 was the last one applied. It used the weights after 5 steps, and no step has used the weights after 6.
    message = last_good(folder, 6)
    assert message.startswith(f"the last good checkpoint is {good} (delete step-00000006 if")
    assert "step-00000008" not in message
    assert last_good(folder, 7).endswith("step-00000006")
