"""One sample of a shard: one contiguous run of its tar, cut into pictures and columns in memory.

KEY.jpg, KEY.1.jpg, … , KEY.json with their tar headers ──► cut ──► Sample
"""

import json
from collections.abc import Iterator
from typing import Any, NamedTuple

BLOCK = 512  # of a tar, in bytes


class Sample(NamedTuple):
    """The JPEG bytes of a sample's pictures, in order, and its JSON."""

    pictures: tuple[bytes, ...]
    columns: dict[str, Any]


def sample_key(split: str, number: int) -> str:
    """The WebDataset key of a split's sample, such as `train-00000042`: they count through its shards, from 0."""
    return f"{split}-{number:08d}"


def picture_suffix(number: int) -> str:
    """What a sample's picture is called after its key: `jpg`, then `1.jpg`, `2.jpg`, …"""
    return f"{number}.jpg" if number else "jpg"


def cut(key: str, run: bytes) -> Sample:
    """A sample from the bytes of its run. Raises ValueError for bytes that are no such run."""
    members = dict(_members(run))
    number = 0
    pictures = []
    while (picture := members.pop(f"{key}.{picture_suffix(number)}", None)) is not None:
        pictures.append(picture)
        number += 1
    if list(members) != [f"{key}.json"]:
        raise ValueError(f"its members are not those of {key}")
    columns = json.loads(members[f"{key}.json"])
    if not isinstance(columns, dict):
        raise ValueError("its JSON is no object")
    return Sample(tuple(pictures), columns)


def _members(run: bytes) -> Iterator[tuple[str, bytes]]:
    """Name and bytes of each member; of its header, the name and the octal size alone (POSIX ustar).

    tarfile would take a tenth of a sample's time. The run's crc32 covers the headers, and members are smaller than the
    8 GiB beyond which a size is written otherwise.
    """
    at = 0
    while at < len(run):
        try:
            name, size = run[at : at + 100].partition(b"\0")[0], int(run[at + 124 : at + 135], 8)
        except ValueError:
            raise ValueError(f"no tar header at byte {at}") from None
        if size < 0:  # or this would never end
            raise ValueError(f"no tar header at byte {at} (negative size)")
        at += BLOCK
        yield name.decode("utf-8"), run[at : at + size]
        at += -(-size // BLOCK) * BLOCK
