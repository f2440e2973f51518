"""A folder that appears whole or not at all.

    partial_folder(OUT) ──► .OUT.partial, empty and locked ──► publish: renamed to OUT
                                                          └──► any error: removed, OUT untouched

A killed process leaves its `.OUT.partial`; the next start empties it. While a process lives, its lock keeps
another from writing the same OUT.
"""

import errno
import fcntl
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from kfood_dist.errors import KfoodError, SourceError

_NO_SPACE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


@contextmanager
def partial_folder(out: Path) -> Iterator[Path]:
    """An empty folder beside `out`; removed when the block fails, and when it ends without `publish`.

    Raises SourceError while another process writes `out`, KfoodError where the disk is full or not writable.
    """
    partial = out.parent / f".{out.name}.partial"
    try:
        partial.mkdir(parents=True, exist_ok=True)
        lock = os.open(partial, os.O_RDONLY | os.O_DIRECTORY)
        try:
            _lock(lock, out)
            try:
                _empty(partial)
                yield partial
            finally:
                shutil.rmtree(partial, ignore_errors=True)
        finally:
            os.close(lock)
    except OSError as error:
        raise _writing_failed(out, error) from error


def publish(partial: Path, out: Path) -> None:
    """Rename a finished partial folder to `out`, which must be absent or empty."""
    _flush_to_disk(partial)
    os.rename(partial, out)
    _flush_to_disk(out.parent)


def _flush_to_disk(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    os.fsync(descriptor)
    os.close(descriptor)


def _lock(descriptor: int, out: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise SourceError(f"another process is writing {out}", "wait for it, or choose another OUT") from None
    except OSError as error:
        # Some parallel file systems are mounted without locks; packing alone is safe there.
        print(
            f"note: {out.parent} has no locks ({error.strerror}); run one kfood pack at a time",
            file=sys.stderr,
        )


def _empty(folder: Path) -> None:
    for entry in os.scandir(folder):
        if entry.is_dir(follow_symlinks=False):
            shutil.rmtree(entry.path)
        else:
            os.unlink(entry.path)


def _writing_failed(out: Path, error: OSError) -> KfoodError:
    if error.errno in _NO_SPACE:
        return KfoodError(
            f"no space left to write {out} ({error.strerror})",
            "free about twice the size of the packed pictures there, or choose another OUT",
        )
    return KfoodError(f"cannot write {out} ({error})", "check the folder's permissions and its disk")
