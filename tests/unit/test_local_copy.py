"""A local copy is made once per node, verified and removed, even if processes are killed or the source is damaged."""

import errno
import fcntl
import hashlib
import math
import multiprocessing
import os
import shutil
import signal
import tempfile
import threading
from collections import namedtuple
from pathlib import Path

import pytest
from faulty_server import FAULTS, serving
from pictures import write_folder

from kfood_dist.config.sections import Recipe
from kfood_dist.data.shards.local_copy import local_copies, local_copy
from kfood_dist.data.shards.manifest import load_manifest
from kfood_dist.data.shards.reader import open_split
from kfood_dist.data.shards.sample import Sample
from kfood_dist.data.storage.remote import RemoteStorage
from kfood_dist.errors import LaunchError, ShardError
from kfood_dist.pack.options import PackOptions
from kfood_dist.pack.pack import pack
from kfood_dist.pack.split import parse_fractions
from kfood_dist.train.main import splits_read, with_places

OPTIONS = PackOptions(image_size=32, shard_size=7, workers=1, fractions=parse_fractions("0.75,0,0.25"))
FILES = [f"train-00000{n}.{kind}" for n in range(3) for kind in ("index.npy", "tar")]
FORK = multiprocessing.get_context("fork")


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """Return a folder with 18 train samples in 3 shards and 6 test samples."""
    root = tmp_path_factory.mktemp("packed")
    pack(write_folder(root / "source", {"구이/구이/불고기": 12, "한과/약과": 12}), root / "kfood", OPTIONS)
    return root / "kfood"


@pytest.fixture
def server(packed):
    with serving(packed) as server:
        yield server


@pytest.fixture
def place(tmp_path):
    return tmp_path / "nvme" / "copy"


def quick(url, **options):
    return RemoteStorage(url, **{"num_tries": 3, "timeout_s": 0.3, "pause_s": 0.01} | options)


def home(place):
    """Return the folder of this user's copies."""
    return place / f"kfood-copy-{os.geteuid()}"


def copied(place):
    """Return the names of the finished files of the only data set that is being copied."""
    [folder] = [path for path in home(place).iterdir() if path.is_dir()]
    return sorted(path.name for path in folder.iterdir() if path.suffix in (".tar", ".npy"))


@pytest.mark.parametrize("remote", [True, False])
def test_a_split_is_copied_used_and_removed(packed, server, place, remote):
    with local_copy(quick(server.url) if remote else packed, ["train"], place) as folder:
        assert folder.parent == home(place)
        assert home(place).stat().st_mode & 0o777 == 0o700
        assert sorted(p.name for p in folder.iterdir()) == sorted([".copying", ".in-use", "manifest.json", *FILES])
        split = open_split(folder, "train")
        split.require_files()
        assert split.read_many(range(18)) == open_split(packed, "train").read_many(range(18))
        assert split.index_hash == open_split(packed, "train").index_hash
        with pytest.raises(ShardError, match=r"test-000000.tar cannot be opened"):
            open_split(folder, "test").require_files()
    assert list(place.iterdir()) == []


def test_a_second_user_adds_its_split_and_the_last_one_out_removes(packed, server, place):
    first = local_copy(quick(server.url), ["train"], place)
    second = local_copy(quick(server.url), ["train", "test"], place)
    folder = first.__enter__()
    assert second.__enter__() == folder
    assert {name: server.gets[name] for name in FILES} == dict.fromkeys(FILES, 1)
    first.__exit__(None, None, None)
    assert len(open_split(folder, "test").read_many(range(6))) == 6
    second.__exit__(None, None, None)
    assert list(place.iterdir()) == []


def use(url, place, barrier, results):
    with local_copy(quick(url, timeout_s=20), ["train"], place, show_progress=False) as folder:
        pictures = open_split(folder, "train").read_many(range(18))
        results.put((str(folder), sum(isinstance(data, Sample) for data in pictures)))
        barrier.wait(60)


def test_four_processes_of_a_node_copy_once(server, place):
    barrier, results = FORK.Barrier(5), FORK.Queue()
    processes = [FORK.Process(target=use, args=(server.url, place, barrier, results)) for _ in range(4)]
    for process in processes:
        process.start()
    message = {results.get(timeout=60) for _ in processes}
    assert len(message) == 1 and {number for _, number in message} == {18}
    assert {name: server.gets[name] for name in FILES} == dict.fromkeys(FILES, 1)
    barrier.wait(60)
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    assert list(place.iterdir()) == []


