"""One training process group per run directory.

A POSIX record lock, because it ends with the process however that ends, and loader processes do not inherit it. Where
the process was on a node that was lost, a file server keeps it until it gives that node up.
"""

import errno
import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from kfood_dist.errors import LaunchError

_NAME = ".lock"
_AGAIN_S = 10


@contextmanager
def hold(run_dir: Path) -> Iterator[None]:
    """Keep `run_dir` to this process. Raises LaunchError if another process trains there."""
    with open(run_dir / _NAME, "w") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                raise LaunchError(
                    f"another process is training in {run_dir}", "wait for it, end it, or set another run.dir"
                ) from None
            print(f"{run_dir}: this file system has no locks ({error.strerror}); start no second run here", flush=True)
        yield


def require_free(run_dir: Path, patience_s: float = 0) -> None:
    """Raise LaunchError if another process trains in `run_dir`, and goes on to for `patience_s`; take nothing."""
    until = time.monotonic() + patience_s
    while os.path.exists(run_dir / _NAME):
        try:
            with hold(run_dir):
                return
        except LaunchError as error:
            if time.monotonic() >= until:
                raise
            print(f"{error.what}; waiting", flush=True)
            time.sleep(min(_AGAIN_S, patience_s))
