"""A packed data set in a folder. Files stay open, and reads that wait for the disk run in threads."""

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

from kfood_dist.data.storage.base import MissingFileError, Range, Storage, UnreachableError, read_merged
from kfood_dist.errors import ShardError

# A process may usually have 1,024 open files. A large data set has more shards than that.
_MAX_OPEN_FILES = 256
# The number of reads per process that wait for the disk at once. A parallel file system serves them together.
_NUM_THREADS = 8
# For one call of posix_fadvise, Linux reads at most the device's read-ahead, which is 128 KiB by default.
_ADVICE_BYTES = 128 << 10
# A read that takes less than this came from memory. A thread would not make it faster.
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
        # Absolute, because a process with another working directory may unpickle the copy.
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
        # The folder is listed once first, so a file that is not in it needs no call.
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
        # A batch has fewer ranges than files may be open, so that no file is closed while it is read.
        batch = max(1, _MAX_OPEN_FILES // 2)
        for start in range(0, len(ranges), batch):
            results += self._read_batch(ranges[start : start + batch])
        return results

    def _read_batch(self, ranges: Sequence[Range]) -> list[bytes | ShardError]:
        """Read the ranges one after another while that is quick. Once a read had to wait, threads read the rest."""
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
            if error.errno == errno.EIO:  # a damaged place on the disk
                return self.fault(name, f"cannot be {what} ({error.strerror})")
            return UnreachableError(f"{self.place(name)} cannot be {what} ({error.strerror})", "check that it is there")

    def _read_together(self, ranges: list[Range]) -> list[bytes | ShardError]:
        for name in {name for name, _, _ in ranges}:
            with suppress(OSError):  # the read that follows reports it
                self._descriptor(name)  # opened here, because threads must not change which files are open
        if len(ranges) == 1:
            return [self._read_one(ranges[0])]
        return list(self._threads().map(self._read_one, ranges))

    def will_need(self, ranges: Iterable[Range]) -> None:
        # posix_fadvise blocks when the device's queue is full, so a thread calls it.
        threading.Thread(target=_prefetch, args=(self.folder, list(ranges)), name="advise", daemon=True).start()

    def fault(self, name: str, what: str) -> ShardError:
        return ShardError(
            f"{self.place(name)} {what}", f"list every fault with `kfood verify {self.where}`, or pack again"
        )

    def close(self) -> None:
        if self._pool is not None and self._owner_pid == os.getpid():
            self._pool.shutdown()
        self._pool = None
        # After a fork these are copies inherited from the parent. Closing them does not close the parent's.
        for descriptor in self._descriptors.values():
            os.close(descriptor)
        self._descriptors.clear()
        self._owner_pid = os.getpid()

    def __del__(self) -> None:
        # Descriptors are plain integers: Python does not close them when the last reference is gone.
        if "_owner_pid" in self.__dict__:
            self.close()

    def _threads(self) -> ThreadPoolExecutor:
        if self._pool is None:
            self._pool = ThreadPoolExecutor(_NUM_THREADS, "read")
        return self._pool

    def _descriptor(self, name: str) -> int:
        """Return an open descriptor of this process. If too many are open, closes the least recently used one."""
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


def _prefetch(folder: Path, ranges: Sequence[Range]) -> None:
    """Have the kernel read the ranges into its page cache.

    Opens each file again, because the caller may close its own descriptor meanwhile.
    """
    for name, offset, size in ranges:
        with suppress(OSError):  # only a hint: the read that follows reports a file that cannot be opened
            descriptor = os.open(folder / name, os.O_RDONLY)
            try:
                end = min(offset + size, os.fstat(descriptor).st_size)
                for at in range(offset - offset % mmap.PAGESIZE, end, _ADVICE_BYTES):
                    os.posix_fadvise(descriptor, at, min(_ADVICE_BYTES, end - at), os.POSIX_FADV_WILLNEED)
            finally:
                os.close(descriptor)


def _read_fully(descriptor: int, offset: int, size: int) -> bytes:
    """Return `size` bytes, or fewer if the file ends before.

    Repeats pread, because one call may return fewer bytes on a network file system or above 2 GiB.
    """
    data = os.pread(descriptor, size, offset)
    while data and len(data) < size:
        more = os.pread(descriptor, size - len(data), offset + len(data))
        if not more:
            break
        data += more
    return data
