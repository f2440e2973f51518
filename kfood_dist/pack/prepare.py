"""Prepares source pictures for packing, in one process or in many.

each picture of a record ──► read, hash ──► prepare_cropped ──► perceptual hash ──► PreparedPicture, or Refusal
chunks ──► worker processes, each writes its chunk ──► chunks in the order in which they finish
"""

import hashlib
import io
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np

from kfood_dist.data.picture.images import ImageRejected, prepare_cropped
from kfood_dist.errors import SourceError
from kfood_dist.pack.sources import Record, read_picture
from kfood_dist.system.packages import version
from kfood_dist.system.processes import keep_freed_memory

T = TypeVar("T")

# The version of the code that makes a packed picture. Raise it with every change, here or in images.py, decoding.py,
# metadata.py and resample.py, that gives a picture other bytes, another hash or another refusal. Pictures that the
# older code prepared and left beside OUT are then prepared again.
ALGORITHM = 3

# Another version of one of these libraries can give the same pictures other bytes or other hashes. _DECODERS are the
# decoders of Pillow. pillow-heif is an optional extra: without it, HEIC pictures are refused.
_LIBRARIES = ("pillow", "simplejpeg", "numpy", "ImageHash", "scipy", "pillow-heif")
_DECODERS = ("libjpeg_turbo", "webp", "libtiff", "avif", "jpg_2000")


def made_by() -> dict[str, str | int | None]:
    """Return the versions that determine a packed picture besides its source and settings: algorithm and libraries."""
    from PIL import features

    libraries = {name: version(name) for name in _LIBRARIES}
    decoders = {name: features.version(name) for name in _DECODERS}
    return {"algorithm": ALGORITHM, **libraries, **decoders}


@dataclass(frozen=True)
class PictureSettings:
    """The settings of a packed picture. See `prepare_jpeg`."""

    image_size: int
    resize: str
    quality: int
    min_side: int
    crop_boxes: bool


@dataclass(frozen=True)
class PreparedPicture:
    """A picture as it will be packed. `cropped` is None if it had no crop box, False if the box was unusable."""

    jpeg: bytes
    sha256: str
    perceptual_hash: int
    cropped: bool | None


@dataclass(frozen=True)
class Place:
    """The position of a prepared picture's JPEG in its chunk, and the picture's hashes.

    `offset` and `num_bytes` are in bytes. `sha256` is the hash of the source file, in hex. `perceptual_hash` has 64
    bits. `cropped` is as in PreparedPicture.
    """

    offset: int
    num_bytes: int
    sha256: str
    perceptual_hash: int
    cropped: bool | None = None


@dataclass(frozen=True)
class Prepared:
    """A sample whose pictures are prepared: its record, the file of the chunk, and each picture's place in it."""

    record: Record
    file: str
    places: tuple[Place, ...]

    @property
    def num_bytes(self) -> int:
        return sum(place.num_bytes for place in self.places)


@dataclass(frozen=True, order=True)
class Refusal:
    """One refused input. `reason` is one word, used for counting. `detail` explains it to a person."""

    source: str
    label: str
    reason: str
    detail: str


def prepare_one(record: Record, settings: PictureSettings) -> list[PreparedPicture] | Refusal:
    """Read a sample's pictures and prepare them. If one picture cannot be used, the sample is refused.

    Raises SourceError if the source is gone or its disk fails.
    """
    made = []
    for picture in record.pictures:
        prepared = _prepare_picture(picture, settings)
        if isinstance(prepared, Refusal):
            return replace(prepared, source=record.source, label=record.label, detail=_which(record, picture, prepared))
        made.append(prepared)
    return made


def _which(record: Record, picture: Record, refusal: Refusal) -> str:
    return refusal.detail if picture is record else f"{picture.source}: {refusal.detail}"


def _prepare_picture(record: Record, settings: PictureSettings) -> PreparedPicture | Refusal:
    try:
        data = read_picture(record)
        jpeg, cropped = prepare_cropped(
            data,
            settings.image_size,
            settings.resize,
            settings.quality,
            settings.min_side,
            record.box if settings.crop_boxes else None,
        )
    except ImageRejected as rejected:
        return Refusal(record.source, record.label, rejected.reason, rejected.detail)
    return PreparedPicture(jpeg, hashlib.sha256(data).hexdigest(), perceptual_hash(jpeg), cropped)


def perceptual_hash(jpeg: bytes) -> int:
    """Return the 64 bits of `imagehash.phash` of a packed picture. Near-duplicates differ in only a few bits."""
    import imagehash
    from PIL import Image

    with Image.open(io.BytesIO(jpeg)) as image:
        image.draft("L", (64, 64))  # the hash is computed from 32×32 grey values
        bits = imagehash.phash(image).hash
    return int(np.packbits(bits.flatten()).view(">u8")[0])


def in_processes(do: Callable[[T], None], items: Sequence[T], workers: int) -> Iterator[T]:
    """Call `do` with each item in `workers` processes, or in this process if `workers` is 1. Yields each finished item.

    Raises what `do` raises. Raises SourceError if memory runs out or a worker process dies.
    """
    try:
        if workers == 1:
            for item in items:
                do(item)
                yield item
        else:
            yield from _in_pool(do, items, workers)
    except MemoryError:
        raise SourceError(
            "the pictures need more memory than is available", "give the job more memory, or pack with fewer --workers"
        ) from None
    except BrokenProcessPool:
        raise SourceError(
            "a worker process died, most likely because memory ran out", "pack with fewer --workers"
        ) from None


def _in_pool(do: Callable[[T], None], items: Sequence[T], workers: int) -> Iterator[T]:
    # Spawned, not forked: the caller may have threads, and a forked worker would inherit the locks that they hold.
    context = multiprocessing.get_context("spawn")
    with _starting():  # needs semaphores, which are in /dev/shm
        pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker)
    with pool:
        with _starting():
            futures = {pool.submit(do, item): item for item in items}
        try:
            for future in as_completed(futures):
                future.result()
                yield futures.pop(future)
        finally:
            for future in futures:
                future.cancel()


@contextmanager
def _starting() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        what = f"worker processes cannot be started ({error.strerror or error})"
        raise SourceError(what, "see `kfood doctor`, or pack with --workers 1") from None


def _start_worker() -> None:
    # Ctrl-C reaches every process of the terminal. Only the parent decides what to do. Its workers end when it ends,
    # also when it is killed.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    keep_freed_memory()
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
