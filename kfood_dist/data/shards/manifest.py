"""The manifest of a packed data set: its classes, its shards, and the size and hash of each.

    OUT/manifest.json ──► load_manifest ──► Manifest

`shards/README.md` is the contract of the format for other readers.
"""

import hashlib
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from kfood_dist.data.storage.base import MissingFileError, Storage
from kfood_dist.data.storage.local import LocalStorage
from kfood_dist.data.storage.open import open_storage
from kfood_dist.data.task.dish import DishClass, stands_for_two
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
    """What a packed folder holds; a class's id is its position in `classes`, which may be empty.

    `columns` are those that every sample has besides its pictures. `raw` is the whole JSON.
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
        """The folder; raises ShardError where the data set lies behind a URL."""
        if isinstance(self.storage, LocalStorage):
            return self.storage.folder
        raise ShardError(f"{self.where} is no local folder, which this needs", "copy it to a disk first")

    @property
    def groups_across(self) -> int:
        """How many groups lie in several splits, as the source's own split has them."""
        own = self.raw.get("source_split")
        return 0 if own is None else own["groups_across"]

    @property
    def splits(self) -> tuple[str, ...]:
        """The splits that have samples, in the order train, val, test."""
        present = {s.split for s in self.shards if s.samples}
        return tuple(s for s in SPLITS if s in present)

    def shards_of(self, split: str) -> tuple[ShardFile, ...]:
        """The shards of one split in reading order."""
        return tuple(s for s in self.shards if s.split == split)


def load_manifest(where: str | Path | Storage) -> Manifest:
    """Read the manifest of a packed folder, given by its path, its URL or its storage.

    Raises ShardError when the folder or the manifest is missing, is not JSON, or is of another format or
    version.
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
            f"{place} is of version {raw.get('version')!r}; version {VERSION} is read here",
            "pack the source again with this kfood: `kfood pack SOURCE OUT`, with the options it was packed with",
        )
    if not _is_sealed(data):
        raise ShardError(f"{place} is damaged or was edited: its checksum is another", _PACK_AGAIN)
    try:
        return _parse_manifest(storage, raw)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ShardError(f"{place} is damaged ({type(error).__name__}: {error})", _PACK_AGAIN) from None


def seal(raw: dict[str, Any]) -> bytes:
    """The file's bytes: JSON whose last line is a SHA-256 over all lines before it."""
    body = json.dumps({k: v for k, v in raw.items() if k != _CHECKSUM}, ensure_ascii=False, indent=1).encode("utf-8")
    return _sealed(body.removesuffix(b"\n}"))


def _sealed(lines: bytes) -> bytes:
    return lines + f',\n "{_CHECKSUM}": "{hashlib.sha256(lines).hexdigest()}"\n}}'.encode("ascii")


def _is_sealed(data: bytes) -> bool:
    """Whether `data` is as `seal` made it. A hash of the bytes: of a large manifest, much quicker than of its parts."""
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
            f"shard folder {storage.where} does not exist", "name the OUT of a `kfood pack SOURCE OUT`"
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
    except (ValueError, RecursionError):  # not UTF-8, not JSON, or JSON nested without end
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
        raise ValueError("columns are no list of names")
    columns = tuple(raw["columns"])
    return Manifest(storage, classes, _count(raw["image_size"]), str(raw["resize"]), columns, shards, raw)


def _parse_classes(raw: dict[str, Any]) -> tuple[DishClass, ...]:
    classes = tuple(
        DishClass(str(c["name"]), str(c["category"]), tuple(str(a) for a in c["aliases"])) for c in raw["classes"]
    )
    # An older manifest does not say. `kfood pack` has always refused an ambiguous class list.
    is_listed = raw["class_list"] if "class_list" in raw else stands_for_two(classes) is None
    return classes if is_listed else tuple(replace(dish, listed=False) for dish in classes)


def _plain_name(name: Any) -> str:
    # A manifest from elsewhere must not lead a reader out of its own folder.
    if not isinstance(name, str) or name in ("", ".", "..") or "/" in name or "\0" in name:
        raise ValueError(f"{name!r} is not a plain file name")
    return name


def _count(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 2**63:  # as numpy can compare
        raise ValueError(f"{value!r} is not a count")
    return value


def _one_of(allowed: tuple[str, ...], value: Any) -> str:
    if value not in allowed:
        raise ValueError(f"{value!r} is none of {', '.join(allowed)}")
    return value