def test_a_waiting_process_says_so(server, place, capsys):
    """The second process starts while the first waits for a shard whose server does not answer."""
    server.break_next("stall", "train-000002.tar", 1)
    entered = threading.Event()

    def first():
        with local_copy(quick(server.url, timeout_s=30), ["train"], place, show_progress=False):
            entered.wait(30)

    thread = threading.Thread(target=first)
    thread.start()
    wait_until(lambda: server.gets["train-000002.tar"] == 1)

    def release():
        wait_until(lambda: "waiting for another process" in output())
        server.released.set()  # the answer ends, and is asked for again

    heard = []

    def output():
        heard.append(capsys.readouterr().out)
        return "".join(heard)

    releasing = threading.Thread(target=release)
    releasing.start()
    with local_copy(quick(server.url), ["train"], place, show_progress=False):
        assert server.gets["train-000000.tar"] == 1
        entered.set()
    for waiting in (releasing, thread):
        waiting.join(30)
    assert f"waiting for another process of this node that copies {server.url} to {place}" in output()


def wait_until(condition):
    pause = threading.Event()
    for _ in range(3000):
        if condition():
            return
        pause.wait(0.01)
    raise AssertionError("it never came to be")


def copy_only(url, place):
    with local_copy(quick(url, timeout_s=60), ["train"], place, show_progress=False):
        pass


def kill_while_copying(server, place, monkeypatch):
    """Copy until the last shard does not answer, then send SIGKILL. Small batches let the other shards finish first."""
    monkeypatch.setattr("kfood_dist.data.shards.local_copy._BATCH_PIECES", 1)
    server.break_next("stall", "train-000002.tar", 1)
    process = FORK.Process(target=copy_only, args=(server.url, place))
    process.start()
    wait_until(lambda: server.gets["train-000002.tar"] == 1 and "train-000001.tar" in copied(place))
    os.kill(process.pid, signal.SIGKILL)
    process.join()


def test_the_next_job_uses_a_killed_jobs_copy(server, packed, place, monkeypatch):
    kill_while_copying(server, place, monkeypatch)
    [folder] = [path for path in home(place).iterdir() if path.is_dir()]
    (folder / "train-000002.tar.partial").write_bytes(b"half")
    (folder / "train-000000.tar").write_bytes(b"cut by a full disk")
    server.gets.clear()
    with local_copy(quick(server.url), ["train"], place) as again:
        assert again == folder
        assert open_split(again, "train").read_many(range(18)) == open_split(packed, "train").read_many(range(18))
        assert not list(folder.glob("*.partial"))
        assert server.gets == {"manifest.json": 2, "train-000000.tar": 1, "train-000002.tar": 1}
    assert list(place.iterdir()) == []


@pytest.fixture
def other(tmp_path):
    """Return another data set."""
    pack(write_folder(tmp_path / "source", {"한과/약과": 4}, first_seed=100), tmp_path / "other", OPTIONS)
    return tmp_path / "other"


def test_a_job_with_another_data_set_removes_a_killed_jobs_copy(server, packed, place, other, monkeypatch):
    kill_while_copying(server, place, monkeypatch)
    with local_copy(other, ["train"], place) as folder:
        assert list(home(place).iterdir()) == [folder]
        # What is in use stays.
        with local_copy(packed, ["test"], place):
            assert folder.exists()
            assert open_split(folder, "train").read(0)
    assert list(place.iterdir()) == []


def test_a_run_reads_each_of_its_data_sets_where_it_lies_or_from_a_copy(packed, place, other):
    data = {"shards": str(packed), "mix": [{"shards": str(other)}]}
    sections = {"model": {"base": "m"}, "run": {"dir": "r"}, "eval": {"every_steps": 1, "split": "test"}}
    recipe = Recipe.model_validate({"data": data, **sections})
    with local_copies(splits_read(recipe), None) as places:
        assert with_places(places, recipe) == recipe
    with local_copies(splits_read(recipe), place) as places:
        main, mixed = with_places(places, recipe).data.shards, with_places(places, recipe).data.mix[0].shards
        assert {Path(main).parent, Path(mixed).parent} == {home(place)}
        for copy, original, split in ((main, packed, "train"), (main, packed, "test"), (mixed, other, "train")):
            assert open_split(copy, split).read(0) == open_split(original, split).read(0)
    assert list(place.iterdir()) == []


