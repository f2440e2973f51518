"""Many source pictures to packed JPEGs, in parallel, through one spool file.

    records ──► batches ──► worker processes: read, hash, prepare_jpeg ──► spool (JPEGs end to end)
                                                                      └──► refusals, with their reason

A bounded window of batches is in flight and results are taken in the order of the records: memory does not
grow with the source, and neither the spool nor the lists depend on the number of workers.
"""

import hashlib
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Generator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing
from dataclasses import dataclass
from typing import BinaryIO

from tqdm import tqdm

from kfood_dist.data.images import ImageRejected, prepare_jpeg
from kfood_dist.data.packing.sources import Record, read_picture
from kfood_dist.errors import SourceError

# About a third of a second of work: few enough round trips, little to wait for when interrupted.
_BATCH_PICTURES = 16
_BATCHES_IN_FLIGHT_PER_WORKER = 3


@dataclass(frozen=True)
class PictureSettings:
    """What a packed picture looks like; see `prepare_jpeg`."""

    image_size: int
    resize: str
    quality: int
    min_side: int


@dataclass(frozen=True)
class Prepared:
    """A picture in the spool: its record, where its JPEG lies there, and the SHA-256 of its source file."""

    record: Record
    offset: int
    num_bytes: int
    sha256: str


@dataclass(frozen=True, order=True)
class Refusal:
    """One input left out: `reason` is a word to count by, `detail` says it to a person."""

    source: str
    label: str
    reason: str
    detail: str


def available_cores() -> int:
    """The cores this process may use, which in a Slurm job or a container are fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def prepare_all(
    records: Sequence[Record], spool: BinaryIO, settings: PictureSettings, workers: int
) -> tuple[list[Prepared], list[Refusal]]:
    """Prepare every record without a problem, in order; returns those now in `spool` and those refused.

    Raises SourceError when a worker process dies, OSError when the spool's disk is full.
    """
    prepared, refused = [], []
    progress = tqdm(total=len(records), desc="prepare", unit="picture", disable=None)
    # Closed by name: an error here must stop the workers before the spool's folder is cleared away.
    with progress, closing(_outcomes(records, settings, workers)) as outcomes:
        for record, outcome in zip(records, outcomes, strict=True):
            if isinstance(outcome, ImageRejected):
                refused.append(Refusal(record.source, record.label, outcome.reason, outcome.detail))
            else:
                jpeg, sha256 = outcome
                prepared.append(Prepared(record, spool.tell(), spool.write(jpeg), sha256))
            progress.update()
    return prepared, refused


_Outcome = tuple[bytes, str] | ImageRejected


def _outcomes(records: Sequence[Record], settings: PictureSettings, workers: int) -> Generator[_Outcome, None, None]:
    if workers == 1:
        yield from (_prepare_one(record, settings) for record in records)
        return
    in_flight: deque[Future[list[_Outcome]]] = deque()
    # Spawned, not forked: the caller may have threads, and a forked worker would inherit its locks mid-way.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker) as pool:
        try:
            for start in range(0, len(records), _BATCH_PICTURES):
                batch = records[start : start + _BATCH_PICTURES]
                in_flight.append(pool.submit(_prepare_batch, batch, settings))
                if len(in_flight) > workers * _BATCHES_IN_FLIGHT_PER_WORKER:
                    yield from in_flight.popleft().result()
            while in_flight:
                yield from in_flight.popleft().result()
        except BrokenProcessPool:
            raise SourceError(
                "a worker process died, most likely for want of memory", "pack with fewer --workers"
            ) from None
        finally:
            for future in in_flight:
                future.cancel()


def _prepare_batch(records: Sequence[Record], settings: PictureSettings) -> list[_Outcome]:
    return [_prepare_one(record, settings) for record in records]


def _prepare_one(record: Record, settings: PictureSettings) -> _Outcome:
    try:
        data = read_picture(record)
        jpeg = prepare_jpeg(data, settings.image_size, settings.resize, settings.quality, settings.min_side)
    except ImageRejected as rejected:
        return rejected
    return jpeg, hashlib.sha256(data).hexdigest()


def _start_worker() -> None:
    # Ctrl-C reaches the whole terminal; the parent alone decides, and its workers end with it, killed or not.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
