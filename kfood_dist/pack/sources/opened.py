"""Keeps the open zips of a process, and gives views of them that zipfile can read.

    Archive ──► open_view ──► a seekable file over those bytes of the zip's file, or over a small unpacked copy

Views read only with `pread`, so they share one descriptor without sharing a position. Each process opens files itself,
also after a fork, and keeps only the most recently used ones. A file that is not the one that was listed raises
SourceError.
"""

import errno
import io
import os
import threading
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO, cast

from kfood_dist.errors import SourceError
from kfood_dist.pack.sources.record import MAX_FILE_BYTES, Archive, Member

# Enough for the 27 zips of the data set after only its outer zip was extracted.
_MAX_FILES = 32
# The limit of each process for zips that are compressed inside a zip and unpacked in memory.
MAX_UNPACKED_BYTES = 128 * 2**20


def open_view(archive: Archive, unpack: Callable[[Member], bytes]) -> BinaryIO:
    """Return a file over the bytes of the zip, positioned at its start.

    `unpack` reads a zip that is compressed in another zip. Raises SourceError if the zip's file cannot be read or has
    changed since it was listed.
    """
    here = _of_this_process()
    if archive.packed is None:
        return cast(BinaryIO, Window(here.file(archive), archive.start, archive.num_bytes))
    return io.BytesIO(here.unpacked(archive.packed, unpack))


def require_unchanged(archive: Archive) -> None:
    """Raise SourceError if the zip's file is gone or is not the one that was listed."""
    _of_this_process().file(archive)


def close_all() -> None:
    """Close the files that this process keeps open. A view in use keeps its file open until the view is dropped."""
    global _opened
    _opened = None


class Window(io.RawIOBase):
    """A part of an open file, read by position. It never reads more than MAX_FILE_BYTES at once."""

    def __init__(self, file: "_File", start: int, num_bytes: int):
        super().__init__()
        self._file = file
        self._start = start
        self._num_bytes = num_bytes
        self._position = 0

    def readable(self) -> bool:
        """Return True: a window can always be read."""
        return True

    def seekable(self) -> bool:
        """Return True: a window can always be positioned."""
        return True

    def tell(self) -> int:
        """Return the position from the start of the window, in bytes."""
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Move to `offset` from the start, the position or the end. Raises OSError if that is before the start."""
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._num_bytes}[whence]
        if base + offset < 0:
            raise OSError(errno.EINVAL, f"position {base + offset} is before the start")
        self._position = base + offset
        return self._position

    def read(self, size: int = -1) -> bytes:
        """Return the next `size` bytes, fewer only at the window's end. Raises ValueError above MAX_FILE_BYTES."""
        left = max(0, self._num_bytes - self._position)
        size = left if size < 0 else min(size, left)
        if size > MAX_FILE_BYTES:
            raise ValueError(f"asks for {size:,} bytes at once")
        data = self._file.read(size, self._start + self._position)
        self._position += size
        return data


class _File:
    """An open descriptor, closed when nothing uses it any more."""

    def __init__(self, path: Path):
        self.path = path
        self._descriptor = -1
        try:
            self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise _unreadable(path, error) from None

    def __del__(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)

    def require(self, num_bytes: int, mtime_ns: int) -> None:
        try:
            status = os.fstat(self._descriptor)
        except OSError as error:
            raise _unreadable(self.path, error) from None
        if (status.st_size, status.st_mtime_ns) != (num_bytes, mtime_ns):
            raise changed(self.path)

    def read(self, size: int, offset: int) -> bytes:
        parts = []
        while size > 0:
            try:
                data = os.pread(self._descriptor, size, offset)
            except OSError as error:
                raise _unreadable(self.path, error) from None
            if not data:
                raise changed(self.path)
            parts.append(data)
            size -= len(data)
            offset += len(data)
        return parts[0] if len(parts) == 1 else b"".join(parts)


class _Opened:
    """The open files and unpacked zips of one process."""

    def __init__(self) -> None:
        self.pid = os.getpid()
        self._lock = threading.Lock()
        self._files: OrderedDict[tuple[Path, int, int], _File] = OrderedDict()
        self._unpacked: OrderedDict[Member, bytes] = OrderedDict()

    def file(self, archive: Archive) -> _File:
        identity = (archive.path, archive.file_bytes, archive.mtime_ns)
        with self._lock:
            file = self._files.get(identity)
            if file is None:
                file = self._files[identity] = _File(archive.path)
            self._files.move_to_end(identity)
            while len(self._files) > _MAX_FILES:
                self._files.popitem(last=False)
        file.require(archive.file_bytes, archive.mtime_ns)
        return file

    def unpacked(self, member: Member, unpack: Callable[[Member], bytes]) -> bytes:
        self.file(member.archive)
        with self._lock:
            if member in self._unpacked:
                self._unpacked.move_to_end(member)
                return self._unpacked[member]
            held = sum(map(len, self._unpacked.values()))
            while self._unpacked and held + member.num_bytes > MAX_UNPACKED_BYTES:
                held -= len(self._unpacked.popitem(last=False)[1])
        data = unpack(member)
        with self._lock:
            self._unpacked[member] = data
        return data


_opened: _Opened | None = None


def _of_this_process() -> _Opened:
    # A forked child must not use its parent's locks: another thread may have held them at the fork.
    global _opened
    if _opened is None or _opened.pid != os.getpid():
        _opened = _Opened()
    return _opened


def _unreadable(path: Path, error: OSError) -> SourceError:
    return SourceError(
        f"{path} can no longer be read ({error.strerror})",
        "restore it and its disk as they were, then run the same command again",
    )


def changed(path: Path) -> SourceError:
    """Return the error for a file that has changed since it was listed."""
    return SourceError(
        f"{path} has changed since it was listed", "make sure nothing writes to it, then run the same command again"
    )
