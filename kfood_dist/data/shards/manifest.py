"""The manifest of a packed data set: its classes, its shards, and the size and hash of each.

    OUT/manifest.json ──► load_manifest ──► Manifest

`shards/README.md` specifies the format for other readers.
"""

import hashlib
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from kfood_dist.data.storage.base import MissingFileError, Storage
from kfood_dist.data.storage.local import LocalStorage
from kfood_dist.data.storage.open import open_storage
from kfood_dist.data.task.dish import DishClass, find_ambiguous_answer
from kfood_dist.errors import ShardError

FORMAT = "kfood-shards"
VERSION = 3
MANIFEST_NAME = "manifest.json"
REJECTED_NAME = "rejected.csv"
SPLITS = ("train", "val", "test")

_CHECKSUM = "checksum"
_PACK_AGAIN = "pack the source again with `kfood pack SOURCE OUT`"


@dataclass(frozen=True)
class ShardFile:
    """One tar and its index as the manifest describes them: file names, sizes in bytes, SHA-256 in hex."""

    split: str
    path: str
    bytes: int
    samples: int
    sha256: str
    index_path: str
    index_bytes: int
    index_sha256: str


@dataclass(frozen=True)
class Manifest:
    """The contents of a packed folder, as its manifest states them.

    `classes` may be empty. The id of a class is its position in `classes`. `columns` are the columns that every sample
    has besides its pictures. `raw` is the complete JSON.
    """

    storage: Storage
    classes: tuple[DishClass, ...]
    image_size: int
    resize: str
    columns: tuple[str, ...]
    shards: tuple[ShardFile, ...]
    raw: dict[str, Any]

    @property
    def where(self) -> str:
        """The folder's path or URL, for messages."""
        return self.storage.where

    @property
    def name(self) -> str:
        """The last part of the folder's path or URL."""
        return self.where.rstrip("/").rpartition("/")[2]

    @property
    def folder(self) -> Path:
        """The local folder. Raises ShardError if the data set is behind a URL."""
        if isinstance(self.storage, LocalStorage):
            return self.storage.folder
        raise ShardError(f"{self.where} is not a local folder, but this needs one", "copy it to a disk first")

    @property
    def groups_across(self) -> int:
        """The number of groups that are in several splits, because the source's own split put them there."""
        own = self.raw.get("source_split")
        return 0 if own is None else own["groups_across"]

    @property
    def splits(self) -> tuple[str, ...]:
        """The splits that have samples, in the order train, val, test."""
        present = {s.split for s in self.shards if s.samples}
        return tuple(s for s in SPLITS if s in present)

    def shards_of(self, split: str) -> tuple[ShardFile, ...]:
        """Return the shards of one split in reading order."""
        return tuple(s for s in self.shards if s.split == split)


def load_manifest(where: str | Path | Storage) -> Manifest:
    """Read the manifest of a packed folder, given by its path, its URL or its storage.

    Raises ShardError if the folder or the manifest is missing, or if the manifest cannot be read, is damaged, is not
    JSON, or is of another format or version.
    """
    storage = open_storage(where)
    data = _read(storage)
    place = storage.place(MANIFEST_NAME)
    raw = _parse_json(place, data)
    if raw.get("format") != FORMAT:
        raise ShardError(
            f"{place} is of format {raw.get('format')!r}, not {FORMAT!r}", "name a folder that `kfood pack` wrote"
        )
    if raw.get("version") != VERSION:
        raise ShardError(
            f"{place} is of version {raw.get('version')!r}, but this kfood reads version {VERSION}",
            "pack the source again with this kfood: `kfood pack SOURCE OUT`, with the options it was packed with",
        )
    if not _has_valid_checksum(data):
        raise ShardError(f"{place} is damaged or was edited: its checksum does not match", _PACK_AGAIN)
    try:
        return _parse_manifest(storage, raw)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ShardError(f"{place} is damaged ({type(error).__name__}: {error})", _PACK_AGAIN) from None


def with_checksum(raw: dict[str, Any]) -> bytes:
    """Return the bytes of the manifest file: JSON whose last entry is a SHA-256 of all lines before it."""
    body = json.dumps({k: v for k, v in raw.items() if k != _CHECKSUM}, ensure_ascii=False, indent=1).encode("utf-8")
    return _sealed(body.removesuffix(b"\n}"))


