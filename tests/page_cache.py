"""Which pages of a file are in the kernel's page cache."""

import ctypes
import mmap
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest


def drop_pages(path: Path) -> None:
    """Drop the file from the page cache. Skips the test if that is impossible or cannot be observed."""
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(descriptor)
    if resident_share(path, 0, path.stat().st_size) > 0.1:
        pytest.skip(f"{path.parent} is in memory (tmpfs), or mincore does not report what is in the page cache")


def resident_share(path: Path, offset: int, size: int) -> float:
    """Return the share of a range's pages that are in the page cache. The call itself loads no page."""
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY) as view:
        address = ctypes.addressof(ctypes.c_char.from_buffer(view))
        message = (ctypes.c_ubyte * -(-len(view) // mmap.PAGESIZE))()
        if ctypes.CDLL(None).mincore(ctypes.c_void_p(address), ctypes.c_size_t(len(view)), message):
            pytest.skip("this system has no mincore")
    pages = message[offset // mmap.PAGESIZE : -(-(offset + size) // mmap.PAGESIZE)]
    return sum(page & 1 for page in pages) / len(pages)


def settled(share: Callable[[], float], wanted: float, within_s: float = 10.0) -> float:
    """Wait until the share is at least `wanted` or `within_s` seconds are over, and return the share."""
    until = time.monotonic() + within_s
    while (now := share()) < wanted and time.monotonic() < until:
        time.sleep(0.05)
    return now
