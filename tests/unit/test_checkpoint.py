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


def save(folder: Path, step: int, keep: int = 2) -> checkpoint.Checkpoint:
    return checkpoint.save(folder, step, {"data": {"step": step}}, World(), write_some, keep)


def test_the_newest_complete_one_is_found_and_older_ones_are_pruned(tmp_path: Path) -> None:
    assert checkpoint.newest(tmp_path / "checkpoints") is None
    for step in (5, 10, 15, 100):
        save(tmp_path, step)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000015", "step-00000100"]
    newest = checkpoint.newest(tmp_path)
    assert newest is not None and newest.step == 100
    assert newest.state() == {"format_version": checkpoint.FORMAT_VERSION, "step": 100, "data": {"step": 100}}


def test_a_write_that_fails_leaves_the_previous_one_and_is_cleared_next_time(tmp_path: Path) -> None:
    save(tmp_path, 5)

    def fail(target: checkpoint.Checkpoint) -> None:
        write_some(target)
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError):
        checkpoint.save(tmp_path, 10, {}, World(), fail, 2)
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
    with pytest.raises(CheckpointError, match="format version 99; this is 1"):
        made.state()
    shutil.rmtree(made.folder)
    with pytest.raises(CheckpointError, match=r"no readable state\.json"):
        made.state()
