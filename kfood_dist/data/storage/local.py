"""A packed data set in a folder: files stay open, and reads that wait for the disk run in threads."""

import errno
import mmap
import os
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

from kfood_dist.data.storage.base import MissingFileError, OutOfReachError, Range, Storage, read_merged
from kfood_dist.errors import ShardError

# A process may usually have 1,024 open files; a large data set has more shards than that.
_MAX_OPEN_FILES = 256
# Reads that wait for the disk at once, per process. A parallel file system answers them together.
_NUM_THREADS = 8
# Linux reads no more at one word of advice than the device's read-ahead, 128 KiB unless set otherwise.
_ADVICE_BYTES = 128 << 10
# A read that takes no longer came from memory: no thread is worth its while.
_QUICK_S = 100e-6


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
