"""Keeps prepared pictures on disk, so that a stopped packing job continues where it stopped.

    records ──► cut into chunks ──► prepared by worker processes ──► CHUNKS/<hash>.chunk, one file each

A chunk's name is a hash of its inputs, its options and the versions of the code and libraries. If any of these
changes, the name changes. Chunks whose names still match are used again.

Always holds: a damaged or incomplete chunk is prepared again; so is a chunk with a refused file that was changed
since, for example to repair it.

    file: the JPEGs one after another, a JSON list of outcomes, its length (8 bytes), SHA-256 of all before (32 bytes)
"""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kfood_dist import __version__
from kfood_dist.pack.prepare import PictureSettings, Place, Prepared, Refusal, made_by, prepare_one
from kfood_dist.pack.sources import Record
from kfood_dist.pack.workspace import process_name
from kfood_dist.system.files import flush_to_disk

# About half a second of work. A kill loses little, and 150,000 pictures make few files.
CHUNK_RECORDS = 64

_LENGTH_BYTES, _DIGEST_BYTES = 8, 32


@dataclass(frozen=True)
class Chunk:
    """Records that are prepared together. `name` is the name of the file that holds them afterwards."""

    records: tuple[Record, ...]
    name: str


def cut(records: Sequence[Record], settings: PictureSettings) -> list[Chunk]:
    """Cut records into chunks. Each is named by a hash of everything that determines its content."""
    how = {"version": __version__, **made_by(), **vars(settings)}
    pieces = (tuple(records[start : start + CHUNK_RECORDS]) for start in range(0, len(records), CHUNK_RECORDS))
    return [Chunk(piece, f"{_fingerprint(piece, settings, how)}.chunk") for piece in pieces]


def _fingerprint(records: Sequence[Record], settings: PictureSettings, how: Mapping[str, Any]) -> str:
    inputs = [
        [[r.source, r.num_bytes, r.crc32, r.box if settings.crop_boxes else None] for r in record.pictures]
        for record in records
    ]
    text = json.dumps([how, inputs], sort_keys=True)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:32]


def prepare_chunk(chunk: Chunk, settings: PictureSettings, folder: Path) -> None:
    """Prepare a chunk's pictures and write its file with an atomic rename.

    Does nothing if a usable file already exists, for example because another packer was faster.
    Raises SourceError if the source is gone or its disk fails. Raises OSError if the disk of the chunk is full.
    """
    if load_chunk(chunk, folder) is not None:
        return
    jpegs: list[bytes] = []
    outcomes: list[Any] = []
    offset = 0
    for record in chunk.records:
        outcome = prepare_one(record, settings)
        if isinstance(outcome, Refusal):
            touched = [picture.changed_ns for picture in record.pictures]
            outcomes.append({"reason": outcome.reason, "detail": outcome.detail, "touched": touched})
            continue
        places = []
        for made in outcome:
            jpegs.append(made.jpeg)
            places.append([offset, len(made.jpeg), made.sha256, made.perceptual_hash, made.cropped])
            offset += len(made.jpeg)
        outcomes.append(places)
    footer = json.dumps(outcomes).encode("ascii")
    data = b"".join([*jpegs, footer, len(footer).to_bytes(_LENGTH_BYTES, "little")])
    temporary = folder / f".{chunk.name}.{process_name()}"
    with open(temporary, "wb") as file:
        file.write(data + hashlib.sha256(data).digest())
        flush_to_disk(file)
    os.rename(temporary, folder / chunk.name)


def load_chunk(chunk: Chunk, folder: Path) -> list[Prepared | Refusal] | None:
    """Return the outcome of each record of a chunk, in order, or None if the chunk cannot be used.

    A chunk can be used if its file exists and is undamaged, and if no refused file has changed since.
    """
    try:
        data = (folder / chunk.name).read_bytes()
    except FileNotFoundError:
        return None
    body, digest = data[:-_DIGEST_BYTES], data[-_DIGEST_BYTES:]
    if hashlib.sha256(body).digest() != digest:
        return None
    footer_bytes = int.from_bytes(body[-_LENGTH_BYTES:], "little")
    outcomes = json.loads(body[-_LENGTH_BYTES - footer_bytes : -_LENGTH_BYTES])
    pairs = list(zip(chunk.records, outcomes, strict=True))
    return [_outcome(chunk, *pair) for pair in pairs] if all(_is_current(*pair) for pair in pairs) else None


def is_there(chunk: Chunk, folder: Path) -> bool:
    """Return whether the file of a chunk exists. Only `load_chunk` checks whether it can be used."""
    return (folder / chunk.name).exists()


def _is_current(record: Record, outcome: Any) -> bool:
    """Return False if the outcome is the refusal of a file that has changed since."""
    return isinstance(outcome, list) or outcome["touched"] == [picture.changed_ns for picture in record.pictures]


def _outcome(chunk: Chunk, record: Record, outcome: Any) -> Prepared | Refusal:
    if isinstance(outcome, list):
        return Prepared(record, chunk.name, tuple(Place(*values) for values in outcome))
    return Refusal(record.source, record.label, outcome["reason"], outcome["detail"])