def write_foreign(parent):
    """Write a folder and a lock of another program, named like a copy of ours, and a lock without a folder."""
    (parent / "experiment-3f2a9c1b7d4e").mkdir(parents=True)
    (parent / "experiment-3f2a9c1b7d4e" / "train-000000.tar").write_bytes(b"months of work")
    (parent / "experiment-3f2a9c1b7d4e.lock").touch()
    (parent / "paper-0123456789ab.lock").write_text("1234\n")


def everything(folder):
    return {path: path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def test_foreign_files_next_to_copies_are_kept(packed, place):
    write_foreign(place)
    write_foreign(home(place))
    before = everything(place)
    with local_copy(packed, ["train"], place):
        pass
    assert everything(place) == before


def test_a_foreign_file_in_a_copy_is_kept_and_reported(packed, place, capsys):
    with local_copy(packed, ["train"], place) as folder:
        (folder / "notes.txt").write_text("mine")
        (folder / "results.partial").touch()
        (folder / "results").mkdir()
        with local_copy(packed, ["test"], place):
            pass
    assert sorted(path.name for path in folder.iterdir()) == ["notes.txt", "results", "results.partial"]
    assert f"{folder} could not be removed (Directory not empty); remove it by hand" in capsys.readouterr().out


def test_a_copy_that_leads_elsewhere_is_not_followed(server, packed, place, other, tmp_path, monkeypatch):
    kill_while_copying(server, place, monkeypatch)
    [folder] = [path for path in home(place).iterdir() if path.is_dir()]
    folder.rename(tmp_path / "moved")
    folder.symlink_to(tmp_path / "moved")
    before = everything(tmp_path / "moved")
    with local_copy(other, ["train"], place):
        pass
    assert everything(tmp_path / "moved") == before


def copy_as(user, url, place, results):
    os.setgid(user)
    os.setuid(user)
    with local_copy(quick(url, timeout_s=20), ["train"], place, show_progress=False) as folder:
        results.put(
            (folder, sum(isinstance(data, Sample) for data in open_split(folder, "train").read_many(range(18))))
        )


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can act as two users")
def test_two_users_of_one_folder_have_separate_copies(server, packed):
    with tempfile.TemporaryDirectory() as shared:
        place = Path(shared)
        place.chmod(0o1777)
        with local_copy(packed, ["train"], place) as ours:
            results = FORK.Queue()
            process = FORK.Process(target=copy_as, args=(12345, server.url, place, results))
            process.start()
            assert results.get(timeout=60) == (place / "kfood-copy-12345" / theirs_name(server), 18)
            process.join(60)
            assert process.exitcode == 0
            assert len(open_split(ours, "train").read_many(range(18))) == 18
        assert list(place.iterdir()) == []


def theirs_name(server):
    digest = hashlib.sha256(load_manifest(server.url).storage.read("manifest.json")).hexdigest()
    return f"{server.url.rpartition('/')[2].replace(':', '_')}-{digest[:12]}"


def test_a_folder_that_another_user_made_in_our_name_is_refused(packed, place, tmp_path, monkeypatch):
    home(place).parent.mkdir(parents=True)
    home(place).symlink_to(tmp_path)
    with pytest.raises(LaunchError, match=r"kfood-copy-\d+ does not belong to this user → name another --copy-to DIR"):
        local_copy(packed, ["train"], place).__enter__()
    home(place).unlink()
    home(place).mkdir()
    theirs = os.stat_result((0o40777, *[0] * 3, os.geteuid() + 1, *[0] * 5))
    monkeypatch.setattr("pathlib.Path.lstat", lambda path: theirs)
    with pytest.raises(LaunchError, match=r"does not belong to this user"):
        local_copy(packed, ["train"], place).__enter__()
    assert list(home(place).iterdir()) == []


@pytest.mark.parametrize("kind", FAULTS)
def test_source_faults_are_retried_or_reported(server, packed, place, kind):
    server.break_next(kind, "train-000001.tar", 2)
    # On a busy machine, an answer without a fault may take 0.3 s.
    with local_copy(quick(server.url, timeout_s=2), ["train"], place) as folder:
        assert open_split(folder, "train").read_many(range(18)) == open_split(packed, "train").read_many(range(18))
    server.break_next(kind, "train-000001.tar", math.inf)
    with (
        pytest.raises(ShardError, match=r"train-000001.tar cannot be read, after 3 tries"),
        local_copy(quick(server.url), ["train"], place),
    ):
        raise AssertionError("half a data set was given out")
    assert list(place.iterdir()) == []


@pytest.mark.parametrize("damage", ["flip", "cut", "missing"])
def test_a_damaged_source_is_noticed(packed, place, tmp_path, damage):
    copy = shutil.copytree(packed, tmp_path / "copy")
    tar = copy / "train-000001.tar"
    data = bytearray(tar.read_bytes())
    data[5] ^= 1  # in a tar header, where no sample's checksum would notice
    message = {
        "flip": "does not have the SHA-256 of the manifest",
        "cut": "has 700 bytes, not the",
        "missing": "cannot be opened",
    }
    {"flip": lambda: tar.write_bytes(data), "cut": lambda: os.truncate(tar, 700), "missing": tar.unlink}[damage]()
    with (
        pytest.raises(ShardError, match=rf"{tar} {message[damage]}"),
        local_copy(copy, ["train"], place),
    ):
        raise AssertionError("half a data set was given out")
    assert list(place.iterdir()) == []


def test_too_little_room_is_reported_before_anything_is_copied(server, place, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr("kfood_dist.data.shards.local_copy.shutil.disk_usage", lambda folder: usage(10, 10, 1000))
    needed = sum(s.bytes + s.index_bytes for s in load_manifest(server.url).shards_of("train"))
    with (
        pytest.raises(LaunchError, match=rf"has 1,000 bytes free; .* needs {needed:,} more there → name another"),
        local_copy(quick(server.url), ["train"], place),
    ):
        raise AssertionError
    assert set(server.gets) == {"manifest.json"}
    assert list(place.iterdir()) == []


def test_a_place_that_cannot_be_written_is_told(packed, tmp_path):
    (tmp_path / "file").touch()
    with (
        pytest.raises(LaunchError, match=r"cannot copy to .*file/x \(Not a directory.*--copy-to DIR"),
        local_copy(packed, ["train"], tmp_path / "file" / "x"),
    ):
        raise AssertionError


def test_a_place_without_locks_is_told(packed, place, monkeypatch):
    def unsupported(*_):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    with (
        pytest.raises(
            LaunchError, match=rf"cannot copy to {place} \(Function not implemented: {place}/.*--copy-to DIR"
        ),
        local_copy(packed, ["train"], place),
    ):
        raise AssertionError


def test_a_child_that_lives_on_does_not_keep_the_copy(packed, place):
    """A forked process inherits the lock's descriptor. The copy must still be removed when its users have left."""
    with local_copy(packed, ["train"], place):
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(writing)
            os.read(reading, 1)
            os._exit(0)
    assert list(place.iterdir()) == []
    with local_copy(packed, ["train"], place):
        pass
    os.close(writing)
    os.waitpid(child, 0)


def test_an_exception_in_the_block_removes_the_copy(packed, place):
    with pytest.raises(ZeroDivisionError), local_copy(packed, ["train"], place):
        raise ZeroDivisionError
    assert list(place.iterdir()) == []


def come_and_go(sources, place, results):
    try:
        for number in range(40):
            with local_copy(sources[number % 3 == 0], ["train"], place, show_progress=False) as folder:
                assert all(isinstance(data, Sample) for data in open_split(folder, "train").read_many(range(3)))
        results.put(None)
    except BaseException as error:
        results.put(error)
        raise


def test_concurrent_users_never_see_an_incomplete_copy(packed, place, other, capfd):
    """Each process may leave last while another starts, and may remove old copies while another leaves."""
    results = FORK.Queue()
    processes = [FORK.Process(target=come_and_go, args=((packed, other), place, results)) for _ in range(4)]
    for process in processes:
        process.start()
    assert [results.get(timeout=120) for _ in processes] == [None] * 4
    for process in processes:
        process.join(60)
    assert list(place.iterdir()) == []
    assert "could not be removed" not in capfd.readouterr().out
