"""Which pages of a file lie in the kernel's page cache."""

import ctypes
import mmap
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest


def drop_pages(path: Path) -> None:
    """Have the kernel forget the file; skips the test where that cannot be done, or cannot be seen."""
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(descriptor)
    if resident_share(path, 0, path.stat().st_size) > 0.1:
        pytest.skip(f"{path.parent} lies in memory (tmpfs), or mincore does not tell what is in the page cache")


def resident_share(path: Path, offset: int, size: int) -> float:
    """The share of the pages of a range that are in the page cache; looking brings none in."""
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY) as view:
        address = ctypes.addressof(ctypes.c_char.from_buffer(view))
        told = (ctypes.c_ubyte * -(-len(view) // mmap.PAGESIZE))()
        if ctypes.CDLL(None).mincore(ctypes.c_void_p(address), ctypes.c_size_t(len(view)), told):
            pytest.skip("this system has no mincore")
    pages = told[offset // mmap.PAGESIZE : -(-(offset + size) // mmap.PAGESIZE)]
    return sum(page & 1 for page in pages) / len(pages)


def settled(share: Callable[[], float], wanted: float, within_s: float = 10.0) -> float:
    """The share once it is as high as wanted, or what it is when the time is over."""
    until = time.monotonic() + within_s
    while (now := share()) < wanted and time.monotonic() < until:
        time.sleep(0.05)
    return now
