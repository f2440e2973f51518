"""Read the samples of a packed data set by their byte offsets. Each index is loaded when it is first needed.

    manifest    ──► open_split ──► ShardSplit   how many samples each shard has; no other file is opened yet
    ids         ──► shards ──► their indexes    loaded and checked when first needed; those used last are kept
    index rows  ──► byte ranges ──► Storage, several in flight ──► crc32 ──► Sample: JPEG bytes, columns

A shard is an ordinary WebDataset tar. The index beside it says where the members of each sample are: one contiguous
run of bytes. Bytes whose crc32 differs from the index are never returned. One damaged sample does not stop the others
from being read. `shards/README.md` specifies the format for other readers.
"""

import hashlib
import io
import zlib
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property
from operator import index as as_integer
from pathlib import Path
from typing import Any

import numpy as np

from kfood_dist.data.shards.manifest import VERSION, Manifest, ShardFile, load_manifest
from kfood_dist.data.shards.sample import Sample, cut, sample_key
from kfood_dist.data.storage.base import Range, Storage, merge_ranges
from kfood_dist.errors import ShardError

# Explicit little-endian fields without padding: the same bytes on every machine.
INDEX_DTYPE = np.dtype(
    [
        ("key", "S24"),
        ("offset", "<u8"),
        ("size", "<u4"),
        ("crc32", "<u4"),
        ("label", "<u2"),
        ("group", "<u8"),
        ("tokens", "<u4"),
        ("num_images", "<u2"),
    ]
)

# Reading ahead is only a rough hint to the kernel. Long runs matter more than the unneeded bytes between ranges.
_AHEAD_GAP_BYTES = 256 << 10
# The limit of the indexes that a process keeps: those of about 2,400 shards of 2,000 samples.
_KEPT_INDEX_BYTES = 256 << 20
# The largest number of indexes that are read together.
_INDEXES_AT_ONCE = 64
# The label of a sample in a data set without classes.
NO_LABEL = 2**16 - 1


# One sample: where its bytes are, their crc32, its key, and how many pictures it has.
_Run = tuple[Range, int, bytes, int]


def open_split(where: str | Path | Storage, split: str) -> "ShardSplit":
    """Open one split of a packed data set. Reads only its manifest, however many shards there are.

    Raises ShardError if `load_manifest` does, or if the split is unknown or empty. It does not check that the shards
    exist: `ShardSplit.require_files` does, or the first read.
    """
    manifest = load_manifest(where)
    if split not in manifest.splits:
        raise ShardError(
            f"{manifest.where} has no samples in split {split!r}",
            f"choose one of: {', '.join(manifest.splits) or '(none)'}; or pack again with another --split",
        )
    return ShardSplit(manifest, split)


def load_index(manifest: Manifest, shard: ShardFile) -> np.ndarray:
    """Return the index of one shard, shape (samples,), dtype INDEX_DTYPE.

    Raises ShardError if it is missing, damaged, or not the one that the manifest was written with.
    """
    size = manifest.storage.size(shard.index_path)
    if size != shard.index_bytes:
        raise _wrong_size(manifest.storage, shard.index_path, size, shard.index_bytes)
    index = _parse_index(manifest, shard, manifest.storage.read(shard.index_path))
    if isinstance(index, ShardError):
        raise index
    return index


def _npy_header(num_rows: int) -> bytes:
    """Return the first bytes of an index of `num_rows` rows, as np.save writes them."""
    out = io.BytesIO()
    descr = np.lib.format.dtype_to_descr(INDEX_DTYPE)
    np.lib.format.write_array_header_1_0(out, {"descr": descr, "fortran_order": False, "shape": (num_rows,)})
    return out.getvalue()


def _parse_index(manifest: Manifest, shard: ShardFile, data: bytes | ShardError) -> np.ndarray | ShardError:
    """Return the index in `data`, or a ShardError if it is damaged. If `data` is an error, returns it."""
    if isinstance(data, ShardError):
        return data

    def fault(what: str) -> ShardError:
        return manifest.storage.fault(shard.index_path, what)

    if hashlib.sha256(data).hexdigest() != shard.index_sha256:
        return fault("is not the index that the manifest was written with")
    # np.load is not used: several threads read indexes at once, and np.load parses the header with Python's parser of
    # literals. In Python 3.11 that parser sometimes fails when two threads use it at once (cpython gh-106905).
    header = _npy_header(shard.samples)
    if not data.startswith(header) or len(data) != len(header) + shard.samples * INDEX_DTYPE.itemsize:
        return fault(f"does not hold {shard.samples} rows of the index format {VERSION}")
    index = np.frombuffer(data, INDEX_DTYPE, offset=len(header))
    labels = index["label"]
    if np.any((labels >= len(manifest.classes)) & ((labels != NO_LABEL) | (len(manifest.classes) > 0))):
        return fault(f"has a class id beyond the manifest's class count ({len(manifest.classes)})")
    if not index["key"].tobytes().isascii():
        return fault("has a key that is not ASCII")
    offset, size = index["offset"], index["size"]
    if np.any((offset > shard.bytes) | (size > shard.bytes - np.minimum(offset, shard.bytes))):
        return fault(f"points beyond the end of {shard.path}")
    return index


