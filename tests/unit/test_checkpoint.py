"""Only complete checkpoints count, whatever files a kill leaves behind."""

import errno
import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from kfood_dist.cli import build_parser
from kfood_dist.config.recipe import build_recipe
from kfood_dist.errors import CheckpointError
from kfood_dist.system.world import World
from kfood_dist.train.engine import state
from kfood_dist.train.main import best_step, evaluation_command
from kfood_dist.train.run import checkpoint
from kfood_dist.train.run.checkpoint import Validation

FACTS = {
    "data": {"epoch": 0}, "base_fingerprint": "f", "world_size": 1, "distributed_type": "NO", "zero_stage": 0
}  # fmt: skip


def write_some(target: checkpoint.Checkpoint) -> None:
    (target.engine / "weights").write_text(str(target.step))
    target.adapter.mkdir()
    (target.adapter / "adapter_model.safetensors").write_text(str(target.step))


def save(folder: Path, step: int, keep: int = 2, accuracy: float | None = None) -> checkpoint.Checkpoint:
    validation = None if accuracy is None else {"accuracy": accuracy, "loss": 1.0}
    return checkpoint.save(folder, step, {**FACTS, "validation": validation}, World(), write_some, keep)


def test_the_newest_complete_checkpoint_is_found_and_older_ones_are_pruned(tmp_path: Path) -> None:
    assert checkpoint.newest(tmp_path / "checkpoints") is None
    for step in (5, 10, 15, 100):
        save(tmp_path, step)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000015", "step-00000100"]
    newest = checkpoint.newest(tmp_path)
    assert newest is not None and newest.step == 100
    record = newest.record()
    assert (record.format_version, record.step, record.data) == (checkpoint.FORMAT_VERSION, 100, {"epoch": 0})
    assert sorted(record.files) == ["adapter/adapter_model.safetensors", "engine/weights"]
    newest.require_undamaged()


def test_the_best_and_the_newest_checkpoint_are_never_pruned(tmp_path: Path) -> None:
    for step, accuracy in ((1, 0.2), (2, 0.8), (3, 0.5), (4, None), (5, 0.8), (6, 0.1), (7, None)):
        save(tmp_path, step, keep=1, accuracy=accuracy)
        best = checkpoint.best(tmp_path)
        assert best is not None and best[0].step == {1: 1, 2: 2, 3: 2, 4: 2, 5: 5, 6: 5, 7: 5}[step]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000005", "step-00000007"]
    assert checkpoint.best(tmp_path / "none") is None
    assert best_step(tmp_path, "val") == "; best step 5 (val accuracy 0.8)"
    assert best_step(tmp_path / "none", "val") == ""


def test_the_suggested_next_command_can_be_pasted(tmp_path: Path) -> None:
    """This includes names with spaces and a #."""
    tree = {"data": {"shards": "shards/my set"}, "model": {"base": "m"}, "run": {"dir": "runs/try #2"}}
    command = evaluation_command(build_recipe(tree, [], "recipe"), "test")
    assert shlex.split(command)[:2] == ["bash", "launch/eval.sh"]
    args = build_parser("eval").parse_args(["eval", *shlex.split(command)[2:]])
    assert (args.shards, args.split, args.model) == ("shards/my set", "test", "m")
    assert (args.adapter, args.out) == (Path("runs/try #2/adapter"), Path("runs/try #2/tuned"))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Mount a separate file system of 1 MB. Yields its folder."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(disk)], capture_output=True).returncode:
        pytest.skip("file systems cannot be mounted here")
    yield disk
    subprocess.run(["umount", "--lazy", str(disk)], check=True)


