"""Copy the splits of a data set that a job reads to a disk of its node, once for all processes of the node.

    data set ──► HOME/<name>-<hash>/.in-use     a lock, shared by all who use the copy
                                   /.copying    a lock: one process copies, the others wait
                                   /NAME.partial ──► size, SHA-256 ──► NAME

HOME is DIR/kfood-copy-<user id>. Only this user writes there, and it is removed when it is empty.

The hash is the manifest's, so a file under its final name is a verified copy of exactly this data set. The last
process that leaves removes the copy. A killed job leaves its copy behind: the next job that reads the same data set
uses it, and a job that copies another one removes it. Nothing else is ever removed: no folder without `.in-use`, no
file of another name.
"""

import errno
import hashlib
import os
import re
import shutil
import stat
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from tqdm import tqdm

from kfood_dist.data.shards.manifest import MANIFEST_NAME, Manifest, load_manifest
from kfood_dist.data.storage.base import Range, Storage
from kfood_dist.data.storage.local import LocalStorage
from kfood_dist.data.storage.open import open_storage
from kfood_dist.errors import KfoodError, LaunchError, ShardError
from kfood_dist.system.locks import Lock

_PIECE_BYTES = 8 << 20
# One batch is read while the one before it is hashed and written, so memory holds two.
_BATCH_BYTES = 32 << 20
_BATCH_PIECES = 64
_PARTIAL = ".partial"
_IN_USE = ".in-use"
_COPYING = ".copying"
# The files of a copy. Only these are removed.
_COPIED = re.compile(rf"{re.escape(_COPYING)}|({re.escape(MANIFEST_NAME)}|.+\.tar|.+\.index\.npy)(\{_PARTIAL})?")


@dataclass(frozen=True)
class _File:
    """One file to copy, as the manifest describes it."""

    name: str
    bytes: int
    sha256: str

    def ranges(self) -> list[Range]:
        return [(self.name, at, min(_PIECE_BYTES, self.bytes - at)) for at in range(0, self.bytes, _PIECE_BYTES)]


@contextmanager
def local_copies(
    wanted: Mapping[str, Iterable[str]], copy_to: Path | None, show_progress: bool = True
) -> Iterator[dict[str, str]]:
    """Give the place to read each data set of `wanted` from, while the block lasts.

    `wanted` maps a data set to its splits. The place is a `local_copy`, or the data set itself without `copy_to`.
    """
    with ExitStack() as copies:
        yield {
            where: str(copies.enter_context(local_copy(where, splits, copy_to, show_progress))) if copy_to else where
            for where, splits in wanted.items()
        }


@contextmanager
def local_copy(
    where: str | Path | Storage, splits: Iterable[str], copy_to: Path, show_progress: bool = True
) -> Iterator[Path]:
    """Copy the manifest and the shards of `splits` into a folder under `copy_to`, and give the folder.

    Any number of processes of a node may call this at once. One of them copies, and all may read until they leave the
    block. The last one that leaves removes the copy. `copy_to` should be on a disk of the node. Several users may name
    the same folder: each has copies of their own there.

    Raises ShardError if the data set is missing, damaged or unreachable. Raises LaunchError if `copy_to` has no room
    for it or cannot be written.
    """
    storage = open_storage(where)
    manifest = load_manifest(storage)
    raw = storage.read(MANIFEST_NAME)
    folder = _home(copy_to) / f"{_plain(manifest.where)}-{hashlib.sha256(raw).hexdigest()[:12]}"
    with _as_launch_error(copy_to):
        copy_to.mkdir(parents=True, exist_ok=True)
        lock = _enter(folder)
    try:
        with _as_launch_error(copy_to), _copying(folder, manifest.where):
            _sweep(folder)
            _copy(manifest, _files(manifest, set(splits)), folder, show_progress)
            _write(folder, _File(MANIFEST_NAME, len(raw), hashlib.sha256(raw).hexdigest()), [raw], storage)
        yield folder
    finally:
        _leave(folder, lock)


def _plain(where: str) -> str:
    """The last part of a path or URL, fit to name a folder."""
    return re.sub(r"[^\w.-]", "_", Path(where).absolute().name) or "shards"


def _home(copy_to: Path) -> Path:
    return copy_to / f"kfood-copy-{os.geteuid()}"


