"""Loader processes keep the plan's order, raise errors unchanged, end with their parent and leave nothing behind."""

import gc
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from asking import asking_dishes
from running import ROOT, environment

from kfood_dist.data.batch.collate import Batch, StreamingCollator
from kfood_dist.data.batch.loader import stream
from kfood_dist.data.plan.plan import MicroBatch
from kfood_dist.errors import LaunchError, ShardError


@pytest.fixture(scope="module")
def collator(tiny_model: Path, tiny_shards: Path) -> StreamingCollator:
    return build(tiny_model, tiny_shards)


def build(model: Path, shards: Path) -> StreamingCollator:
    return asking_dishes(model, shards)


def micro_batches(num_samples: int, epochs: int = 1) -> list[MicroBatch]:
    per_epoch = [tuple(range(i, min(i + 3, num_samples))) for i in range(0, num_samples, 3)]
    return [MicroBatch(0, n, ids, 0) for _ in range(epochs) for n, ids in enumerate(per_epoch)]


@pytest.mark.parametrize(("num_workers", "method"), [(0, "fork"), (2, "fork"), (3, "fork"), (2, "spawn")])
def test_the_order_is_the_plans_with_any_number_of_workers(
    collator: StreamingCollator, num_workers: int, method: str
) -> None:
    asked = micro_batches(len(collator.shards), epochs=2)
    batches: list[Batch] = list(stream(collator, iter(asked), num_workers, start_method=method))
    assert [b.ids for b in batches] == [m.ids for m in asked]
    assert (batches[0].pixels == collator[asked[0]].pixels).all()


@pytest.mark.parametrize("num_workers", [0, 1])
def test_an_error_in_a_worker_is_raised_with_its_own_type(
    tmp_path: Path, tiny_model: Path, tiny_shards: Path, num_workers: int
) -> None:
    import shutil

    shards = shutil.copytree(tiny_shards, tmp_path / "shards")
    collator = build(tiny_model, shards)
    (shards / "train-000000.tar").write_bytes(b"")
    with pytest.raises(ShardError, match=r"train-000000.tar .* → "):
        list(stream(collator, iter(micro_batches(6)), num_workers))


