"""Where a packed data set lies: a folder, or a place that fsspec reaches (http, s3 and others).

    open_storage("…/dir" | "file:///…" | "http://…" | "s3://…") ──► LocalStorage | RemoteStorage (`remote.py`)
    storage.read_ranges([(name, offset, size), …])              ──► bytes, or the ShardError of that range

What lies in memory already is read one range after another, as fast as can be. As soon as a read has to wait, near
ranges are merged and several of the merged reads are in flight; behind a URL always.

Either kind opens its files or connections when first used, anew in each process: an object may be pickled or
forked. One fault never hides the other ranges, and always names the file.
"""

import errno
import mmap
import os
import threading
import time
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from kfood_dist.errors import ShardError

# (file name, offset in bytes, number of bytes)
Range = tuple[str, int, int]

# Ranges that lie nearer than this are read in one go: two short reads cost more than the bytes between.
_GAP_BYTES = 32 << 10
# One read is no longer than this, so that a long run of ranges is several reads in flight.
_SPAN_BYTES = 4 << 20
# A process may usually have 1,024 open files; a large data set has more shards than that.
_MAX_OPEN_FILES = 256
# Reads that wait for the disk at once, per process. A parallel file system answers them together.
_NUM_THREADS = 8
# Linux reads no more at one word of advice than the device's read-ahead, 128 KiB unless set otherwise.
_ADVICE_BYTES = 128 << 10
# A read that takes no longer came from memory: no thread is worth its while.
_QUICK_S = 100e-6


class OutOfReachError(ShardError):
    """A file cannot be read, which says nothing of what is in it: another try may succeed."""


class MissingFileError(OutOfReachError):
    """A file of the data set, or the whole of it, is not where it was looked for."""


class Storage(ABC):
    """The files of one packed data set. `where` names it in messages: a path or a URL."""

    where: str
    is_local: bool

    @abstractmethod
    def place(self, name: str) -> str:
        """The path or URL of one file."""

    @abstractmethod
    def read(self, name: str) -> bytes:
        """A whole file. Raises MissingFileError, or ShardError where it cannot be read."""

    @abstractmethod
    def sizes(self, names: Iterable[str]) -> dict[str, int | ShardError]:
        """The size of each file in bytes, or what keeps it from being known."""

    def size(self, name: str) -> int:
        """The size of one file in bytes; raises as `read` does."""
        size = self.sizes([name])[name]
        if isinstance(size, ShardError):
            raise size
        return size

    @abstractmethod
    def read_ranges(self, ranges: Sequence[Range]) -> list[bytes | ShardError]:
        """The bytes of each range in order, several in flight; fewer than asked for where a file ends inside."""

    def will_need(self, ranges: Iterable[Range]) -> None:  # noqa: B027 - only a local disk can be told
        """Say which ranges will soon be read; returns at once."""

    @abstractmethod
    def fault(self, name: str, what: str) -> ShardError:
        """The error of one file that is not as its manifest says."""

    @abstractmethod
    def close(self) -> None:
        """Close what this process has open; a later read opens it again."""


def spans(ranges: Sequence[Range], gap: int, longest: int | None = None) -> list[tuple[Range, list[int]]]:
    """The reads that serve all ranges: what to read, and the positions of the ranges that lie in it.

    Ranges of one file become one read if at most `gap` bytes lie between them and it stays within `longest` bytes.
    """
    found: list[tuple[Range, list[int]]] = []
    for n in sorted(range(len(ranges)), key=ranges.__getitem__):
        name, offset, size = ranges[n]
        if found:
            (last, start, length), members = found[-1]
            end = max(start + length, offset + size)
            near = name == last and offset <= start + length + gap
            if near and (longest is None or end - start <= longest):
                found[-1] = (name, start, end - start), members
                members.append(n)
                continue
        found.append(((name, offset, size), [n]))
    return found


