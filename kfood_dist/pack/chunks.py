"""Prepared pictures on disk, so that a packing that was stopped goes on where it was.

    records ──► cut into chunks ──► prepared by worker processes ──► CHUNKS/<hash>.chunk, one file each

A chunk's name says what it was made from, how and by what: a picture, an option or a version that differs gives
another name, and what still fits is used again. Always holds: a chunk that is there is whole, or it is prepared anew;
so is one that refused a file which was touched since, by whoever mended it.

    file: the JPEGs end to end, a JSON list of outcomes, its length (8 bytes), SHA-256 of all that (32 bytes)
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

# About half a second of work: little is lost by a kill, and few files are made of 150,000 pictures.
CHUNK_RECORDS = 64

_LENGTH_BYTES, _DIGEST_BYTES = 8, 32


@dataclass(frozen=True)
class Chunk:
    """Some records that are prepared together; `name` is the file they lie in afterwards."""

    records: tuple[Record, ...]
    name: str


def cut(records: Sequence[Record], settings: PictureSettings) -> list[Chunk]:
    """Cut records into chunks, named by what decides about their content."""
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
    """Prepare a chunk's pictures and write its file whole or not at all; does nothing if another packer was quicker.

    Raises SourceError when the source is gone or its disk fails, OSError when the chunk's own disk is full.
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
    """What became of each record of a chunk, in order.

    None unless the chunk's file is there and whole, and what it refused has not been touched since.
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
    return [_outcome(chunk, *pair) for pair in pairs] if all(_holds(*pair) for pair in pairs) else None


def is_there(chunk: Chunk, folder: Path) -> bool:
    """Whether a chunk's file is there; `load_chunk` tells whether it can be used."""
    return (folder / chunk.name).exists()


def _holds(record: Record, outcome: Any) -> bool:
    """False for the refusal of a file that was touched since."""
    return isinstance(outcome, list) or outcome["touched"] == [picture.changed_ns for picture in record.pictures]


def _outcome(chunk: Chunk, record: Record, outcome: Any) -> Prepared | Refusal:
    if isinstance(outcome, list):
        return Prepared(record, chunk.name, tuple(Place(*values) for values in outcome))
    return Refusal(record.source, record.label, outcome["reason"], outcome["detail"])