def _sealed(lines: bytes) -> bytes:
    return lines + f',\n "{_CHECKSUM}": "{hashlib.sha256(lines).hexdigest()}"\n}}'.encode("ascii")


def _has_valid_checksum(data: bytes) -> bool:
    """Return whether the checksum in `data` is that of the lines before it, as `with_checksum` writes it.

    Hashes the bytes of the file. For a large manifest that is much faster than to hash its parsed parts.
    """
    end = data.rfind(f',\n "{_CHECKSUM}": '.encode("ascii"))
    return end > 0 and data == _sealed(data[:end])


def _read(storage: Storage) -> bytes:
    try:
        is_missing = isinstance(storage, LocalStorage) and not storage.folder.is_dir()
    except OSError as error:
        what = f"shard folder {storage.where} cannot be read ({error.strerror})"
        raise ShardError(what, "check its permissions") from None
    if is_missing:
        raise MissingFileError(
            f"shard folder {storage.where} does not exist", "name the OUT folder of a `kfood pack SOURCE OUT`"
        )
    try:
        return storage.read(MANIFEST_NAME)
    except MissingFileError:
        raise MissingFileError(
            f"{storage.where} has no {MANIFEST_NAME}", "pack it with `kfood pack SOURCE OUT`"
        ) from None


def _parse_json(place: str, data: bytes) -> dict[str, Any]:
    try:
        raw = json.loads(data)
    except (ValueError, RecursionError):  # not UTF-8, not JSON, or JSON nested too deeply
        raise ShardError(f"{place} is not JSON", _PACK_AGAIN) from None
    if not isinstance(raw, dict):
        raise ShardError(f"{place} is not a JSON object", _PACK_AGAIN)
    return raw


def _parse_manifest(storage: Storage, raw: dict[str, Any]) -> Manifest:
    classes = _parse_classes(raw)
    shards = tuple(
        ShardFile(
            split=_one_of(SPLITS, entry["split"]),
            path=_plain_name(entry["path"]),
            bytes=_count(entry["bytes"]),
            samples=_count(entry["samples"]),
            sha256=str(entry["sha256"]),
            index_path=_plain_name(entry["index"]["path"]),
            index_bytes=_count(entry["index"]["bytes"]),
            index_sha256=str(entry["index"]["sha256"]),
        )
        for entry in raw["shards"]
    )
    _count(raw["rejected"]["count"]), float(raw["rejected"]["share"]), dict(raw["rejected"]["by_reason"])
    str(raw["rejected"]["sha256"])
    if (own := raw.get("source_split")) is not None:
        _count(own["groups_across"])
    for split in SPLITS:
        _count(raw["splits"][split]["samples"])
    if not isinstance(raw["columns"], list) or not all(isinstance(name, str) for name in raw["columns"]):
        raise ValueError("columns is not a list of names")
    columns = tuple(raw["columns"])
    return Manifest(storage, classes, _count(raw["image_size"]), str(raw["resize"]), columns, shards, raw)


def _parse_classes(raw: dict[str, Any]) -> tuple[DishClass, ...]:
    classes = tuple(
        DishClass(str(c["name"]), str(c["category"]), tuple(str(a) for a in c["aliases"])) for c in raw["classes"]
    )
    # An older manifest does not say whether the classes come from a class list. `kfood pack` has always refused an
    # ambiguous class list, so classes with an ambiguous answer do not come from one.
    is_listed = raw["class_list"] if "class_list" in raw else find_ambiguous_answer(classes) is None
    return classes if is_listed else tuple(replace(dish, listed=False) for dish in classes)


def _plain_name(name: Any) -> str:
    # A manifest that someone else wrote must not make a reader open files outside its folder.
    if not isinstance(name, str) or name in ("", ".", "..") or "/" in name or "\0" in name:
        raise ValueError(f"{name!r} is not a plain file name")
    return name


def _count(value: Any) -> int:
    # numpy can compare values below 2**63.
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 2**63:
        raise ValueError(f"{value!r} is not a count")
    return value


def _one_of(allowed: tuple[str, ...], value: Any) -> str:
    if value not in allowed:
        raise ValueError(f"{value!r} is not one of {', '.join(allowed)}")
    return value