def read_merged(
    ranges: Sequence[Range], read: Callable[[list[Range]], list[bytes | ShardError]]
) -> list[bytes | ShardError]:
    """The bytes of each range, taken from what `read` gives for the merged ones."""
    results: list[Any] = [None] * len(ranges)
    merged = spans(ranges, _GAP_BYTES, _SPAN_BYTES)
    for (span, members), data in zip(merged, read([span for span, _ in merged]), strict=True):
        for n in members:
            _, offset, size = ranges[n]
            at = offset - span[1]
            results[n] = data if isinstance(data, ShardError) or len(members) == 1 else data[at : at + size]
    return results


def open_storage(where: "str | Path | Storage") -> Storage:
    """The storage of a folder's path or of a URL; reads nothing.

    Raises ShardError for a protocol that is unknown or whose package is not installed.
    """
    if isinstance(where, Storage):
        return where
    text = str(where)
    protocol, separator, _ = text.partition("://")
    if not separator:
        return LocalStorage(Path(where))
    if protocol in ("file", "local"):
        return LocalStorage(Path(unquote(urlsplit(text).path)))
    # Here, not above: fsspec and aiohttp take a quarter of a second that a local data set need not pay.
    from kfood_dist.data.storage.remote import RemoteStorage

    return RemoteStorage(text)


