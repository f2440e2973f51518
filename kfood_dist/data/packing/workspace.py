"""Where a data set is made before it appears: beside OUT, kept when the packing stops, gone when it is done.

    OUT/../.OUT.partial/   chunks/*.chunk         pictures prepared so far
                           part-K-of-N.lock       held by the packer of that part while it lives
                           merge.lock             held by the one that puts the shards together
                           <fingerprint>/         the shards written so far; renamed to OUT in the end

Always holds: OUT is whole or untouched; two processes never write the same thing.
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
def writing(out: Path) -> Iterator[None]:
    """Turn what the system says of `out` and the folder it lies in into a KfoodError with the remedy."""
    try:
        yield
    except OSError as error:
        raise _writing_failed(out, error) from error


@contextmanager
def work_folder(out: Path, part: int, parts: int) -> Iterator[Path]:
    """The work folder of `out`, held for one part of `parts`; it stays unless `publish` or nothing was made yet.

    Raises SourceError while another process packs this part, KfoodError where the disk is full or not writable.
    """
    work = out.parent / f".{out.name}.partial"
    with writing(out):
        (work / "chunks").mkdir(parents=True, exist_ok=True)
        with _locked(work / f"part-{part}-of-{parts}.lock") as mine:
            if not mine:
                what = f"part {part} of {parts} of {out}" if parts > 1 else f"{out}"
                raise SourceError(f"another process is writing {what}", "wait for it, or choose another OUT")
            try:
                yield work
            finally:
                if work.is_dir() and not any((work / "chunks").glob("*.chunk")) and parts == 1:
                    shutil.rmtree(work, ignore_errors=True)


@contextmanager
def merging(work: Path) -> Iterator[bool]:
    """Whether this process is the one that may put the shards together, for as long as the block lasts."""
    with _locked(work / "merge.lock") as mine:
        yield mine


def publish(work: Path, result: Path, out: Path) -> None:
    """Rename a finished result folder to `out`, which must be absent or empty, and remove the work folder."""
    _flush_to_disk(result)
    os.rename(result, out)
    _flush_to_disk(out.parent)
    shutil.rmtree(work, ignore_errors=True)


def require_space(folder: Path, num_bytes: int) -> None:
    """Raise OSError ENOSPC, with the numbers, if less than this is free where `folder` lies."""
    free = shutil.disk_usage(folder).free
    if free < num_bytes:
        raise OSError(errno.ENOSPC, f"{num_bytes / 2**20:,.1f} MiB are needed and {free / 2**20:,.1f} MiB are free")


@contextmanager
def _locked(path: Path) -> Iterator[bool]:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        yield _lock(descriptor, path)
    finally:
        os.close(descriptor)


def _lock(descriptor: int, path: Path) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        # Some parallel file systems are mounted without locks; one packer at a time is safe there.
        print(f"note: {path.parent} has no locks ({error.strerror}); run one kfood pack at a time", file=sys.stderr)
    return True


def _flush_to_disk(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    os.fsync(descriptor)
    os.close(descriptor)


def _writing_failed(out: Path, error: OSError) -> KfoodError:
    if error.errno in _NO_SPACE:
        return KfoodError(
            f"no space left to write {out} ({error.strerror})",
            "free twice the size of the packed pictures there in all, and give the same command again: it goes on "
            "where it stopped; or choose another OUT",
        )
    return KfoodError(f"cannot write {out} ({error})", "check the folder's permissions and its disk")
