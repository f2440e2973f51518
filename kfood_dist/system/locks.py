"""One training process group per run directory.

A POSIX record lock, because it ends with the process however that ends, and loader processes do not inherit it.
"""

import errno
import fcntl
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path

from kfood_dist.errors import LaunchError
from kfood_dist.system.cluster import outlast

_NAME = ".lock"


@contextmanager
def hold(run_dir: Path) -> Iterator[None]:
    """Keep `run_dir` to this process. Raises LaunchError if another process trains there."""
    with open(run_dir / _NAME, "w") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                raise _in_use(run_dir) from None
            print(f"{run_dir}: this file system has no locks ({error.strerror}); start no second run here", flush=True)
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
    try:
        with hold(run_dir):
            return True
    except LaunchError:
        return False


def _in_use(run_dir: Path) -> LaunchError:
    return LaunchError(f"another process is training in {run_dir}", "wait for it, end it, or set another run.dir")


@contextmanager
def lockable(path: Path) -> Iterator[Callable[[], bool]]:
    """What tries to lock a file, which is then held for as long as the block lasts."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        yield partial(_lock, descriptor, path)
    finally:
        os.close(descriptor)


def _lock(descriptor: int, path: Path) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        # Some parallel file systems are mounted without locks.
        _say_no_locks(path.parent, error.strerror)
    return True


@cache
def _say_no_locks(folder: Path, why: str) -> None:
    print(
        f"note: {folder} has no locks ({why}); --part K/N works, but nobody notices when one part is started twice, "
        "and that is then done twice",
        file=sys.stderr,
    )
