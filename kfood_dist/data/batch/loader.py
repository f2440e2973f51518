"""Batches from loader processes, in the plan's order.

    micro-batches of the plan ──► loader processes in turn: collator ──► a socket each ──► a thread each ──► Batch, …

Always holds: the order is the plan's, for any number of workers. A batch is sent as bytes: it needs no shared memory,
no named socket and no file descriptor. The parent notices at once if a worker ends. Workers end when their parent
ends, for any reason. A user's mistake that a worker finds is raised in the parent as the same error.
"""

import atexit
import errno
import multiprocessing
import pickle
import signal
import socket
import struct
import threading
import traceback
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from contextlib import suppress
from functools import cache
from itertools import cycle
from queue import SimpleQueue
from typing import Any, Protocol, Self, TypeVar

import torch
from torch.utils.data import Dataset

from kfood_dist.data.plan.plan import MicroBatch
from kfood_dist.errors import KfoodError, LaunchError
from kfood_dist.system.processes import describe_exit, end_with_parent, keep_freed_memory

_PATIENCE_S = 5
_REMEDIES = {
    errno.EMFILE: "raise the limit of open files (`ulimit -n`)",
    errno.EAGAIN: "raise the limit of processes (`ulimit -u`)",
    errno.ENOMEM: "give the job more memory",
}


class Pinnable(Protocol):
    """What a collator makes: a Batch, or a StepPart with several."""

    def pin_memory(self) -> Self: ...


Made = TypeVar("Made", bound=Pinnable)


