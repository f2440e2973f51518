"""Packers that finish at the same time when locks do not work: a file system may have none, or only within a node."""

import errno
import fcntl
import os
import shutil
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
from pictures import folder_bytes, write_folder

from kfood_dist.cli import main
from kfood_dist.data.shards.tars import write_tar
from kfood_dist.data.shards.verify import verify
from kfood_dist.errors import KfoodError, SourceError
from kfood_dist.pack import job, workspace
from kfood_dist.pack.job import pack
from kfood_dist.pack.options import PackOptions

SMALL = PackOptions(image_size=32, shard_size=10, workers=1)
FIRST, SECOND = replace(SMALL, part=1, parts=2), replace(SMALL, part=2, parts=2)

# The merge begins once `count` packers are about to merge. Every lock is granted, so none of them waits.
TOGETHER = """
import fcntl, os, pathlib, sys, time
from kfood_dist.cli import main
from kfood_dist.pack import job

folder, count, merge = pathlib.Path(sys.argv[1]), int(sys.argv[2]), job._merge

def together(*inputs):
    (folder / str(os.getpid())).touch()
    while len(list(folder.iterdir())) < count:
        time.sleep(0.001)
    merge(*inputs)

fcntl.flock = lambda *_: None
job._merge = together
sys.exit(main(sys.argv[3:]))
"""

# Ends without a message, as a kill does, after it finishes two more shards and begins the next.
KILLED = """
import os, sys
from kfood_dist.cli import main
from kfood_dist.pack import write

finished, write_tar = [], write.write_tar

def until_killed(path, entries):
    if len(finished) == 2:
        path.write_bytes(b"half a tar")
        os._exit(9)
    finished.append(path)
    return write_tar(path, entries)

write.write_tar = until_killed
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Three dishes of fifteen pictures."""
    dishes = {"구이/구이/불고기": 15, "한과/한과/약과": 15, "만두/만두": 15}
    return write_folder(tmp_path_factory.mktemp("pictures") / "source", dishes)


@pytest.fixture(scope="module")
def undisturbed(source, tmp_path_factory):
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    pack(source, out, SMALL)
    return folder_bytes(out)