def _wrong_size(storage: Storage, name: str, size: int, expected: int) -> ShardError:
    return storage.fault(name, f"has {size:,} bytes, not the {expected:,} of the manifest")


class ShardSplit:
    """Random access to one split's samples, by their position in the split's shards, from 0.

    Each process opens a file when it first reads it, so an object may be forked or pickled. Threads of one process
    should not share an object.
    """

    def __init__(self, manifest: Manifest, split: str):
        self.manifest = manifest
        self.split = split
        self.classes = manifest.classes
        self._shards = manifest.shards_of(split)
        self._paths = [shard.path for shard in self._shards]
        ends = np.cumsum([shard.samples for shard in self._shards], dtype=np.int64)
        self._starts: list[int] = [0, *ends.tolist()][:-1]
        self._length = int(ends[-1]) if len(ends) else 0
        self._indexes: OrderedDict[int, np.ndarray] = OrderedDict()
        self._kept_bytes = 0
        hashes = "".join(shard.index_sha256 for shard in self._shards)
        self.index_hash = hashlib.sha256(hashes.encode("utf-8")).hexdigest()

    def __reduce__(self) -> tuple[Callable[..., "ShardSplit"], tuple[Storage, str]]:
        # The copy reads the manifest itself. That is cheaper than sending it, and no descriptor crosses processes.
        return open_split, (self.manifest.storage, self.split)

    def __len__(self) -> int:
        return self._length

    def key(self, i: int) -> str:
        """Return the sample's WebDataset key. Reads no file, so a sample whose index is damaged has a key too."""
        return sample_key(self.split, range(self._length)[i])

    def read(self, i: int) -> Sample:
        """Return sample i. Raises ShardError if its bytes cannot be read or are not those that were packed.

        The error names the file. If the sample itself is damaged, the error also names its key.
        """
        return _value_or_raise(self.read_many([i])[0])

    def read_many(self, ids: Iterable[int]) -> list[Sample | ShardError]:
        """Return each sample in the order of `ids`, or the ShardError that `read` would raise for it."""
        runs = self._runs(ids)
        read = iter(self.manifest.storage.read_ranges([run[0] for run in runs if not isinstance(run, ShardError)]))
        return [run if isinstance(run, ShardError) else self._sample(run, next(read)) for run in runs]

    def rows(self, ids: Iterable[int]) -> np.ndarray:
        """Return the index rows of some samples in the order of `ids`, shape (len(ids),), dtype INDEX_DTYPE.

        Raises ShardError if the index of one of their shards is missing or damaged.
        """
        places = [self._place(i) for i in ids]
        rows = np.empty(len(places), INDEX_DTYPE)
        by_shard: dict[int, list[tuple[int, int]]] = {}
        for n, (shard, row) in enumerate(places):
            by_shard.setdefault(shard, []).append((n, row))
        for shard, index in self._indexes_of(sorted(by_shard)):
            found = np.array(by_shard[shard])
            rows[found[:, 0]] = _value_or_raise(index)[found[:, 1]]
        return rows

    def labels(self) -> np.ndarray:
        """Return the class id of every sample, shape (samples,), uint16. Reads every index, which takes a while.

        Raises ShardError if an index is missing or damaged.
        """
        parts = [
            _value_or_raise(index)["label"].astype(np.uint16) for _, index in self._indexes_of(range(len(self._shards)))
        ]
        return np.concatenate(parts)

    @cached_property
    def index(self) -> np.ndarray:
        """The index rows of all samples, shape (samples,). For small sets: a hundred million rows take 5.6 GB."""
        return np.concatenate([_value_or_raise(index) for _, index in self._indexes_of(range(len(self._shards)))])

    def will_need(self, ids: Iterable[int]) -> None:
        """Tell the kernel which samples will soon be read, so that it reads them ahead. Does nothing for a URL."""
        if self.manifest.storage.is_local:
            ranges = [run[0] for run in self._runs(ids) if not isinstance(run, ShardError)]
            self.manifest.storage.will_need([span for span, _ in merge_ranges(ranges, _AHEAD_GAP_BYTES)])

    def require_files(self) -> None:
        """Raise ShardError unless every tar and index of the split exists and has the size that the manifest states."""
        storage = self.manifest.storage
        expected = {shard.path: shard.bytes for shard in self._shards}
        expected |= {shard.index_path: shard.index_bytes for shard in self._shards}
        for name, size in storage.sizes(expected).items():
            if _value_or_raise(size) != expected[name]:
                raise _wrong_size(storage, name, _value_or_raise(size), expected[name])

    def close(self) -> None:
        """Close the files that this process has open. A later read opens them again."""
        self.manifest.storage.close()

    def _place(self, i: int) -> tuple[int, int]:
        """Return the shard of sample i and its row there. A negative i counts from the end."""
        i = as_integer(i)
        if not -self._length <= i < self._length:
            raise IndexError(f"sample {i} of {self._length} does not exist")
        i %= self._length
        shard = bisect_right(self._starts, i) - 1
        return shard, i - self._starts[shard]

    def _indexes_of(self, shards: Sequence[int]) -> Iterator[tuple[int, np.ndarray | ShardError]]:
        """Yield each shard with its index, or with what is wrong with it. Reads indexes not in memory in batches."""
        for start in range(0, len(shards), _INDEXES_AT_ONCE):
            batch = shards[start : start + _INDEXES_AT_ONCE]
            found: dict[int, np.ndarray | ShardError] = {}
            for s in batch:
                if s in self._indexes:
                    self._indexes.move_to_end(s)
                    found[s] = self._indexes[s]
            missing = [s for s in batch if s not in found]
            if missing:
                found |= self._load_indexes(missing)
            yield from ((s, found[s]) for s in batch)

    def _load_indexes(self, shards: Sequence[int]) -> dict[int, np.ndarray | ShardError]:
        files = [self._shards[s] for s in shards]
        read = self.manifest.storage.read_ranges([(f.index_path, 0, f.index_bytes) for f in files])
        return {
            s: self._keep(s, _parse_index(self.manifest, file, data))
            for s, file, data in zip(shards, files, read, strict=True)
        }

    def _keep(self, shard: int, index: np.ndarray | ShardError) -> np.ndarray | ShardError:
        """Keep an index for the next samples. If the kept ones take too much memory, drops the least recently used."""
        if isinstance(index, np.ndarray):
            self._indexes[shard] = index
            self._kept_bytes += index.nbytes
            while self._kept_bytes > _KEPT_INDEX_BYTES and len(self._indexes) > 1:
                self._kept_bytes -= self._indexes.popitem(last=False)[1].nbytes
        return index

    def _runs(self, ids: Iterable[int]) -> list[_Run | ShardError]:
        """Return where the bytes of each sample are, or what is wrong with the index that states it."""
        places = [self._place(i) for i in ids]
        indexes = dict(self._indexes_of(list({shard for shard, _ in places})))
        found: list[_Run | ShardError] = []
        for shard, row in places:
            index = indexes[shard]
            if isinstance(index, ShardError):
                found.append(index)
            else:
                key, offset, size, crc32, *_, num_images = index.item(row)
                found.append(((self._paths[shard], offset, size), crc32, key, num_images))
        return found

    def _sample(self, run: _Run, data: bytes | ShardError) -> Sample | ShardError:
        """Return the sample in these bytes, or what is wrong with them."""
        (name, _, size), crc32, key, num_images = run
        if isinstance(data, ShardError):
            return data
        key_text = key.decode("ascii", errors="replace")
        if len(data) != size:
            return self.manifest.storage.fault(name, f"ends inside {key_text}")
        if zlib.crc32(data) != crc32:
            return self.manifest.storage.fault(name, f"has wrong bytes at {key_text} (crc32 differs)")
        try:
            sample = cut(key_text, data)
            if len(sample.pictures) != num_images:
                raise ValueError(f"{len(sample.pictures)} pictures, but its index says {num_images}")
            for column in self.manifest.columns:
                if not isinstance(sample.columns.get(column), str):
                    raise ValueError(f"its {column} is not text")
        except (ValueError, RecursionError) as error:
            return self.manifest.storage.fault(name, f"has no valid sample at {key_text} ({error})")
        return sample


def _value_or_raise(value: Any) -> Any:
    """Return the value, or raise it if it is an error in place of a value."""
    if isinstance(value, ShardError):
        raise value
    return value
