"""Reading packed data sets: the manifest, the index and single samples, by offset.

    OUT/manifest.json ──► load_manifest ──► Manifest       classes, picture size, every shard's size and hash
    a split's indexes ──► open_split    ──► ShardSplit     one structured array, one row per sample
    row i             ──► read, metadata ──► JPEG bytes, JSON       one os.pread each, crc32 checked

A shard is an ordinary WebDataset tar; the index beside it says where each member's bytes begin, so nothing
here reads a tar header. Bytes whose crc32 is not the index's are never handed out. `shards/README.md` is the
contract of the format for other readers.
"""

import hashlib
import io
import json
import os
import zlib
from bisect import bisect_right
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from kfood_dist.data.labels import DishClass
from kfood_dist.data.manifest import VERSION, Manifest, ShardFile, load_manifest
from kfood_dist.errors import ShardError

# Explicit little-endian fields without padding: the same bytes on every machine.
INDEX_DTYPE = np.dtype(
    [
        ("key", "S24"),
        ("image_offset", "<u8"),
        ("image_size", "<u4"),
        ("image_crc32", "<u4"),
        ("json_offset", "<u8"),
        ("json_size", "<u4"),
        ("json_crc32", "<u4"),
        ("label", "<u2"),
        ("group", "<u8"),
        ("width", "<u2"),
        ("height", "<u2"),
        ("tokens", "<u2"),
    ]
)

# A process may usually have 1,024 open files; a large data set has more shards than that.
_MAX_OPEN_SHARDS = 256


def open_split(folder: Path, split: str) -> "ShardSplit":
    """Open one split of a packed folder: reads its indexes, and no picture yet.

    Raises ShardError as `load_manifest` does; when the split is unknown or empty; and when a tar or an index
    is missing, has not the manifest's size, or the index is not the one the manifest was written with.
    """
    manifest = load_manifest(folder)
    shards = manifest.shards_of(split)
    if split not in manifest.splits:
        raise ShardError(
            f"{folder} has no samples in split {split!r}",
            f"choose one of: {', '.join(manifest.splits) or '(none)'}; or pack again with another --split",
        )
    for shard in shards:
        _require_size(manifest.folder / shard.path, shard.bytes)
    index = np.concatenate([load_index(manifest, shard) for shard in shards])
    return ShardSplit(manifest, split, shards, index)


def load_index(manifest: Manifest, shard: ShardFile) -> np.ndarray:
    """The index of one shard, shape (samples,), dtype INDEX_DTYPE.

    Raises ShardError when it is missing, damaged, or not the one the manifest was written with.
    """
    path = manifest.folder / shard.index_path
    _require_size(path, shard.index_bytes)
    data = path.read_bytes()
    if hashlib.sha256(data).hexdigest() != shard.index_sha256:
        raise _damaged(path, "is not the index that the manifest was written with")
    try:
        index = np.load(io.BytesIO(data), allow_pickle=False)
    except (ValueError, EOFError, OSError, SyntaxError) as error:
        raise _damaged(path, f"is not a numpy array ({error})") from None
    if not isinstance(index, np.ndarray) or index.dtype != INDEX_DTYPE or index.shape != (shard.samples,):
        raise _damaged(path, f"does not hold {shard.samples} rows of the index format {VERSION}")
    if len(index) and int(index["label"].max()) >= len(manifest.classes):
        raise _damaged(path, f"names a class beyond the manifest's {len(manifest.classes)}")
    return index


def _require_size(path: Path, expected: int) -> None:
    try:
        size = path.stat().st_size
    except OSError as error:
        raise _damaged(path, f"cannot be opened ({error.strerror})") from None
    if size != expected:
        raise _damaged(path, f"has {size:,} bytes, not the {expected:,} of the manifest")


def _damaged(path: Path, fault: str) -> ShardError:
    return ShardError(f"{path} {fault}", f"list every fault with `kfood verify {path.parent}`, or pack again")


class ShardSplit:
    """Random access to one split's samples.

    Files are opened when first read, anew in each process, so an object may be forked or pickled; threads of
    one process should not share it.
    """

    def __init__(self, manifest: Manifest, split: str, shards: tuple[ShardFile, ...], index: np.ndarray):
        self.manifest = manifest
        self.split = split
        self.classes = manifest.classes
        self.index = index
        hashes = "".join(s.index_sha256 for s in shards)
        self.index_hash = hashlib.sha256(hashes.encode("ascii")).hexdigest()
        self._paths = [manifest.folder / s.path for s in shards]
        self._starts = [0, *np.cumsum([s.samples for s in shards]).tolist()][:-1]
        self._descriptors: dict[int, int] = {}
        self._owner_pid = os.getpid()

    def __reduce__(self) -> tuple[Callable[[Path, str], "ShardSplit"], tuple[Path, str]]:
        # The copy reads the indexes itself: cheaper than sending them, and no descriptor crosses processes.
        return open_split, (self.manifest.folder.resolve(), self.split)

    def __len__(self) -> int:
        return len(self.index)

    def key(self, i: int) -> str:
        """The sample's WebDataset key, such as `train-00000042`."""
        return bytes(self.index["key"][i]).decode("ascii")

    def label(self, i: int) -> DishClass:
        """The class of sample i."""
        return self.classes[int(self.index["label"][i])]

    def read(self, i: int) -> bytes:
        """The JPEG bytes of sample i; raises ShardError naming shard and key unless they are those packed."""
        return self._read_part(i, "image")

    def read_many(self, ids: Sequence[int]) -> list[bytes | ShardError]:
        """The JPEG bytes of each sample, or what is wrong with it."""
        found: list[bytes | ShardError] = []
        for i in ids:
            try:
                found.append(self.read(i))
            except ShardError as error:
                found.append(error)
        return found

    def metadata(self, i: int) -> dict[str, Any]:
        """The sample's JSON: `label, category, source, width, height, group`; raises as `read` does."""
        return json.loads(self._read_part(i, "json"))

    def close(self) -> None:
        """Close the files of this process; a later read opens them again."""
        for descriptor in self._descriptors.values():
            os.close(descriptor)
        self._descriptors.clear()

    def _read_part(self, i: int, part: str) -> bytes:
        row = self.index[i]
        shard = bisect_right(self._starts, i % len(self)) - 1
        offset, size = int(row[f"{part}_offset"]), int(row[f"{part}_size"])
        try:
            data = os.pread(self._descriptor(shard), size, offset)
        except OSError as error:
            raise _damaged(self._paths[shard], f"cannot be read at {self.key(i)} ({error.strerror})") from None
        if len(data) != size:
            raise _damaged(self._paths[shard], f"ends inside {self.key(i)}")
        if zlib.crc32(data) != int(row[f"{part}_crc32"]):
            raise _damaged(self._paths[shard], f"has wrong bytes at {self.key(i)} ({part}: crc32 differs)")
        return data

    def _descriptor(self, shard: int) -> int:
        if self._owner_pid != os.getpid():
            # After a fork these are copies inherited from the parent; closing them leaves the parent's alone.
            self.close()
            self._owner_pid = os.getpid()
        if shard not in self._descriptors:
            if len(self._descriptors) >= _MAX_OPEN_SHARDS:
                os.close(self._descriptors.pop(next(iter(self._descriptors))))
            self._descriptors[shard] = os.open(self._paths[shard], os.O_RDONLY)
        return self._descriptors[shard]
