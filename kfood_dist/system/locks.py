"""Locks on files. A lock ends when the process that holds it ends, in any way.

The project has one class of lock, `Lock`. `hold` takes one, so that only one training at a time uses a run directory.
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
from kfood_dist.system.cluster import take_with_patience

_NAME = ".lock"


class Lock:
    """A lock on the file `path`, which is made if it is missing. It is advisory: it stops only code that takes it too.

    By default it is a flock lock. Each Lock is independent, also within one process. A forked child inherits it, so
    `close` releases it for the parent and its children.

    With `of_process` it is a lockf lock, for a run directory. A forked child does not inherit it, so a loader process
    cannot hold the directory of its killed parent. Also, GPFS applies only this kind of lock across nodes. But it does
    not stop a second Lock of the same process, and it ends when that process closes any descriptor of the file.

    Some parallel file systems have no locks. There the lock counts as taken, and `warning` is printed once. Without a
    `warning`, `take` raises OSError.
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
        """Take the lock, and return whether it is held now: by this Lock only, or by several if all take it `shared`.

        A second call changes a held lock between shared and exclusive. If that fails, flock loses the lock. Raises
        OSError if the file system has no locks and there is no warning.
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
        """Return whether `path` is still the file that was opened. Another process may have removed it."""
        try:
            return os.path.samestat(os.fstat(self._descriptor), os.stat(self._path))
        except FileNotFoundError:
            return False

    def close(self) -> None:
        """Release the lock and close the file."""
        with suppress(OSError):  # there are no locks here
            self._lock(self._descriptor, fcntl.LOCK_UN)
        os.close(self._descriptor)


@cache
def _say_no_locks(folder: Path, why: str, warning: str) -> None:
    print(f"note: {folder} has no locks ({why}); {warning}", file=sys.stderr, flush=True)


@contextmanager
def hold(run_dir: Path) -> Iterator[None]:
    """Reserve `run_dir` for this process while the block lasts. Raises LaunchError if another process trains there."""
    with _lock_of(run_dir) as lock:
        if not lock.take():
            raise _in_use(run_dir)
        yield


def require_free(run_dir: Path) -> None:
    """Raise LaunchError if another process trains in `run_dir`.

    A job that Slurm restarted first waits some minutes for the lock (`take_with_patience`). Keeps no lock.
    """
    if not take_with_patience(lambda: _is_free(run_dir), f"another process is training in {run_dir}"):
        raise _in_use(run_dir)


def _is_free(run_dir: Path) -> bool:
    if not os.path.exists(run_dir / _NAME):
        return True
    with _lock_of(run_dir) as lock:
        return lock.take()


def _lock_of(run_dir: Path) -> Lock:
    return Lock(run_dir / _NAME, warning="do not start a second run here", of_process=True)


def _in_use(run_dir: Path) -> LaunchError:
    return LaunchError(f"another process is training in {run_dir}", "wait for it, end it, or set another run.dir")