READER = """
import sys, time
from collections.abc import Callable
from pathlib import Path
sys.path.insert(0, "tests/unit")
from test_stream import build, micro_batches
from kfood_dist.data.batch.loader import stream

if __name__ == "__main__":
    collator = build(Path(sys.argv[1]), Path(sys.argv[2]))
    for n, batch in enumerate(stream(collator, iter(micro_batches(24, epochs=1000)), 2, start_method=sys.argv[3])):
        if n == 2:
            print("reading", flush=True)
            time.sleep(600)
"""


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_workers_end_with_a_killed_parent_and_leave_no_shared_memory(
    tmp_path: Path, tiny_model: Path, tiny_shards: Path, method: str
) -> None:
    script = tmp_path / "reader.py"
    script.write_text(READER)
    before = shared_memory()
    process = subprocess.Popen(
        [sys.executable, str(script), str(tiny_model), str(tiny_shards), method],
        stdout=subprocess.PIPE,
        env={**environment(), "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"},
        cwd=ROOT,
        start_new_session=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"reading\n"
    children = psutil.Process(process.pid).children(recursive=True)
    assert len(children) >= 2
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    _, alive = psutil.wait_procs(children, timeout=30)
    assert not alive
    assert wait_until(lambda: shared_memory() <= before)


KILLED_AGAIN_AND_AGAIN = """
import itertools, os, random, signal, time, torch
from kfood_dist.data.batch.loader import stream

class Collator:
    def __getitem__(self, micro_batch):
        return torch.empty(8 << 20, dtype=torch.uint8)

for _ in range(30):
    here, there = os.pipe()
    parent = os.fork()
    if not parent:
        for n, _ in enumerate(stream(Collator(), itertools.count(), 2)):
            if n == 2:
                os.write(there, b"!")
    os.read(here, 1)
    time.sleep(random.random() * 0.05)
    os.kill(parent, signal.SIGKILL)
    os.waitpid(parent, 0)
"""


def test_workers_leave_no_shared_memory_if_their_parent_is_killed_at_any_moment() -> None:
    """Workers killed like their parent left shared memory in one of four rounds, before torch unlinked it."""
    before = shared_memory()
    subprocess.run([sys.executable, "-c", KILLED_AGAIN_AND_AGAIN], check=True, cwd=ROOT, timeout=120)
    assert wait_until(lambda: shared_memory() <= before)


STARTING = """
import itertools, sys
from kfood_dist.data.batch.loader import stream

class Collator:
    def __getitem__(self, micro_batch):
        return micro_batch

if __name__ == "__main__":
    for _ in stream(Collator(), itertools.count(), 2, start_method=sys.argv[1]):
        pass
"""


@pytest.mark.parametrize(("method", "rounds"), [("fork", 4), ("spawn", 1)])
def test_workers_end_with_a_parent_that_is_killed_while_they_start(tmp_path: Path, method: str, rounds: int) -> None:
    script = tmp_path / "starting.py"
    script.write_text(STARTING)
    for _ in range(rounds):
        process = subprocess.Popen(
            [sys.executable, str(script), method], env={**environment(), "PYTHONPATH": str(ROOT)}, cwd=ROOT
        )
        parent = psutil.Process(process.pid)
        assert wait_until(lambda parent=parent: len(parent.children()) > 0, timeout_s=60, pause_s=0)
        children = parent.children()
        process.kill()
        process.wait()
        _, alive = psutil.wait_procs(children, timeout=40)
        assert not alive


def test_memory_stays_flat_over_fifty_epochs(collator: StreamingCollator) -> None:
    """Count parent and workers together. The first epochs do not count, because they fill caches and pools."""
    num_samples = len(collator.shards)
    per_epoch = len(micro_batches(num_samples))
    family: list[psutil.Process] = []
    after: dict[int, int] = {}
    for n, _ in enumerate(stream(collator, iter(micro_batches(num_samples, epochs=50)), 2)):
        epoch, place = divmod(n, per_epoch)
        if place == per_epoch - 1 and epoch in (9, 29, 49):
            family = family or [psutil.Process(), *psutil.Process().children()]
            gc.collect()
            after[epoch] = sum(own_memory(process) for process in family if process.is_running())
    assert len(family) >= 3
    # The batches of one epoch take 14 MB in uint8. Keeping even one of four would exceed the limit many times.
    assert after[49] - after[9] < 12 * 2**20, after


def own_memory(process: psutil.Process) -> int:
    return process.memory_full_info().uss


def shared_memory() -> set[str]:
    return {name for name in os.listdir("/dev/shm") if name.startswith(("torch_", "sem.mp-", "psm_"))}


def wait_until(true: Callable[[], bool], timeout_s: float = 20, pause_s: float = 0.1) -> bool:
    deadline = time.monotonic() + timeout_s
    while not true():
        if time.monotonic() > deadline:
            return False
        time.sleep(pause_s)
    return True


def test_a_process_with_an_open_stream_ends_though_its_workers_ignore_the_first_sigterm() -> None:
    """Nothing closes the stream if, for example, something keeps an exception that holds the frame of the loop."""
    code = f"""
import itertools, sys
sys.path[:0] = [{str(Path(__file__).parent)!r}]
from kfood_dist.data.batch.loader import stream

class Collator:
    def __getitem__(self, micro_batch):
        return micro_batch

kept = stream(Collator(), itertools.count(), 2)
print(next(kept))
sys.modules["kept"] = kept  # alive until the process ends
"""
    before = shared_memory()
    for _ in range(5):
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
        assert (done.returncode, done.stdout, done.stderr) == (0, "0\n", "")
    assert shared_memory() <= before


HANDS_OVER = """
import itertools, resource, sys
sys.path[:0] = ["tests/unit"]
from pathlib import Path
import numpy
from kfood_dist.errors import KfoodError
from kfood_dist.data.batch.loader import stream

class Collator:
    def __getitem__(self, micro_batch):
        return numpy.full(8 << 20, micro_batch, dtype=numpy.uint8)

if __name__ == "__main__":
    limit, method = int(sys.argv[1]), sys.argv[2]
    kept = [open("/dev/null") for _ in range(limit - 5)] if limit else []
    if limit:
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
    try:
        batches = stream(Collator(), iter(range(20)), 2, start_method=method)
        print([(len(batch), int(batch[-1])) for batch in batches] == [(8 << 20, n) for n in range(20)])
    except KfoodError as error:
        print(error)
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may mount a small /dev/shm")
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_batches_need_no_shared_memory_and_no_path_for_a_socket(tmp_path: Path, method: str) -> None:
    """Batches of 8 MiB pass with a /dev/shm of one page and a TMPDIR whose path is too long for a socket."""
    script, temporary = tmp_path / "script.py", tmp_path / ("x" * 100)
    script.write_text(HANDS_OVER)
    temporary.mkdir()
    small = 'mount -t tmpfs -o size=4k shm /dev/shm && exec "$0" "$@"'
    done = subprocess.run(
        ["unshare", "-m", "bash", "-c", small, sys.executable, str(script), "0", method],
        capture_output=True, text=True, timeout=120, cwd=ROOT,
        env={**environment(), "PYTHONPATH": str(ROOT), "TMPDIR": str(temporary)},
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (0, "True\n", "")


def test_a_process_without_descriptors_left_says_so_at_once(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(HANDS_OVER)
    done = subprocess.run(
        [sys.executable, str(script), "40", "fork"], capture_output=True, text=True, timeout=60, cwd=ROOT,
        env={**environment(), "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    message = "a loader process cannot be started (Too many open files) → raise the limit of open files (`ulimit -n`), "
    message += "or set data.num_workers=0 (kfood eval: --workers 0)\n"
    assert (done.stdout, done.returncode) == (message, 0), done.stderr


class Ends:
    """A replacement for a collator. Its third batch ends the process that makes it, or raises."""

    def __init__(self, how: Callable[[], Batch]):
        self.how = how

    def __getitem__(self, micro_batch: int) -> Batch:
        return torch.zeros(1 << 20) if micro_batch < 2 else self.how()  # type: ignore[return-value]


def killed_while_it_sends() -> Batch:
    pid = os.getpid()
    threading.Timer(0.2, lambda: os.kill(pid, signal.SIGKILL)).start()
    return np.zeros(1 << 31, np.uint8)  # type: ignore[return-value]


def cannot_be_sent() -> Batch:
    return threading.Lock()  # type: ignore[return-value]


def no_memory() -> Batch:
    raise MemoryError


def fault_of_ours() -> Batch:
    raise ZeroDivisionError("our own")


@pytest.mark.parametrize("num_workers", [1, 2])
@pytest.mark.parametrize(
    ("how", "message"),
    [
        (lambda: os.kill(os.getpid(), signal.SIGKILL), "ended, killed by SIGKILL → most likely memory ran out"),
        (killed_while_it_sends, "ended, killed by SIGKILL → most likely memory ran out"),
        (lambda: os._exit(3), "ended, with exit status 3 → most likely a library failed on a picture"),
        (lambda: os.kill(os.getpid(), signal.SIGSEGV), "ended, killed by SIGSEGV → most likely a library failed"),
        (no_memory, "has no memory left → give the job more"),
        (cannot_be_sent, "TypeError: cannot pickle '_thread.lock' object"),
        (fault_of_ours, "ZeroDivisionError: our own"),
    ],
)
def test_a_worker_that_cannot_answer_ends_the_stream_at_once_with_the_cause(
    how: Callable[[], Batch], message: str, num_workers: int
) -> None:
    batches = stream(Ends(how), iter(range(9)), num_workers)  # type: ignore[arg-type]
    assert len([next(batches), next(batches)]) == 2
    with pytest.raises(RuntimeError if how in (cannot_be_sent, fault_of_ours) else LaunchError, match=message):
        next(batches)
    assert not multiprocessing.active_children()


def test_a_process_without_threads_left_says_so_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    message = r"a loader process cannot be started \(no thread can be started\) → raise the limit of processes"
    with pytest.raises(LaunchError, match=message):
        next(stream(Ends(no_memory), iter(range(9)), 2))  # type: ignore[arg-type]
    assert not multiprocessing.active_children()
