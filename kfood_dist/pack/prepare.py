"""One source picture to what is packed of it, in one process or in many.

each picture of a record ──► read, hash ──► prepare_cropped ──► perceptual hash ──► PreparedPicture, or Refusal
chunks ──► worker processes, each writes its chunk ──► as they are done
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

# Which way of making a packed picture this is. Raise it with every change, here or in images.py, decoding.py,
# metadata.py and resample.py, after which a picture comes out with other bytes, another hash or another refusal: what
# the older way prepared and left beside OUT is then made anew.
ALGORITHM = 3

# The same pictures come out with other bytes, or other hashes, under another version of one of these. Those of the
# second line are Pillow's decoders; pillow-heif is an extra, without which pictures are refused.
_LIBRARIES = ("pillow", "simplejpeg", "numpy", "ImageHash", "scipy", "pillow-heif")
_DECODERS = ("libjpeg_turbo", "webp", "libtiff", "avif", "jpg_2000")


def made_by() -> dict[str, str | int | None]:
    """What decides about a packed picture besides its source and the settings: the algorithm and the libraries."""
    from PIL import features

    libraries = {name: version(name) for name in _LIBRARIES}
    decoders = {name: features.version(name) for name in _DECODERS}
    return {"algorithm": ALGORITHM, **libraries, **decoders}


@dataclass(frozen=True)
class PictureSettings:
    """What a packed picture looks like; see `prepare_jpeg`."""

    image_size: int
    resize: str
    quality: int
    min_side: int
    crop_boxes: bool


@dataclass(frozen=True)
class PreparedPicture:
    """A picture as it will be packed. `cropped` is None where it had no crop box, False where that was unusable."""

    jpeg: bytes
    sha256: str
    perceptual_hash: int
    cropped: bool | None


@dataclass(frozen=True)
class Place:
    """Where a prepared picture's JPEG lies in its chunk, offset and size in bytes, and what it is known by.

    `sha256` is of its source file, in hex; `perceptual_hash` has 64 bits; `cropped` as in PreparedPicture.
    """

    offset: int
    num_bytes: int
    sha256: str
    perceptual_hash: int
    cropped: bool | None = None


@dataclass(frozen=True)
class Prepared:
    """A sample whose pictures are prepared: its record, the chunk's file, and each picture's place there."""

    record: Record
    file: str
    places: tuple[Place, ...]

    @property
    def num_bytes(self) -> int:
        return sum(place.num_bytes for place in self.places)


@dataclass(frozen=True, order=True)
class Refusal:
    """One input left out: `reason` is a word to count by, `detail` says it to a person."""

    source: str
    label: str
    reason: str
    detail: str


def prepare_one(record: Record, settings: PictureSettings) -> list[PreparedPicture] | Refusal:
    """Read a sample's pictures and make them what is packed; one that cannot be used costs the sample.

    Raises SourceError when the source is gone or its disk fails.
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
    """The 64 bits of `imagehash.phash` of a packed picture, which a look-alike shares but for a few."""
    import imagehash
    from PIL import Image

    with Image.open(io.BytesIO(jpeg)) as image:
        image.draft("L", (64, 64))  # the hash is of 32×32 greys
        bits = imagehash.phash(image).hash
    return int(np.packbits(bits.flatten()).view(">u8")[0])


def in_processes(do: Callable[[T], None], items: Sequence[T], workers: int) -> Iterator[T]:
    """Do something with each item in `workers` processes, here if there is only one; yields each item done.

    Raises what `do` raises, and SourceError when memory runs out or a worker process dies.
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
            "the pictures need more memory than there is", "give the job more, or pack with fewer --workers"
        ) from None
    except BrokenProcessPool:
        raise SourceError(
            "a worker process died, most likely for want of memory", "pack with fewer --workers"
        ) from None


def _in_pool(do: Callable[[T], None], items: Sequence[T], workers: int) -> Iterator[T]:
    # Spawned, not forked: the caller may have threads, and a forked worker would inherit its locks mid-way.
    context = multiprocessing.get_context("spawn")
    with _starting():  # semaphores, which lie in /dev/shm
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
    # Ctrl-C reaches the whole terminal; the parent alone decides, and its workers end with it, killed or not.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    keep_freed_memory()
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
