"""Reading packed data sets: samples by offset, the indexes as they are needed.

    manifest    ──► open_split ──► ShardSplit   how many samples each shard has; no other file is touched yet
    ids         ──► shards ──► their indexes    loaded and checked when first needed, the latest used kept
    index rows  ──► byte ranges ──► Storage, several in flight ──► crc32 ──► Sample: JPEG bytes, columns

A shard is an ordinary WebDataset tar; the index beside it says where each sample's members lie, one run of bytes.
Bytes whose crc32 is not the index's are never handed out, and one bad sample does not lose the others.
`shards/README.md` is the contract of the format for other readers.
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
from kfood_dist.data.storage.base import Range, Storage, spans
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

# Reading ahead is only advice, and coarse: long runs matter more than the bytes between.
_AHEAD_GAP_BYTES = 256 << 10
# Indexes that a process keeps: of some 1,900 shards of 2,000 samples.
_KEPT_INDEX_BYTES = 256 << 20
# Indexes that are read together where all are wanted.
_INDEXES_AT_ONCE = 64
# The label of a sample in a data set without classes.
NO_LABEL = 2**16 - 1


# One sample: where its bytes lie, their crc32, its key, and how many pictures it has.
_Run = tuple[Range, int, bytes, int]


def open_split(where: str | Path | Storage, split: str) -> "ShardSplit":
    """Open one split of a packed data set: reads its manifest only, however many shards there are.

    Raises ShardError as `load_manifest` does, and when the split is unknown or empty. Whether the shards are
    there is told by `ShardSplit.require_files`, or by the first read.
    """
    manifest = load_manifest(where)
    if split not in manifest.splits:
        raise ShardError(
            f"{manifest.where} has no samples in split {split!r}",
            f"choose one of: {', '.join(manifest.splits) or '(none)'}; or pack again with another --split",
        )
    return ShardSplit(manifest, split)


def load_index(manifest: Manifest, shard: ShardFile) -> np.ndarray:
    """The index of one shard, shape (samples,), dtype INDEX_DTYPE.

    Raises ShardError when it is missing, damaged, or not the one the manifest was written with.
    """
    size = manifest.storage.size(shard.index_path)
    if size != shard.index_bytes:
        raise _wrong_size(manifest.storage, shard.index_path, size, shard.index_bytes)
    index = _parse_index(manifest, shard, manifest.storage.read(shard.index_path))
    if isinstance(index, ShardError):
        raise index
    return index


def _npy_header(num_rows: int) -> bytes:
    """The first bytes of an index of so many rows, as np.save writes them."""
    out = io.BytesIO()
    descr = np.lib.format.dtype_to_descr(INDEX_DTYPE)
    np.lib.format.write_array_header_1_0(out, {"descr": descr, "fortran_order": False, "shape": (num_rows,)})
    return out.getvalue()


def _parse_index(manifest: Manifest, shard: ShardFile, data: bytes | ShardError) -> np.ndarray | ShardError:
    """What `load_index` gives, or would raise; a fault of the reading is passed on."""
    if isinstance(data, ShardError):
        return data

    def fault(what: str) -> ShardError:
        return manifest.storage.fault(shard.index_path, what)

    if hashlib.sha256(data).hexdigest() != shard.index_sha256:
        return fault("is not the index that the manifest was written with")
    # Not np.load: threads read indexes side by side, and Python 3.11's parser of literals, which it reads the header
    # by, fails now and then when two threads are in it (cpython gh-106905).
    header = _npy_header(shard.samples)
    if not data.startswith(header) or len(data) != len(header) + shard.samples * INDEX_DTYPE.itemsize:
        return fault(f"does not hold {shard.samples} rows of the index format {VERSION}")
    index = np.frombuffer(data, INDEX_DTYPE, offset=len(header))
    labels = index["label"]
    if np.any((labels >= len(manifest.classes)) & ((labels != NO_LABEL) | (len(manifest.classes) > 0))):
        return fault(f"names a class beyond the manifest's {len(manifest.classes)}")
    if not index["key"].tobytes().isascii():
        return fault("has a key that is not ASCII")
    offset, size = index["offset"], index["size"]
    if np.any((offset > shard.bytes) | (size > shard.bytes - np.minimum(offset, shard.bytes))):
        return fault(f"leads beyond the end of {shard.path}")
    return index


def _wrong_size(storage: Storage, name: str, size: int, expected: int) -> ShardError:
    return storage.fault(name, f"has {size:,} bytes, not the {expected:,} of the manifest")


class ShardSplit:
    """Random access to one split's samples, by their position in the split's shards, from 0.

    Files are opened when first read, anew in each process, so an object may be forked or pickled; threads of
    one process should not share it.
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
        # The copy reads the manifest itself: cheaper than sending it, and no descriptor crosses processes.
        return open_split, (self.manifest.storage, self.split)

    def __len__(self) -> int:
        return self._length

    def key(self, i: int) -> str:
        """The sample's WebDataset key. No file is read for it: a sample whose index is damaged has a name too."""
        return sample_key(self.split, range(self._length)[i])

    def read(self, i: int) -> Sample:
        """Sample i; raises ShardError naming shard and key unless its bytes are those packed."""
        return _raised(self.read_many([i])[0])

    def read_many(self, ids: Iterable[int]) -> list[Sample | ShardError]:
        """Each sample in the order of `ids`, or the ShardError that `read` would raise for it."""
        runs = self._runs(ids)
        read = iter(self.manifest.storage.read_ranges([run[0] for run in runs if not isinstance(run, ShardError)]))
        return [run if isinstance(run, ShardError) else self._sample(run, next(read)) for run in runs]

    def rows(self, ids: Iterable[int]) -> np.ndarray:
        """The index rows of some samples in the order of `ids`, shape (len(ids),), dtype INDEX_DTYPE.

        Raises ShardError when the index of one of their shards is missing or damaged.
        """
        places = [self._place(i) for i in ids]
        rows = np.empty(len(places), INDEX_DTYPE)
        by_shard: dict[int, list[tuple[int, int]]] = {}
        for n, (shard, row) in enumerate(places):
            by_shard.setdefault(shard, []).append((n, row))
        for shard, index in self._indexes_of(sorted(by_shard)):
            found = np.array(by_shard[shard])
            rows[found[:, 0]] = _raised(index)[found[:, 1]]
        return rows

    def labels(self) -> np.ndarray:
        """The class id of every sample, shape (samples,), uint16. Reads every index, which takes a while.

        Raises ShardError as `rows` does.
        """
        parts = [_raised(index)["label"].astype(np.uint16) for _, index in self._indexes_of(range(len(self._shards)))]
        return np.concatenate(parts)

    @cached_property
    def index(self) -> np.ndarray:
        """The rows of all samples, shape (samples,): for small sets; a hundred million take 7 GB."""
        return np.concatenate([_raised(index) for _, index in self._indexes_of(range(len(self._shards)))])

    def will_need(self, ids: Iterable[int]) -> None:
        """Tell the kernel which samples will soon be read, so that it reads them ahead; nothing for a URL."""
        if self.manifest.storage.is_local:
            ranges = [run[0] for run in self._runs(ids) if not isinstance(run, ShardError)]
            self.manifest.storage.will_need([span for span, _ in spans(ranges, _AHEAD_GAP_BYTES)])

    def require_files(self) -> None:
        """Raise ShardError unless every tar and every index of the split is there and of the manifest's size."""
        storage = self.manifest.storage
        expected = {shard.path: shard.bytes for shard in self._shards}
        expected |= {shard.index_path: shard.index_bytes for shard in self._shards}
        for name, size in storage.sizes(expected).items():
            if _raised(size) != expected[name]:
                raise _wrong_size(storage, name, _raised(size), expected[name])

    def close(self) -> None:
        """Close the files of this process; a later read opens them again."""
        self.manifest.storage.close()

    def _place(self, i: int) -> tuple[int, int]:
        """The shard of sample i, and its row there; a negative i counts from the end."""
        i = as_integer(i)
        if not -self._length <= i < self._length:
            raise IndexError(f"sample {i} of {self._length}")
        i %= self._length
        shard = bisect_right(self._starts, i) - 1
        return shard, i - self._starts[shard]

    def _indexes_of(self, shards: Sequence[int]) -> Iterator[tuple[int, np.ndarray | ShardError]]:
        """The index of each shard, or what is wrong with it; those not kept are read some at a time."""
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
        """Keep an index for the next sample, and let the oldest go where they take too much memory."""
        if isinstance(index, np.ndarray):
            self._indexes[shard] = index
            self._kept_bytes += index.nbytes
            while self._kept_bytes > _KEPT_INDEX_BYTES and len(self._indexes) > 1:
                self._kept_bytes -= self._indexes.popitem(last=False)[1].nbytes
        return index

    def _runs(self, ids: Iterable[int]) -> list[_Run | ShardError]:
        """Where each sample lies, or what is wrong with the index that would say so."""
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
        """The sample of these bytes, or what is wrong with them."""
        (name, _, size), crc32, key, num_images = run
        if isinstance(data, ShardError):
            return data
        said = key.decode("ascii", errors="replace")
        if len(data) != size:
            return self.manifest.storage.fault(name, f"ends inside {said}")
        if zlib.crc32(data) != crc32:
            return self.manifest.storage.fault(name, f"has wrong bytes at {said} (crc32 differs)")
        try:
            sample = cut(said, data)
            if len(sample.pictures) != num_images:
                raise ValueError(f"{len(sample.pictures)} pictures, and its index says {num_images}")
            for column in self.manifest.columns:
                if not isinstance(sample.columns.get(column), str):
                    raise ValueError(f"its {column} is no text")
        except (ValueError, RecursionError) as error:
            return self.manifest.storage.fault(name, f"has no whole sample at {said} ({error})")
        return sample


def _raised(value: Any) -> Any:
    """The value, or raise it if it is the error in a value's place."""
    if isinstance(value, ShardError):
        raise value
    return value
