"""The work folder beside OUT, where a data set is made. It is kept if packing stops, and removed when OUT is complete.

    OUT/../.OUT.partial/   chunks/*.chunk         pictures prepared so far
                           part-K-of-N.lock       held by the packer of that part while it runs
                           merge.lock             held by the packer that puts the shards together
                           <shards>.<process>/    the shards that process wrote so far; renamed to OUT at the end

Always holds: OUT is complete or untouched; two processes never write the same file.

Locks only save work. If the file system has no locks, or only locks within a node, several packers may put the shards
together, each in its own folder. The first one that renames its folder to OUT has made it.
"""

import errno
import os
import secrets
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from kfood_dist.data.shards.manifest import MANIFEST_NAME
from kfood_dist.errors import KfoodError, SourceError
from kfood_dist.system.cluster import take_with_patience
from kfood_dist.system.files import sync
from kfood_dist.system.locks import Lock

_NO_SPACE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}

_INDEX_SUFFIX = ".index.npy"
_NO_LOCKS = "--part K/N works, but nothing notices a part that is started twice: its work is then done twice"


def require_renamable(out: Path) -> None:
    """Raise SourceError if no finished folder can be renamed to `out`. Otherwise this shows only after all the work."""
    if os.path.islink(out):
        raise SourceError(f"{out} is a link to itself", "choose another OUT")
    if os.path.ismount(out) and not os.path.exists(out / MANIFEST_NAME):
        raise SourceError(
            f"{out} is a mount point, so the finished data set cannot replace it",
            f"name a folder inside it, such as {out / 'kfood'}",
        )


def process_name() -> str:
    """Return a name that no other process on any node has: host, process id and a random part."""
    return f"{socket.gethostname()}.{os.getpid()}.{secrets.token_hex(4)}"


@contextmanager
def writing(out: Path) -> Iterator[None]:
    """Turn an OSError about `out` or its parent folder into a KfoodError with the remedy."""
    try:
        yield
    except OSError as error:
        raise _writing_failed(out, error) from error


@contextmanager
def work_folder(out: Path, part: int, parts: int) -> Iterator[Path]:
    """Make the work folder of `out`, hold the lock of one part of `parts`, and give the folder.

    The folder stays after the block, unless `publish` removed it. With one part, it is removed if no chunk was made.
    Raises SourceError if another process packs this part. Raises KfoodError if the disk is full or not writable.
    """
    work = _work_of(out)
    with writing(out):
        (work / "chunks").mkdir(parents=True, exist_ok=True)
        with Lock(work / f"part-{part}-of-{parts}.lock", _NO_LOCKS) as lock:
            what = f"another process is writing {f'part {part} of {parts} of {out}' if parts > 1 else out}"
            if not take_with_patience(lock.take, what):
                raise SourceError(what, "wait for it, or choose another OUT")
            try:
                yield work
            finally:
                if work.is_dir() and not any((work / "chunks").glob("*.chunk")) and parts == 1:
                    shutil.rmtree(work, ignore_errors=True)


@contextmanager
def merging(work: Path) -> Iterator[bool]:
    """Give whether this process may put the shards together. If so, it holds the lock while the block lasts."""
    with Lock(work / "merge.lock", _NO_LOCKS) as lock:
        yield lock.take()


def shard_folder(work: Path, shards: str) -> Path:
    """Make a new folder for only this process, with the shards that other processes finished for the same data set.

    `shards` is the name that all folders of these shards share. A finished shard never changes, so a hard link to it is
    safe even while its writer runs. A shard that cannot be linked is written again: not every parallel file system has
    hard links.
    """
    others = list(work.glob(f"{shards}.*"))
    mine = work / f"{shards}.{process_name()}"
    mine.mkdir()
    for index in (path for other in others for path in other.glob(f"*{_INDEX_SUFFIX}")):
        tar = index.name.replace(_INDEX_SUFFIX, ".tar")
        with suppress(OSError):
            os.link(index.with_name(tar), mine / tar)
            os.link(index, mine / index.name)
    return mine


def discard(result: Path) -> None:
    """Remove a folder with damaged shards. Removes its files also from other folders that share them by hard links."""
    for other in result.parent.glob(f"{_shards_of(result)}.*"):
        for path in result.iterdir() if other != result else ():
            with suppress(FileNotFoundError):
                if path.samefile(other / path.name):
                    (other / path.name).unlink()
    shutil.rmtree(result)


def publish(result: Path, out: Path) -> None:
    """Rename a finished folder to `out` and remove the work folder.

    Raises SourceError if `out` already holds anything, for example because another packer was faster.
    """
    sync(result)
    try:
        os.rename(result, out)
    except OSError as error:
        if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
            raise
        raise SourceError(
            f"{out} was filled by another process meanwhile", "choose another OUT, or remove it"
        ) from None
    sync(out.parent)
    remove_work(out)


def remove_work(out: Path) -> None:
    """Remove the work folder of `out` when `out` is complete. A process that still works there could not publish."""
    shutil.rmtree(_work_of(out), ignore_errors=True)


def require_space(folder: Path, num_bytes: int) -> None:
    """Raise OSError ENOSPC, with the numbers, if the disk of `folder` has fewer than `num_bytes` bytes free."""
    free = shutil.disk_usage(folder).free
    if free < num_bytes:
        raise OSError(errno.ENOSPC, f"{num_bytes / 2**20:,.1f} MiB are needed and {free / 2**20:,.1f} MiB are free")


def _work_of(out: Path) -> Path:
    return out.parent / f".{out.name}.partial"


def _shards_of(folder: Path) -> str:
    return folder.name.partition(".")[0]


def _writing_failed(out: Path, error: OSError) -> KfoodError:
    if error.errno in _NO_SPACE:
        return KfoodError(
            f"no space left to write {out} ({error.strerror})",
            "free space there, in total twice the size of the packed pictures, and run the same command again: "
            "it continues where it stopped; or choose another OUT",
        )
    return KfoodError(f"cannot write {out} ({error})", "check the folder's permissions and its disk")
