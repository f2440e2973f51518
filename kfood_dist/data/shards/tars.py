"""One shard on disk: a WebDataset tar and the index beside it, written, and read back as plain tar.

    (key, JPEG, JSON) … ──► write_tar ──► KEY.jpg, KEY.json … in a tar with fixed times, owner and mode
    a finished tar      ──► members   ──► name, offset, size and bytes of each, by tarfile alone

Offsets are never computed here but read off the finished tar, so that an index cannot state what no tar
reader would find. The same samples always give the same bytes.
"""

import io
import tarfile
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from kfood_dist.data.shards.reader import INDEX_DTYPE
from kfood_dist.system.files import flush_to_disk, write_file


@dataclass(frozen=True)
class Entry:
    """One sample to be written; `jpeg` and `json` are the members' bytes, the rest goes to the index."""

    key: str
    jpeg: bytes
    json: bytes
    label: int
    group: int
    width: int
    height: int
    tokens: int


@dataclass(frozen=True)
class Member:
    """One member of a tar; `offset` is where its bytes begin in the file."""

    name: str
    offset: int
    data: bytes


def write_tar(path: Path, entries: Iterable[Entry]) -> np.ndarray:
    """Write a new tar and return its index, shape (samples,), dtype INDEX_DTYPE.

    Raises OSError where the disk does not take the bytes or does not give them back.
    """
    # Here, not above: webdataset imports torch where there is one, which a reader of shards need not pay for.
    from webdataset import TarWriter

    rows = []
    with open(path, "xb") as file:
        with TarWriter(file, mtime=0, user="", group="", mode=0o644, encoder=False) as tar:
            for entry in entries:
                tar.write({"__key__": entry.key, "jpg": entry.jpeg, "json": entry.json})
                rows.append(_row(entry))
        flush_to_disk(file)
    index = np.array(rows, dtype=INDEX_DTYPE)
    _fill_offsets(index, path)
    return index


def _row(entry: Entry) -> tuple:
    return (
        entry.key.encode("ascii"),
        *(0, len(entry.jpeg), zlib.crc32(entry.jpeg)),
        *(0, len(entry.json), zlib.crc32(entry.json)),
        *(entry.label, entry.group, entry.width, entry.height, entry.tokens),
    )


def _fill_offsets(index: np.ndarray, path: Path) -> None:
    """Take the offsets from the finished tar, and make sure that it holds what was meant to be in it."""
    found = members(path)
    for row in index:
        for part, suffix in (("image", "jpg"), ("json", "json")):
            member = next(found, None)
            name = f"{row['key'].decode('ascii')}.{suffix}"
            if member is None or member.name != name or zlib.crc32(member.data) != row[f"{part}_crc32"]:
                raise OSError(0, f"reads back otherwise than written at {name}", str(path))
            row[f"{part}_offset"] = member.offset


def members(path: Path) -> Iterator[Member]:
    """The members of a tar in order; raises tarfile.TarError or OSError where it cannot be read on."""
    with tarfile.open(path, "r:") as tar:
        for info in tar:
            file = tar.extractfile(info)
            yield Member(info.name, info.offset_data, b"" if file is None else file.read())


def save_index(path: Path, index: np.ndarray) -> None:
    """Write an index as a .npy file without pickled parts."""
    buffer = io.BytesIO()
    np.save(buffer, index, allow_pickle=False)
    write_file(path, buffer.getvalue())