def prepare_all(source: Path, out: Path) -> Path:
    """Prepare all chunks but write no shard, and return the work folder."""
    work = out.parent / f".{out.name}.partial"
    work.mkdir()
    with open(work / "merge.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert pack(source, out, SMALL).manifest is None
    return work


def words(source: Path, out: Path) -> list[str]:
    return ["pack", str(source), str(out), "--image-size", "32", "--shard-size", "10", "--workers", "1"]


def test_processes_that_merge_at_the_same_time_all_succeed(source, undisturbed, tmp_path):
    for number in range(4):
        place = tmp_path / str(number)
        out, ready = place / "out", place / "ready"
        ready.mkdir(parents=True)
        prepare_all(source, out)
        command = [sys.executable, "-c", TOGETHER, str(ready), "2", *words(source, out)]
        packers = [
            subprocess.Popen([*command, "--part", part], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
            for part in ("1/2", "2/2")
        ]
        ends = [packer.communicate(timeout=120) for packer in packers]
        assert [packer.returncode for packer in packers] == [0, 0], ends
        output = sorted(out_said.split()[0] for out_said, _ in ends)
        assert output == ["packed", "reused"], ends
        assert any("another packer finished it" in out_said for out_said, _ in ends)
        assert folder_bytes(out) == undisturbed
        assert sorted(path.name for path in place.iterdir()) == ["out", "ready"]


@pytest.mark.parametrize("stage", ["_prepare", "shard_folder", "open_storage", "place", "verify", "publish"])
def test_the_slower_packer_succeeds_at_any_stage_too(source, undisturbed, tmp_path, monkeypatch, stage):
    """One packer waits at that stage until the other has finished and removed the work folder."""
    prepare_all(source, tmp_path / "out")
    monkeypatch.setattr(fcntl, "flock", lambda *_: None)
    real, reached, done = getattr(job, stage), threading.Event(), threading.Event()

    def one_is_slow(*inputs):
        if threading.current_thread().name.startswith("slow"):
            reached.set()
            assert done.wait(60)
        assert reached.wait(60)
        return real(*inputs)

    def quick():
        try:
            return pack(source, tmp_path / "out", FIRST)
        finally:
            done.set()

    monkeypatch.setattr(job, stage, one_is_slow)
    with ThreadPoolExecutor(1, "slow") as one, ThreadPoolExecutor(1, "quick") as another:
        slower, quicker = one.submit(pack, source, tmp_path / "out", SECOND), another.submit(quick)
        assert not quicker.result(120).reused
        assert slower.result(120).by_another
    assert folder_bytes(tmp_path / "out") == undisturbed
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_packer_that_starts_just_after_the_end_leaves_nothing_behind(source, tmp_path, monkeypatch):
    """OUT appears after the packer has looked for it and before the packer has its work folder."""
    real = job.require_enough

    def meanwhile(*inputs):
        monkeypatch.setattr(job, "require_enough", real)
        pack(source, tmp_path / "out", SMALL)

    monkeypatch.setattr(job, "require_enough", meanwhile)
    assert pack(source, tmp_path / "out", FIRST).by_another
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_out_that_another_data_set_filled_meanwhile_is_an_error(source, undisturbed, tmp_path, monkeypatch):
    out = tmp_path / "out"
    pack(source, tmp_path / "other", replace(SMALL, seed=1))
    real = job.publish

    def too_late(*inputs):
        (tmp_path / "other").rename(out)
        real(*inputs)

    with monkeypatch.context() as patch:
        patch.setattr(job, "publish", too_late)
        with pytest.raises(SourceError, match=r"out was filled by another process meanwhile → choose another OUT"):
            pack(source, out, SMALL)
    shutil.rmtree(out)
    pack(source, out, SMALL)
    assert folder_bytes(out) == undisturbed


def test_a_packer_reports_its_own_error(source, tmp_path, monkeypatch):
    def forbidden(*inputs):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(job, "publish", forbidden)
    with pytest.raises(KfoodError, match=r"cannot write .*Input/output error"):
        pack(source, tmp_path / "out", SMALL)


@pytest.mark.parametrize("has_links", [True, False])
def test_shards_that_a_killed_packer_finished_are_taken_over(source, undisturbed, tmp_path, monkeypatch, has_links):
    work = prepare_all(source, tmp_path / "out")
    for _ in range(2):  # the second takes over the shards of the first
        killed = subprocess.run([sys.executable, "-c", KILLED, *words(source, tmp_path / "out")])
        assert killed.returncode == 9
    assert sorted(len(list(left.glob("*.index.npy"))) for left in work.glob("*.*.*.*/")) == [2, 4]
    if not has_links:
        monkeypatch.setattr(os, "link", no_links)
    written = []
    monkeypatch.setattr(
        "kfood_dist.pack.write.write_tar", lambda path, e: written.append(path.name) or write_tar(path, e)
    )
    pack(source, tmp_path / "out", SMALL)
    assert len(written) == (2 if has_links else 6)
    assert folder_bytes(tmp_path / "out") == undisturbed
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def no_links(*paths):
    raise OSError(errno.EPERM, "Operation not permitted")


def test_damaged_shards_are_not_taken_over_again(source, undisturbed, tmp_path, monkeypatch):
    work = prepare_all(source, tmp_path / "out")
    with monkeypatch.context() as patch:
        patch.setattr(job, "publish", lambda *_: sys.exit("stopped"))
        with pytest.raises(SystemExit):
            pack(source, tmp_path / "out", SMALL)
    [left] = work.glob("*.*.*.*/")
    with open(left / "train-000001.tar", "r+b") as tar:
        tar.seek(600)
        tar.write(b"rot")
    with pytest.raises(KfoodError, match=r"damaged when read back .*train-000001"):
        pack(source, tmp_path / "out", SMALL)
    pack(source, tmp_path / "out", SMALL)
    assert folder_bytes(tmp_path / "out") == undisturbed


def test_the_leftovers_of_a_packer_killed_after_publishing_are_removed(source, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(workspace, "remove_work", lambda out: None)
        pack(source, tmp_path / "out", SMALL)
    assert (tmp_path / ".out.partial").exists()
    assert pack(source, tmp_path / "out", FIRST).reused
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_packing_without_locks_warns_and_works(source, tmp_path, capsys, monkeypatch):
    def unsupported(*_):
        raise OSError(errno.ENOTSUP, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    assert main(words(source, tmp_path / "out")) == 0
    output = capsys.readouterr().err
    assert output.count("has no locks (Operation not supported); --part K/N works, but") == 1
    assert verify(tmp_path / "out") == []
