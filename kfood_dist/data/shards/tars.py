"""One shard on disk: a WebDataset tar and the index beside it, written, and read back as plain tar.

    (key, JPEGs, JSON) … ──► write_tar ──► KEY.jpg, KEY.1.jpg, …, KEY.json in a tar with fixed times, owner and mode
    a finished tar       ──► members   ──► name, place and bytes of each, by tarfile alone

Where a sample lies is never computed here but read off the finished tar, so that an index cannot state what no tar
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
from kfood_dist.data.shards.sample import BLOCK, picture_suffix
from kfood_dist.system.files import flush_to_disk, write_file


@dataclass(frozen=True)
class Entry:
    """One sample to be written; `pictures` are JPEGs, `json` is the JSON's bytes, the rest goes to the index."""

    key: str
    pictures: tuple[bytes, ...]
    json: bytes
    label: int
    group: int
    tokens: int

    def members(self) -> dict[str, bytes]:
        """What lies in the tar, by its suffix, in order."""
        return {picture_suffix(i): picture for i, picture in enumerate(self.pictures)} | {"json": self.json}


@dataclass(frozen=True)
class Member:
    """One member of a tar; its header is at byte `start` of the file, and `end` is where the next one's would be."""

    name: str
    start: int
    end: int
    data: bytes


def write_tar(path: Path, entries: Iterable[Entry]) -> np.ndarray:
    """Write a new tar and return its index, shape (samples,), dtype INDEX_DTYPE.

    Raises OSError where the disk does not take the bytes or does not give them back.
    """
    # Here, not above: webdataset imports torch where there is one, which a reader of shards need not pay for.
    from webdataset import TarWriter

    rows, written = [], []
    with open(path, "xb") as file:
        with TarWriter(file, mtime=0, user="", group="", mode=0o644, encoder=False) as tar:
            for entry in entries:
                for suffix, data in entry.members().items():  # one by one: a TarWriter sorts what it is given at once
                    tar.write({"__key__": entry.key, suffix: data})
                rows.append((entry.key.encode("ascii"), 0, 0, 0, *_facts(entry)))
                written.append({f"{entry.key}.{name}": zlib.crc32(data) for name, data in entry.members().items()})
        flush_to_disk(file)
    index = np.array(rows, dtype=INDEX_DTYPE)
    _fill_places(index, written, path)
    return index


def _facts(entry: Entry) -> tuple[int, ...]:
    return entry.label, entry.group, entry.tokens, len(entry.pictures)


def _fill_places(index: np.ndarray, written: list[dict[str, int]], path: Path) -> None:
    """Take the places from the finished tar, and make sure that it holds what was meant to be in it."""
    found = members(path)
    with open(path, "rb") as file:
        for row, checksums in zip(index, written, strict=True):
            run = []
            for name, checksum in checksums.items():
                member = next(found, None)
                if member is None or member.name != name or zlib.crc32(member.data) != checksum:
                    raise OSError(0, f"reads back otherwise than written at {name}", str(path))
                run.append(member)
            row["offset"], row["size"] = run[0].start, run[-1].end - run[0].start
            file.seek(run[0].start)
            row["crc32"] = zlib.crc32(file.read(int(row["size"])))


def members(path: Path) -> Iterator[Member]:
    """The members of a tar in order; raises tarfile.TarError or OSError where it cannot be read on."""
    with tarfile.open(path, "r:") as tar:
        for info in tar:
            file = tar.extractfile(info)
            end = info.offset_data + -(-info.size // BLOCK) * BLOCK
            yield Member(info.name, info.offset, end, b"" if file is None else file.read())


def save_index(path: Path, index: np.ndarray) -> None:
    """Write an index as a .npy file without pickled parts."""
    buffer = io.BytesIO()
    np.save(buffer, index, allow_pickle=False)
    write_file(path, buffer.getvalue())