@contextmanager
def _as_launch_error(copy_to: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise LaunchError(
            f"cannot copy to {copy_to} ({error.strerror or error}: {error.filename})",
            "name a folder of your own on a disk of this node with --copy-to DIR, or read without --copy-to",
        ) from None


def _files(manifest: Manifest, splits: set[str]) -> list[_File]:
    """The files to copy. Indexes come first: they are small, and if one cannot be read, no tar is copied in vain."""
    shards = [shard for shard in manifest.shards if shard.split in splits]
    indexes = [_File(shard.index_path, shard.index_bytes, shard.index_sha256) for shard in shards]
    return indexes + [_File(shard.path, shard.bytes, shard.sha256) for shard in shards]


# --- who uses a copy


def _enter(folder: Path) -> Lock:
    """Make the folder and share its lock. Waits while another process removes it."""
    while True:
        with suppress(FileExistsError):
            folder.parent.mkdir(0o700)
        try:
            _require_own(folder.parent)
            folder.mkdir(exist_ok=True)
            lock = Lock(folder / _IN_USE)
        except FileNotFoundError:
            continue  # the last user has just removed it
        lock.take(shared=True, wait=True)
        if lock.is_in_place():
            return lock
        lock.close()  # removed with the folder while this process waited for it


def _require_own(home: Path) -> None:
    # In a place like /tmp another user could have made it, and would control what this job reads.
    status = home.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid():
        raise LaunchError(
            f"{home} does not belong to this user", "name another --copy-to DIR, or read without --copy-to"
        )


def _leave(folder: Path, lock: Lock) -> None:
    """Release the lock, and remove the folder if nobody else shares it. Removes the home too if it is empty."""
    with lock:
        if lock.take() and lock.is_in_place() and not folder.is_symlink():
            _remove(folder)
    with suppress(OSError):  # it is not empty
        folder.parent.rmdir()


def _remove(folder: Path) -> None:
    """Remove the files of a copy and its folder. Prints a line if the folder holds anything else, and leaves it."""
    try:
        for path in folder.iterdir():
            if _COPIED.fullmatch(path.name):
                path.unlink()
        (folder / _IN_USE).unlink()  # last: until then, a new process waits for this lock
        folder.rmdir()
    except OSError as error:
        if error.errno != errno.ENOTEMPTY or not (folder / _IN_USE).exists():  # otherwise it is in use again
            print(f"{folder} could not be removed ({error.strerror}); remove it by hand", flush=True)


def _sweep(kept: Path) -> None:
    """Remove the copies of other data sets that killed jobs of this user left."""
    for path in kept.parent.glob(f"*/{_IN_USE}"):
        if path.parent != kept:
            with suppress(FileNotFoundError):  # its user has just removed it
                _leave(path.parent, Lock(path))


@contextmanager
def _copying(folder: Path, where: str) -> Iterator[None]:
    """Let one process of the node copy at a time. The others print that they wait."""
    with Lock(folder / _COPYING) as lock:
        if not lock.take():
            print(f"waiting for another process of this node that copies {where} to {folder}", flush=True)
            lock.take(wait=True)
        yield


# --- the copy


def _copy(manifest: Manifest, files: Sequence[_File], folder: Path, show_progress: bool) -> None:
    """Copy the files that are missing or incomplete. Raises LaunchError before the first one if they do not fit."""
    for path in folder.glob(f"*{_PARTIAL}"):
        if _COPIED.fullmatch(path.name):
            path.unlink()  # from a killed process: nobody else copies here
    present = LocalStorage(folder).sizes(file.name for file in files)
    missing = [file for file in files if present[file.name] != file.bytes]
    num_bytes = sum(file.bytes for file in missing)
    free = shutil.disk_usage(folder).free
    if num_bytes > free:
        raise LaunchError(
            f"{folder.parent} has {free:,} bytes free; {manifest.where} needs {num_bytes:,} more there",
            "name another --copy-to DIR, free some space, or read without --copy-to",
        )
    storage = manifest.storage
    stream = _read_ahead(storage, [r for file in missing for r in file.ranges()])
    disable = None if show_progress and missing else True
    with tqdm(desc="copying", total=num_bytes, unit="B", unit_scale=True, disable=disable) as bar:
        for file in missing:
            _write(folder, file, islice(stream, len(file.ranges())), storage)
            bar.update(file.bytes)


def _read_ahead(storage: Storage, ranges: Sequence[Range]) -> Iterator[bytes]:
    """Yield the bytes of the ranges in order. Reads a batch while the one before it is used."""
    with ThreadPoolExecutor(1, "local-copy") as reader:
        reading: Future[list[bytes | ShardError]] = reader.submit(storage.read_ranges, [])
        for batch in [*_batches(ranges), []]:
            done, reading = reading, reader.submit(storage.read_ranges, batch)
            for data in done.result():
                if isinstance(data, ShardError):
                    raise data
                yield data


def _batches(ranges: Sequence[Range]) -> Iterator[list[Range]]:
    batch: list[Range] = []
    num_bytes = 0
    for r in ranges:
        if batch and (num_bytes + r[2] > _BATCH_BYTES or len(batch) == _BATCH_PIECES):
            yield batch
            batch, num_bytes = [], 0
        batch.append(r)
        num_bytes += r[2]
    if batch:
        yield batch


def _write(folder: Path, file: _File, pieces: Iterable[bytes], source: Storage) -> None:
    """Write one file under a temporary name, and rename it once its length and hash match the manifest."""
    partial, digest, num_bytes = folder / f"{file.name}{_PARTIAL}", hashlib.sha256(), 0
    try:
        with open(partial, "wb") as out:
            for data in pieces:
                digest.update(data)
                out.write(data)
                num_bytes += len(data)
            out.flush()
            os.fsync(out.fileno())
        if num_bytes != file.bytes:
            raise source.fault(file.name, f"has {num_bytes:,} bytes, not the {file.bytes:,} of the manifest")
        if digest.hexdigest() != file.sha256:
            raise source.fault(file.name, "does not have the SHA-256 of the manifest")
        partial.rename(folder / file.name)
    except (OSError, KfoodError):
        partial.unlink(missing_ok=True)
        raise
