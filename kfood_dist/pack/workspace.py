"""Where a data set is made before it appears: beside OUT, kept when the packing stops, gone when it is done.

    OUT/../.OUT.partial/   chunks/*.chunk         pictures prepared so far
                           part-K-of-N.lock       held by the packer of that part while it lives
                           merge.lock             held by the one that puts the shards together
                           <shards>.<process>/    the shards that process wrote so far; renamed to OUT in the end

Always holds: OUT is whole or untouched; two processes never write the same file. Locks only save work: where the file
system has none, or keeps them within a node, several packers may put the shards together, each in its own folder, and
the rename to OUT decides.
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
from kfood_dist.system.cluster import outlast
from kfood_dist.system.files import sync
from kfood_dist.system.locks import Lock

_NO_SPACE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}

_INDEX_SUFFIX = ".index.npy"
_NO_LOCKS = "--part K/N works, but nobody notices when one part is started twice, and that is then done twice"


def require_place(out: Path) -> None:
    """Raise SourceError where no finished folder could be renamed to `out`, which else is known after all the work."""
    if os.path.islink(out):
        raise SourceError(f"{out} is a link to itself", "choose another OUT")
    if os.path.ismount(out) and not os.path.exists(out / MANIFEST_NAME):
        raise SourceError(
            f"{out} is a mount point, which the finished data set cannot take the place of",
            f"name a folder inside it, such as {out / 'kfood'}",
        )


def process_name() -> str:
    """A name that no other process has, on any node: host, process id and a random part."""
    return f"{socket.gethostname()}.{os.getpid()}.{secrets.token_hex(4)}"


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
    work = _work_of(out)
    with writing(out):
        (work / "chunks").mkdir(parents=True, exist_ok=True)
        with Lock(work / f"part-{part}-of-{parts}.lock", _NO_LOCKS) as lock:
            what = f"another process is writing {f'part {part} of {parts} of {out}' if parts > 1 else out}"
            if not outlast(lock.take, what):
                raise SourceError(what, "wait for it, or choose another OUT")
            try:
                yield work
            finally:
                if work.is_dir() and not any((work / "chunks").glob("*.chunk")) and parts == 1:
                    shutil.rmtree(work, ignore_errors=True)


@contextmanager
def merging(work: Path) -> Iterator[bool]:
    """Whether this process is the one that may put the shards together, for as long as the block lasts."""
    with Lock(work / "merge.lock", _NO_LOCKS) as lock:
        yield lock.take()


def shard_folder(work: Path, shards: str) -> Path:
    """A new folder for this process alone, with the shards that others finished for the same data set, `shards`.

    A finished shard never changes, so a hard link to it is safe even while its writer runs. What cannot be linked is
    written again: not every parallel file system has hard links.
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
    """Remove a folder of shards that read back damaged, and its files from where it shares them with another."""
    for other in result.parent.glob(f"{_shards_of(result)}.*"):
        for path in result.iterdir() if other != result else ():
            with suppress(FileNotFoundError):
                if path.samefile(other / path.name):
                    (other / path.name).unlink()
    shutil.rmtree(result)


def publish(result: Path, out: Path) -> None:
    """Rename a finished folder to `out` and remove the work folder.

    Raises SourceError where `out` holds anything, as when another packer was quicker.
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
    """Remove the work folder of `out`, once that is complete: whoever still works there could not publish it."""
    shutil.rmtree(_work_of(out), ignore_errors=True)


def require_space(folder: Path, num_bytes: int) -> None:
    """Raise OSError ENOSPC, with the numbers, if less than this is free where `folder` lies."""
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
            "free twice the size of the packed pictures there in all, and give the same command again: it goes on "
            "where it stopped; or choose another OUT",
        )
    return KfoodError(f"cannot write {out} ({error})", "check the folder's permissions and its disk")
