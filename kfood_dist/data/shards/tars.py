"""One shard on disk: write a WebDataset tar and the index beside it, and read the tar back as a plain tar.

    (key, JPEGs, JSON) … ──► write_tar ──► KEY.jpg, KEY.1.jpg, …, KEY.json in a tar with fixed times, owner and mode
    a finished tar       ──► members   ──► name, place and bytes of each, read with tarfile only

The place of a sample is never computed here. It is read from the finished tar, so an index states only what any tar
reader finds. The same samples always give the same bytes.
"""

import io
import tarfile
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from kfood_dist.data.shards.reader import INDEX_DTYPE
from kfood_dist.data.shards.sample import BLOCK, picture_suffix
from kfood_dist.system.files import flush_to_disk, write_file


@dataclass(frozen=True)
class Entry:
    """One sample to write. `pictures` are JPEGs, `json` is the JSON's bytes, and the other fields go to the index."""

    key: str
    pictures: tuple[bytes, ...]
    json: bytes
    label: int
    group: int
    tokens: int

    def members(self) -> dict[str, bytes]:
        """Return the bytes of each member by the member's suffix, in the order of the tar."""
        return {picture_suffix(i): picture for i, picture in enumerate(self.pictures)} | {"json": self.json}


@dataclass(frozen=True)
class Member:
    """One member of a tar. Its header is at byte `start` of the file. The next header would be at byte `end`."""

    name: str
    start: int
    end: int
    data: bytes


def write_tar(path: Path, entries: Iterable[Entry]) -> np.ndarray:
    """Write a new tar and return its index, shape (samples,), dtype INDEX_DTYPE.

    Raises OSError if the disk does not store the bytes, or if they do not read back as written.
    """
    # Imported here, because webdataset imports torch if it is installed. A reader of shards does not need that.
    from webdataset import TarWriter

    rows, written = [], []
    with open(path, "xb") as file:
        with TarWriter(file, mtime=0, user="", group="", mode=0o644, encoder=False) as tar:
            for entry in entries:
                # One member at a time, because a TarWriter sorts the members that it gets in one call.
                for suffix, data in entry.members().items():
                    tar.write({"__key__": entry.key, suffix: data})
                rows.append((entry.key.encode("ascii"), 0, 0, 0, *_facts(entry)))
                written.append({f"{entry.key}.{name}": zlib.crc32(data) for name, data in entry.members().items()})
        flush_to_disk(file)
    index = np.array(rows, dtype=INDEX_DTYPE)
    _fill_offsets(index, written, path)
    return index


def _facts(entry: Entry) -> tuple[int, ...]:
    return entry.label, entry.group, entry.tokens, len(entry.pictures)


def _fill_offsets(index: np.ndarray, written: list[dict[str, int]], path: Path) -> None:
    """Fill in the places from the finished tar. Raises OSError if the tar does not hold what was written."""
    found = members(path)
    with open(path, "rb") as file:
        for row, checksums in zip(index, written, strict=True):
            run = []
            for name, checksum in checksums.items():
                member = next(found, None)
                if member is None or member.name != name or zlib.crc32(member.data) != checksum:
                    raise OSError(0, f"does not read back as written at {name}", str(path))
                run.append(member)
            row["offset"], row["size"] = run[0].start, run[-1].end - run[0].start
            file.seek(run[0].start)
            row["crc32"] = zlib.crc32(file.read(int(row["size"])))


def members(path: Path) -> Iterator[Member]:
    """Yield the members of a tar in order. Raises tarfile.TarError or OSError when it cannot be read further."""
    with tarfile.open(path, "r:") as tar:
        for info in tar:
            file = tar.extractfile(info)
            end = info.offset_data + -(-info.size // BLOCK) * BLOCK
            yield Member(info.name, info.offset, end, b"" if file is None else file.read())


def save_index(path: Path, index: np.ndarray) -> None:
    """Write an index as a .npy file without pickled objects."""
    buffer = io.BytesIO()
    np.save(buffer, index, allow_pickle=False)
    write_file(path, buffer.getvalue())