def remount(disk: Path, how: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{how}", str(disk)], check=True)


def test_a_read_only_disk_raises_checkpoint_error_and_keeps_all_checkpoints(small_disk: Path) -> None:
    for step in (1, 2, 3):
        save(small_disk, step, keep=3)
    remount(small_disk, "ro")
    with pytest.raises(CheckpointError, match=r"rank 0: .*Read-only file system.* → make room there, or make it"):
        save(small_disk, 4, keep=3)
    checkpoint.prune(small_disk, keep=1)
    assert [c.name for c in sorted(small_disk.iterdir())] == [f"step-{step:08d}" for step in (1, 2, 3)]
    remount(small_disk, "rw")
    assert save(small_disk, 4, keep=3).step == 4


def test_older_checkpoints_are_removed_only_if_the_disk_is_full(small_disk: Path) -> None:
    def fill(target: checkpoint.Checkpoint) -> None:
        (target.engine / "weights").write_bytes(bytes(300_000))

    def broken(target: checkpoint.Checkpoint) -> None:
        raise OSError(errno.EIO, "Input/output error")

    for step in (1, 2, 3):
        checkpoint.save(small_disk, step, FACTS, World(), fill, keep=5)
    with pytest.raises(CheckpointError, match="Input/output error"):
        checkpoint.save(small_disk, 4, FACTS, World(), broken, keep=5)
    assert len(list(small_disk.iterdir())) == 3
    with pytest.raises(CheckpointError, match="No space left"):
        checkpoint.save(small_disk, 4, FACTS, World(), fill, keep=5)
    assert [c.name for c in small_disk.iterdir()] == ["step-00000003"]
    assert checkpoint.save(small_disk, 4, FACTS, World(), fill, keep=5).step == 4


def test_a_validation_that_is_added_later_counts(tmp_path: Path) -> None:
    save(tmp_path, 1, accuracy=0.5)
    later = save(tmp_path, 2)
    checkpoint.add_validation(later, Validation(accuracy=0.75, loss=1.0))
    later.require_undamaged()
    best = checkpoint.best(tmp_path)
    assert best is not None and (best[0].step, best[1].accuracy) == (2, 0.75)


def test_a_loss_that_is_not_finite_is_the_worst(tmp_path: Path) -> None:
    for step, loss in ((1, math.nan), (2, 3.0), (3, math.nan)):
        checkpoint.add_validation(save(tmp_path, step, keep=3), Validation(accuracy=0.0, loss=loss, best_by="loss"))
    best = checkpoint.best(tmp_path)
    assert best is not None and best[0].step == 2


def test_a_full_disk_keeps_only_the_newest_and_the_best_checkpoint(tmp_path: Path) -> None:
    for step, accuracy in ((1, 0.9), (2, 0.1), (3, 0.1), (4, 0.1)):
        save(tmp_path, step, keep=3, accuracy=accuracy)

    def fail(target: checkpoint.Checkpoint) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(CheckpointError, match="make room there"):
        checkpoint.save(tmp_path, 5, FACTS, World(), fail, 3)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000001", "step-00000004"]


def test_a_folder_that_cannot_be_written_is_reported(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("a file")
    with pytest.raises(CheckpointError, match="could not be written"):
        save(tmp_path / "checkpoints", 1)


def test_a_failed_write_leaves_the_previous_checkpoint_and_can_be_repeated(tmp_path: Path) -> None:
    save(tmp_path, 5)

    def fail(target: checkpoint.Checkpoint) -> None:
        write_some(target)
        raise OSError(28, "No space left on device")

    with pytest.raises(CheckpointError, match=r"step-00000010 could not be written \(rank 0: .*No space left"):
        checkpoint.save(tmp_path, 10, FACTS, World(), fail, 2)
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
    assert save(tmp_path, 10).record().step == 10


def test_the_next_save_removes_a_checkpoint_without_marker_and_nothing_else(tmp_path: Path) -> None:
    """It was half removed, or renamed when the disk became full. It takes space that is needed."""
    half, copy = save(tmp_path, 1).folder, tmp_path / "step-00000001-copy"
    shutil.copytree(half, copy)
    for folder in (half, copy):
        (folder / checkpoint.MARKER).unlink()
    save(tmp_path, 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000001-copy", "step-00000002"]


def test_a_checkpoint_of_another_format_is_refused(tmp_path: Path) -> None:
    made = save(tmp_path, 5)
    (made.folder / checkpoint.STATE_FILE).write_text(json.dumps({"format_version": 99}))
    with pytest.raises(CheckpointError, match="format version 99; this program reads 2"):
        made.record()
    shutil.rmtree(made.folder)
    with pytest.raises(CheckpointError, match=r"no readable state\.json"):
        made.record()


@pytest.mark.parametrize(
    "damage",
    [
        lambda raw: raw.pop("world_size"),
        lambda raw: raw.pop("base_fingerprint"),
        lambda raw: raw.update(data=[1]),
        lambda raw: raw.update(files=None),
        lambda raw: raw.update(validation="good"),
        lambda raw: raw.update(step=6),
    ],
)
def test_a_damaged_record_raises_checkpoint_error(tmp_path: Path, damage) -> None:
    made = save(tmp_path, 5)
    raw = json.loads((made.folder / checkpoint.STATE_FILE).read_text())
    damage(raw)
    (made.folder / checkpoint.STATE_FILE).write_text(json.dumps(raw))
    with pytest.raises(CheckpointError, match=r"step-00000005 .*delete that checkpoint's folder"):
        made.record()
    assert checkpoint.best(tmp_path) is None


@pytest.mark.parametrize("text", ["", "[]", "null", "3", '"x"', "[" * 100_000, "\xff"])
def test_an_unreadable_record_raises_checkpoint_error(tmp_path: Path, text: str) -> None:
    made = save(tmp_path, 5)
    (made.folder / checkpoint.STATE_FILE).write_text(text, encoding="latin-1")
    with pytest.raises(CheckpointError, match=r"has no readable state\.json"):
        made.record()


def test_a_missing_truncated_or_altered_file_is_named(tmp_path: Path) -> None:
    made = save(tmp_path, 5)
    for name in made.record().files:
        path = made.folder / name
        whole = path.read_bytes()
        for bad in (whole[:-1], whole + b"x", bytes([whole[0] ^ 1]) + whole[1:]):
            path.write_bytes(bad)
            with pytest.raises(CheckpointError, match=f"{name} does not have the bytes that were written"):
                made.require_undamaged()
        path.unlink()
        with pytest.raises(CheckpointError, match=f"{name} cannot be read"):
            made.require_undamaged()
        path.write_bytes(whole)
    made.require_undamaged()


def save_for_ever(folder: Path, step: int, fragments: list[state.Fragment], optimizer: torch.optim.Optimizer) -> None:
    """Write checkpoints without end. Every number in a checkpoint is its step."""

    def write(target: checkpoint.Checkpoint) -> None:
        fragments[0].tensor.detach().fill_(target.step)
        state.save(target.engine / state.file_name(0), fragments, optimizer, {})
        target.adapter.mkdir()
        shutil.copy(target.engine / state.file_name(0), target.adapter / "adapter_model.safetensors")

    while True:
        checkpoint.save(folder, step, FACTS, World(), write, 2)
        step += 1


def kill_many_times(folder: Path, kills: int) -> None:
    """Fork a writer, kill it and check the folder, many times. Runs in a new process, without torch's threads."""
    torch.set_num_threads(1)
    fragments = [state.Fragment(torch.zeros(200_000).requires_grad_(), (state.Slice("a", 0, 200_000, 0),))]
    optimizer = torch.optim.AdamW([fragments[0].tensor])
    step, seen = 1, set()
    for kill in range(kills):
        if (child := os.fork()) == 0:
            save_for_ever(folder, step, fragments, optimizer)
        time.sleep(0.01 + kill * 0.005)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        seen |= {re.sub(r"\d+", "N", p.name) + " whole" * (p / "COMPLETE").exists() for p in folder.iterdir()}
        newest = checkpoint.newest(folder)
        if newest is None:
            assert step == 1
            continue
        newest.require_undamaged()
        assert newest.step >= step - 1
        with state.Saved(newest.engine) as saved:
            weights = saved.read(state.WEIGHTS, state.Slice("a", 0, 200_000, 0))
        assert torch.equal(weights, torch.full((200_000,), float(newest.step)))
        step = newest.step + 1
    assert step > kills / 4, step  # not all kills came too early
    assert {"step-N whole", ".step-N.partial"} <= seen, seen  # and some came during a write


def test_a_kill_at_any_moment_of_writing_leaves_a_complete_checkpoint(tmp_path: Path) -> None:
    """Sixty kills come at different times of writing. Each writer continues after the newest checkpoint."""
    code = f"import sys; sys.path[:0] = [{str(Path(__file__).parent)!r}]; import test_checkpoint, pathlib;"
    code += f"test_checkpoint.kill_many_times(pathlib.Path({str(tmp_path)!r}), 60)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


def test_all_files_are_synced_before_the_marker_is_written(tmp_path: Path, monkeypatch) -> None:
    """After a power cut, data that was not synced before the rename may be missing."""
    done: list[tuple[str, str]] = []

    def noted(what: str, real, name):
        def run(*words, **options):
            done.append((what, name(words[0])))
            return real(*words, **options)

        return run

    monkeypatch.setattr(os, "fsync", noted("sync", os.fsync, lambda number: os.readlink(f"/proc/self/fd/{number}")))
    monkeypatch.setattr(Path, "rename", noted("rename", Path.rename, str))
    monkeypatch.setattr(Path, "touch", noted("mark", Path.touch, str))
    made = save(tmp_path, 5)
    partial, marker = tmp_path / ".step-00000005.partial", str(made.folder / checkpoint.MARKER)
    at = done.index(("rename", str(partial)))
    for name in (*made.record().files, checkpoint.STATE_FILE, "."):
        assert ("sync", str(partial / name)) in done[:at], name
    assert ("mark", marker) == done[at + 1]
    assert ("sync", marker) in done[at + 2 :] and ("sync", str(tmp_path)) in done[at + 2 :]


def test_pruning_removes_the_marker_first(tmp_path: Path, monkeypatch) -> None:
    for step in (1, 2):
        save(tmp_path, step)
    marked, remove = [], shutil.rmtree

    def removed(folder: Path, **options) -> None:
        marked.append((folder / checkpoint.MARKER).exists())
        remove(folder, **options)

    monkeypatch.setattr(shutil, "rmtree", removed)
    checkpoint.prune(tmp_path, keep=1)
    assert marked == [False] and [path.name for path in tmp_path.iterdir()] == ["step-00000002"]


def test_a_write_error_of_one_rank_is_raised_on_all_ranks(tmp_path: Path) -> None:
    class FirstOfTwo(World):
        def all_gather(self, item):
            return [item, ("No space left on device", True) if writing else None]

    writing = False

    def write(target: checkpoint.Checkpoint) -> None:
        nonlocal writing
        writing = True
        write_some(target)

    with pytest.raises(CheckpointError, match=r"could not be written \(rank 1: No space left"):
        checkpoint.save(tmp_path, 1, FACTS, FirstOfTwo(), write, keep=2)
    assert not list(tmp_path.iterdir())
