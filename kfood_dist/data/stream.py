"""Batches from loader processes, in the plan's order.

    micro-batches of the plan ──► DataLoader's workers: collator ──► Batch, Batch, …

Always holds: the order is the plan's whatever the number of workers; workers end with their parent, however that
ends, and leave nothing in shared memory; a user's mistake met in a worker is raised here as itself.
"""

import atexit
import multiprocessing
import os
import signal
from collections.abc import Generator, Iterator
from functools import cache
from typing import Any

from torch.utils.data import DataLoader, Dataset

from kfood_dist.data.collate import Batch, StreamingCollator
from kfood_dist.data.plan import MicroBatch
from kfood_dist.errors import KfoodError
from kfood_dist.runtime import end_with_parent, keep_freed_memory

# The signal at which a worker ends; nobody else uses it.
_GO = signal.SIGRTMIN
_PATIENCE_S = 5


def stream(
    collator: StreamingCollator,
    micro_batches: Iterator[MicroBatch],
    num_workers: int,
    pin_memory: bool = False,
    ahead: int = 2,
    start_method: str = "fork",
) -> Generator[Batch, None, None]:
    """The batches of `micro_batches`, in order, collated by `num_workers` processes (0: in this one).

    The processes end with the last batch, or when the generator is closed.

    At least `ahead` of them are under way at any time, so that a step that takes several at once need not wait.
    `start_method` is multiprocessing's: `fork` starts at once; `spawn` takes seconds, and shares no memory with a
    process whose network driver does not survive a fork. (Workers of a `forkserver` would outlive a killed parent.)
    """
    if num_workers:
        _end_what_is_left_at_exit()
    else:
        keep_freed_memory()
    loader: DataLoader[Batch | KfoodError] = DataLoader(
        _FaultsAsValues(collator),
        batch_size=None,
        sampler=micro_batches,
        num_workers=num_workers,
        collate_fn=_as_it_is,
        pin_memory=pin_memory,
        prefetch_factor=max(2, -(-ahead // num_workers)) if num_workers else None,
        multiprocessing_context=start_method if num_workers else None,
        worker_init_fn=_start_worker,
    )
    for batch in loader:
        if isinstance(batch, KfoodError):
            raise batch
        yield batch


class _FaultsAsValues(Dataset["Batch | KfoodError"]):
    """Hands a user's mistake over as a value: raised in a loader process, it would arrive as a RuntimeError."""

    def __init__(self, collator: StreamingCollator):
        self.collator = collator

    def __getitem__(self, micro_batch: MicroBatch) -> Batch | KfoodError:
        try:
            return self.collator[micro_batch]
        except KfoodError as error:
            return error


def _as_it_is(batch: Any) -> Any:
    return batch


def _start_worker(worker: int) -> None:
    """Signals reach a whole terminal or job, and the parent alone decides; where it is killed, its workers go at once.

    Only a second SIGTERM is obeyed, the first may be such a signal.

    They go between two steps of Python's, not by SIGKILL: torch creates a piece of shared memory and takes its name
    away in one call, and a worker killed within it would leave the piece behind (14 of 233 killed readers did).
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.signal(signal.SIGTERM, signal.SIG_DFL))
    parent = multiprocessing.parent_process()
    assert parent is not None and parent.pid is not None
    signal.signal(_GO, lambda *_: os._exit(0))
    end_with_parent(parent.pid, by=_GO)
    keep_freed_memory()


@cache
def _end_what_is_left_at_exit() -> None:
    """At its end, let this process end the workers that still run: to one SIGTERM, with which multiprocessing would
    ask them to end before it waits for them for ever, they are deaf.
    """

    def end() -> None:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler takes an ended worker for a fault
        children = multiprocessing.active_children()
        for child in children:
            if child.pid is not None:
                os.kill(child.pid, _GO)
        for child in children:
            child.join(_PATIENCE_S)
            child.kill()

    atexit.register(end)