def stream(
    collator: Dataset[Made],
    micro_batches: Iterator[MicroBatch],
    num_workers: int,
    pin_memory: bool = False,
    ahead: int = 2,
    start_method: str = "fork",
) -> Generator[Made, None, None]:
    """Yield what `collator` makes of each of `micro_batches`, in order, in `num_workers` processes (0: in this one).

    The processes end with the last batch, or when the generator is closed.

    At least `ahead` batches are in progress at any time, so that a step that takes several at once need not wait.
    `start_method` is multiprocessing's. `fork` starts at once. `spawn` takes seconds, but shares no memory with this
    process, whose network driver may not survive a fork. (Workers of a `forkserver` would outlive a killed parent.)

    Raises the KfoodError of a worker. Raises LaunchError if a worker cannot be started, or if it ends.
    """
    if not num_workers:
        keep_freed_memory()
        for micro_batch in micro_batches:
            batch = collator[micro_batch]
            yield batch.pin_memory() if pin_memory else batch
        return
    _end_workers_at_exit()
    workers: list[_Worker] = []
    try:
        for _ in range(num_workers):
            workers.append(_Worker(collator, start_method, pin_memory))
        yield from _in_turn(workers, micro_batches, num_workers * max(2, -(-ahead // num_workers)))
    finally:
        for worker in workers:
            worker.end()


def _in_turn(workers: "list[_Worker]", micro_batches: Iterator[MicroBatch], ahead: int) -> Iterator[Any]:
    busy: deque[_Worker] = deque()
    for worker, micro_batch in zip(cycle(workers), micro_batches, strict=False):
        worker.ask(micro_batch)
        busy.append(worker)
        if len(busy) == ahead:
            yield busy.popleft().answer()
    while busy:
        yield busy.popleft().answer()


class _Worker:
    """One loader process, as its parent sees it. It answers requests in the order in which they were made."""

    def __init__(self, collator: Dataset[Any], start_method: str, pin_memory: bool):
        self._device = torch.cuda.current_device() if pin_memory else None
        self._answers: SimpleQueue[Any] = SimpleQueue()  # None: no more will come
        # Takes each batch as soon as it arrives, so that the worker can start its next one.
        self._receiver = threading.Thread(target=self._receive, name="batches", daemon=True)
        try:
            self._socket, theirs = socket.socketpair()
            with theirs:  # so that only the worker holds it, and the connection ends with the worker
                context: Any = multiprocessing.get_context(start_method)
                self._process = context.Process(target=_work, args=(collator, theirs), name="loader", daemon=True)
                self._process.start()
            self._start_receiver()
        except OSError as error:
            what = f"a loader process cannot be started ({error.strerror or error})"
            remedy = _REMEDIES.get(error.errno or 0, "see `kfood doctor`")
            raise LaunchError(what, f"{remedy}, or set data.num_workers=0 (kfood eval: --workers 0)") from None

    def _start_receiver(self) -> None:
        try:
            self._receiver.start()
        except RuntimeError:  # its text does not name the cause
            self._process.kill()
            self._process.join(_PATIENCE_S)
            raise OSError(errno.EAGAIN, "no thread can be started") from None

    def ask(self, micro_batch: MicroBatch) -> None:
        with suppress(ConnectionError):  # the worker ended: `answer` raises that
            self._socket.sendall(b"".join(as_bytes(micro_batch)))

    def answer(self) -> Any:
        """Return the batch of the oldest open request. Raises the worker's error, or LaunchError if it ended."""
        found = self._answers.get()
        if found is None:
            raise self._fault()
        if isinstance(found, Exception):
            raise found
        return found

    def end(self) -> None:
        self._process.kill()
        self._process.join(_PATIENCE_S)
        self._receiver.join(_PATIENCE_S)
        self._socket.close()

    def _receive(self) -> None:
        try:
            if self._device is not None:
                torch.cuda.set_device(self._device)
            while True:
                found = receive(self._socket)
                self._answers.put(found if self._device is None or isinstance(found, Exception) else found.pin_memory())
        except (EOFError, ConnectionError):
            self._answers.put(None)
        except Exception as error:
            self._answers.put(error)

    def _fault(self) -> LaunchError:
        self._process.join(_PATIENCE_S)
        status = self._process.exitcode
        remedy = "most likely memory ran out: give the job more memory, or lower data.num_workers"
        if status not in (None, -signal.SIGKILL):
            remedy = "most likely a library failed on a picture: read what it printed, and run `kfood verify`"
        return LaunchError(
            f"a loader process ended{'' if status is None else f', {describe_exit(status)}'}",
            f"{remedy}; the same command resumes",
        )


def as_bytes(value: Any) -> Sequence[bytes | memoryview]:
    """Return the parts to send for a value, in order. Its arrays are sent as they are in memory (pickle 5, PEP 574)."""
    buffers: list[pickle.PickleBuffer] = []
    head = pickle.dumps(value, protocol=5, buffer_callback=buffers.append)
    parts = [memoryview(head), *(buffer.raw() for buffer in buffers)]
    return [struct.pack(f"<{1 + len(parts)}Q", len(parts), *map(len, parts)), *parts]


def receive(connection: socket.socket) -> Any:
    """Return the next value that was sent. Raises EOFError if the connection ends, also in the middle of a value."""
    (num_parts,) = struct.unpack("<Q", _read(connection, 8))
    sizes = struct.unpack(f"<{num_parts}Q", _read(connection, 8 * num_parts))
    head, *buffers = [_read(connection, size) for size in sizes]
    return pickle.loads(head, buffers=buffers)


def _read(connection: socket.socket, size: int) -> bytearray:
    data = bytearray(size)
    left = memoryview(data)
    while left:
        num_bytes = connection.recv_into(left)
        if not num_bytes:
            raise EOFError
        left = left[num_bytes:]
    return data


def _work(collator: Dataset[Any], connection: socket.socket) -> None:
    """Answer each micro-batch with a batch, in a separate process, until the parent ends it."""
    _start_worker()
    with suppress(EOFError, ConnectionError):
        while True:
            for part in _answer(collator, receive(connection)):
                connection.sendall(part)


def _answer(collator: Dataset[Any], micro_batch: MicroBatch) -> Sequence[bytes | memoryview]:
    """Return the parts to send for a batch, or for the error that it raised."""
    try:
        return as_bytes(collator[micro_batch])
    except KfoodError as error:
        return as_bytes(error)
    except MemoryError:
        what, remedy = "a loader process has no memory left", "give the job more memory, or lower data.num_workers"
        return as_bytes(LaunchError(what, f"{remedy}; the same command resumes"))
    except Exception:
        return as_bytes(RuntimeError(f"in a loader process:\n{traceback.format_exc()}"))


def _start_worker() -> None:
    """Set up a loader process: how it takes signals, and how it uses memory and threads.

    Signals reach every process of a terminal or job, but only the parent decides, so a worker ignores them. It obeys
    a second SIGTERM, because only the first may be such a signal. If the parent is killed, its workers end at once.
    """
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.signal(signal.SIGTERM, signal.SIG_DFL))
    parent = multiprocessing.parent_process()
    assert parent is not None and parent.pid is not None
    end_with_parent(parent.pid)
    keep_freed_memory()
    torch.set_num_threads(1)


@cache
def _end_workers_at_exit() -> None:
    """Make this process kill the workers that still run when it exits.

    Otherwise multiprocessing would send them one SIGTERM, which they ignore, and then wait for them forever.
    """

    def end() -> None:
        for child in multiprocessing.active_children():
            child.kill()
            child.join(_PATIENCE_S)

    atexit.register(end)
