"""Checkpoints: only complete ones count, whatever a kill left behind."""

import json
import shutil
from pathlib import Path

import pytest

from kfood_dist.errors import CheckpointError
from kfood_dist.runtime import World
from kfood_dist.train import checkpoint


def write_some(target: checkpoint.Checkpoint) -> None:
    (target.engine / "weights").write_text(str(target.step))
    target.adapter.mkdir()
    (target.adapter / "adapter_model.safetensors").write_text(str(target.step))


def save(folder: Path, step: int, keep: int = 2, accuracy: float | None = None) -> checkpoint.Checkpoint:
    state = {"data": {"step": step}, "validation": None if accuracy is None else {"accuracy": accuracy}}
    return checkpoint.save(folder, step, state, World(), write_some, keep)


def test_the_newest_complete_one_is_found_and_older_ones_are_pruned(tmp_path: Path) -> None:
    assert checkpoint.newest(tmp_path / "checkpoints") is None
    for step in (5, 10, 15, 100):
        save(tmp_path, step)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000015", "step-00000100"]
    newest = checkpoint.newest(tmp_path)
    assert newest is not None and newest.step == 100
    state = {"step": 100, "data": {"step": 100}, "validation": None}
    assert newest.state() == {"format_version": checkpoint.FORMAT_VERSION, **state}


def test_the_best_by_validation_is_never_pruned_and_nor_is_the_newest(tmp_path: Path) -> None:
    for step, accuracy in ((1, 0.2), (2, 0.8), (3, 0.5), (4, None), (5, 0.8), (6, 0.1), (7, None)):
        save(tmp_path, step, keep=1, accuracy=accuracy)
        best = checkpoint.best(tmp_path)
        assert best is not None and best[0].step == {1: 1, 2: 2, 3: 2, 4: 2, 5: 5, 6: 5, 7: 5}[step]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000005", "step-00000007"]
    assert checkpoint.best(tmp_path / "none") is None


def test_a_full_disk_frees_what_may_go_and_keeps_newest_and_best(tmp_path: Path) -> None:
    for step, accuracy in ((1, 0.9), (2, 0.1), (3, 0.1), (4, 0.1)):
        save(tmp_path, step, keep=3, accuracy=accuracy)

    def fail(target: checkpoint.Checkpoint) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(CheckpointError, match="make room there"):
        checkpoint.save(tmp_path, 5, {}, World(), fail, 3)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000001", "step-00000004"]


def test_a_folder_that_may_not_be_written_to_is_said(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("a file")
    with pytest.raises(CheckpointError, match="could not be written"):
        save(tmp_path / "checkpoints", 1)


def test_a_write_that_fails_leaves_the_previous_one_and_is_cleared_next_time(tmp_path: Path) -> None:
    save(tmp_path, 5)

    def fail(target: checkpoint.Checkpoint) -> None:
        write_some(target)
        raise OSError(28, "No space left on device")

    with pytest.raises(CheckpointError, match=r"step-00000010 could not be written \(rank 0: .*No space left"):
        checkpoint.save(tmp_path, 10, {}, World(), fail, 2)
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000005"]
    newest = checkpoint.newest(tmp_path)
    assert newest is not None and newest.step == 5
    save(tmp_path, 10)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000005", "step-00000010"]


def test_a_folder_without_its_marker_is_no_checkpoint(tmp_path: Path) -> None:
    save(tmp_path, 5)
    save(tmp_path, 10)
    (tmp_path / "step-00000010" / checkpoint.MARKER).unlink()
    newest = checkpoint.newest(tmp_path)
    assert newest is not None and newest.step == 5
    assert save(tmp_path, 10).state()["step"] == 10


def test_a_checkpoint_of_another_format_is_refused(tmp_path: Path) -> None:
    made = save(tmp_path, 5)
    (made.folder / checkpoint.STATE_FILE).write_text(json.dumps({"format_version": 99}))
    with pytest.raises(CheckpointError, match="format version 99; this is 2"):
        made.state()
    shutil.rmtree(made.folder)
    with pytest.raises(CheckpointError, match=r"no readable state\.json"):
        made.state()