class LocalStorage(Storage):
    """A folder on a local disk or a mounted file system."""

    is_local = True

    def __init__(self, folder: Path):
        self.folder = folder
        self.where = str(folder)
        self._descriptors: OrderedDict[str, int] = OrderedDict()
        self._pool: ThreadPoolExecutor | None = None
        self._is_quick = True  # whether the last read came from memory
        self._owner_pid = os.getpid()

    def __reduce__(self) -> tuple[Callable[..., "LocalStorage"], tuple[Any, ...]]:
        # Absolute, because the copy may be unpickled by a process that stands elsewhere.
        return LocalStorage, (self.folder.resolve(),)

    def place(self, name: str) -> str:
        return str(self.folder / name)

    def read(self, name: str) -> bytes:
        try:
            return (self.folder / name).read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            raise MissingFileError(f"{self.place(name)} does not exist", "check the path") from None
        except OSError as error:
            raise ShardError(
                f"{self.place(name)} cannot be read ({error.strerror})", "check the path and its permissions"
            ) from None

    def size(self, name: str) -> int:
        try:
            return (self.folder / name).stat().st_size
        except OSError as error:
            raise self.fault(name, f"cannot be opened ({error.strerror})") from None

    def sizes(self, names: Iterable[str]) -> dict[str, int | ShardError]:
        # One look at the folder first: what is not in it costs no call of its own.
        try:
            with os.scandir(self.folder) as entries:
                present = {entry.name: entry for entry in entries}
        except OSError as error:
            return {name: self.fault(name, f"cannot be opened ({error.strerror})") for name in names}
        return {name: self._size(name, present.get(name)) for name in names}

    def _size(self, name: str, entry: os.DirEntry | None) -> int | ShardError:
        if entry is None:
            return self.fault(name, f"cannot be opened ({os.strerror(errno.ENOENT)})")
        try:
            return entry.stat().st_size
        except OSError as error:
            return self.fault(name, f"cannot be opened ({error.strerror})")

    def read_ranges(self, ranges: Sequence[Range]) -> list[bytes | ShardError]:
        results: list[bytes | ShardError] = []
        # Fewer at once than files may be open, so that none is closed while it is read.
        batch = max(1, _MAX_OPEN_FILES // 2)
        for start in range(0, len(ranges), batch):
            results += self._read_batch(ranges[start : start + batch])
        return results

    def _read_batch(self, ranges: Sequence[Range]) -> list[bytes | ShardError]:
        """One after another while that is quick; once a read had to wait, the rest by several threads together."""
        results: list[bytes | ShardError] = []
        while self._is_quick and len(results) < len(ranges):
            began = time.perf_counter()
            results.append(self._read_one(ranges[len(results)]))
            self._is_quick = time.perf_counter() - began < _QUICK_S
        if rest := ranges[len(results) :]:
            began = time.perf_counter()
            results += read_merged(rest, self._read_together)
            self._is_quick = (time.perf_counter() - began) / len(rest) < _QUICK_S
        return results

    def _read_one(self, r: Range) -> bytes | ShardError:
        name, offset, size = r
        try:
            return _read_fully(self._descriptor(name), offset, size)
        except OSError as error:
            what = "opened" if error.filename else "read"  # only a failed open names its file
            if error.errno == errno.EIO:  # a bad spot on a disk
                return self.fault(name, f"cannot be {what} ({error.strerror})")
            return OutOfReachError(f"{self.place(name)} cannot be {what} ({error.strerror})", "see that it is there")

    def _read_together(self, ranges: list[Range]) -> list[bytes | ShardError]:
        for name in {name for name, _, _ in ranges}:
            with suppress(OSError):  # told by the read that follows
                self._descriptor(name)  # here, because threads must not change which files are open
        if len(ranges) == 1:
            return [self._read_one(ranges[0])]
        return list(self._threads().map(self._read_one, ranges))

    def will_need(self, ranges: Iterable[Range]) -> None:
        # By a thread: the kernel lets who advises wait as soon as the device's queue is full.
        threading.Thread(target=_advise, args=(self.folder, list(ranges)), name="advise", daemon=True).start()

    def fault(self, name: str, what: str) -> ShardError:
        return ShardError(
            f"{self.place(name)} {what}", f"list every fault with `kfood verify {self.where}`, or pack again"
        )

    def close(self) -> None:
        if self._pool is not None and self._owner_pid == os.getpid():
            self._pool.shutdown()
        self._pool = None
        # After a fork these are copies inherited from the parent; closing them leaves the parent's alone.
        for descriptor in self._descriptors.values():
            os.close(descriptor)
        self._descriptors.clear()
        self._owner_pid = os.getpid()

    def __del__(self) -> None:
        # Descriptors are plain numbers: nobody else closes them when the last reference goes.
        if "_owner_pid" in self.__dict__:
            self.close()

    def _threads(self) -> ThreadPoolExecutor:
        if self._pool is None:
            self._pool = ThreadPoolExecutor(_NUM_THREADS, "read")
        return self._pool

    def _descriptor(self, name: str) -> int:
        """An open descriptor of this process, the least recently used one closed where there are too many."""
        if self._owner_pid != os.getpid():
            self.close()
        descriptor = self._descriptors.get(name)
        if descriptor is None:
            if len(self._descriptors) >= _MAX_OPEN_FILES:
                os.close(self._descriptors.popitem(last=False)[1])
            descriptor = self._descriptors[name] = os.open(self.folder / name, os.O_RDONLY)
        else:
            self._descriptors.move_to_end(name)
        return descriptor


def _advise(folder: Path, ranges: Sequence[Range]) -> None:
    """Have the kernel read the ranges into its page cache, each file opened anew: the caller may close its own."""
    for name, offset, size in ranges:
        with suppress(OSError):  # only advice: a file that cannot be opened is told by the read that follows
            descriptor = os.open(folder / name, os.O_RDONLY)
            try:
                end = min(offset + size, os.fstat(descriptor).st_size)
                for at in range(offset - offset % mmap.PAGESIZE, end, _ADVICE_BYTES):
                    os.posix_fadvise(descriptor, at, min(_ADVICE_BYTES, end - at), os.POSIX_FADV_WILLNEED)
            finally:
                os.close(descriptor)


def _read_fully(descriptor: int, offset: int, size: int) -> bytes:
    """As many of `size` bytes as the file has: one pread may give fewer, on a network file system or above 2 GiB."""
    data = os.pread(descriptor, size, offset)
    while data and len(data) < size:
        more = os.pread(descriptor, size - len(data), offset + len(data))
        if not more:
            break
        data += more
    return data
