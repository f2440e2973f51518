"""Locks on files, which end with the process that holds them, however that ends.

`Lock` is the one kind of lock here. `hold` takes one so that a run directory has one training process group.
"""

import errno
import fcntl
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Self

from kfood_dist.errors import LaunchError
from kfood_dist.system.cluster import outlast

_NAME = ".lock"


class Lock:
    """A lock on the file `path`, which is made if it is missing. Advisory: it stops only those who take it, too.

    It is flock's. Each Lock counts by itself, also within a process. A forked child inherits it, so `close` gives it
    back for parent and children alike.

    `of_process` makes it lockf's, for a run directory. A forked child does not inherit it, so a loader process cannot
    hold the directory of its killed parent. And GPFS keeps locks of this kind alone between nodes. But it stops no
    second Lock of the same process, and ends when that process closes any descriptor of the file.

    Some parallel file systems have no locks. There a lock counts as taken, and `warning` is printed once. If there is
    no `warning`, it is an OSError.
    """

    def __init__(self, path: Path, warning: str | None = None, of_process: bool = False):
        self._path = path
        self._warning = warning
        self._lock = fcntl.lockf if of_process else fcntl.flock
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def take(self, shared: bool = False, wait: bool = False) -> bool:
        """Whether the lock is held now, by this Lock alone or together with others that take it `shared`.

        Taken again, it changes between the two; if it cannot, it is lost. Raises OSError if there are no locks and no
        warning.
        """
        try:
            self._lock(self._descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB))
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                return False
            if self._warning is None:
                raise OSError(error.errno, error.strerror, str(self._path)) from None
            _say_no_locks(self._path.parent, error.strerror, self._warning)
        return True

    def is_in_place(self) -> bool:
        """Whether `path` still is the file that was opened, which another process may have removed since."""
        try:
            return os.path.samestat(os.fstat(self._descriptor), os.stat(self._path))
        except FileNotFoundError:
            return False

    def close(self) -> None:
        """Give the lock back."""
        with suppress(OSError):  # there are no locks here
            self._lock(self._descriptor, fcntl.LOCK_UN)
        os.close(self._descriptor)


@cache
def _say_no_locks(folder: Path, why: str, warning: str) -> None:
    print(f"note: {folder} has no locks ({why}); {warning}", file=sys.stderr, flush=True)


@contextmanager
def hold(run_dir: Path) -> Iterator[None]:
    """Keep `run_dir` to this process. Raises LaunchError if another process trains there."""
    with _lock_of(run_dir) as lock:
        if not lock.take():
            raise _in_use(run_dir)
        yield


def require_free(run_dir: Path) -> None:
    """Raise LaunchError if another process trains in `run_dir`, in a job that was started again after some minutes.

    Takes nothing.
    """
    if not outlast(lambda: _is_free(run_dir), f"another process is training in {run_dir}"):
        raise _in_use(run_dir)


def _is_free(run_dir: Path) -> bool:
    if not os.path.exists(run_dir / _NAME):
        return True
    with _lock_of(run_dir) as lock:
        return lock.take()


def _lock_of(run_dir: Path) -> Lock:
    return Lock(run_dir / _NAME, warning="start no second run here", of_process=True)


def _in_use(run_dir: Path) -> LaunchError:
    return LaunchError(f"another process is training in {run_dir}", "wait for it, end it, or set another run.dir")
