"""What a name says: its text, whatever wrote it; whether it leads astray; which dish and category it means.

    folder  …/구이/구이/갈비구이/Img_000_0001.jpg     class = own folder, category = the folder above it
    zip     구이.zip/갈비구이/Img_000_0001.jpg         a zip counts as the folder it would be extracted to

The rules look at `Record.source` alone, so a source has the same labels as folders, extracted or not.
"""

import os
import re
import struct
import unicodedata
import zipfile
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import takewhile

from kfood_dist.data.encoding import UTF8, name_text, side_of
from kfood_dist.data.labels import clean
from kfood_dist.data.packing.sources.record import SUFFIXES, Record, suffix

# APPNOTE.TXT 4.4.4: general purpose bit 11, the name is UTF-8.
_UTF8_FLAG = 0x800
# APPNOTE.TXT 4.6.9: the extra field "Info-ZIP Unicode Path".
_UNICODE_PATH = 0x7075
_DRIVE = re.compile(r"[A-Za-z]:")


def file_name(name: str, side: str = UTF8) -> str:
    """A file's name as text, whatever wrote it; `side` is the encoding of those beside it, for what may have either."""
    return name if name.isascii() else name_text(os.fsencode(name), side)


def file_side(names: Iterable[str]) -> str:
    """The `side` of many files' names."""
    return side_of(os.fsencode(name) for name in set(names))


def member_name(info: zipfile.ZipInfo, side: str) -> str:
    """The whole name of a zip's member as text; `side` is the encoding of those without a flag in the same zip."""
    raw = _unflagged(info)
    return info.orig_filename if raw is None else _said_beside(info, raw) or name_text(raw, side)


def member_side(infos: Iterable[zipfile.ZipInfo]) -> str:
    """The `side` of a zip's names: macOS writes UTF-8 without the flag that says so, Korean Windows CP949."""
    return side_of(raw for info in infos if (raw := _unflagged(info)) is not None)


def _unflagged(info: zipfile.ZipInfo) -> bytes | None:
    """The bytes of a name without a flag for UTF-8, which zipfile has read as CP437; None for other names."""
    name = info.orig_filename
    return None if info.flag_bits & _UTF8_FLAG or name.isascii() else name.encode("cp437")


def _said_beside(info: zipfile.ZipInfo, raw: bytes) -> str | None:
    """The name in UTF-8 that some programs write beside that in the system's encoding (APPNOTE.TXT 4.6.9)."""
    at = 0
    while at + 4 <= len(info.extra):
        kind, size = struct.unpack_from("<HH", info.extra, at)
        version_and_crc = b"\1" + zlib.crc32(raw).to_bytes(4, "little")
        field = info.extra[at + 4 : at + 4 + size]
        if kind == _UNICODE_PATH and field.startswith(version_and_crc):
            return field[len(version_and_crc) :].decode("utf-8", errors="replace")
        at += 4 + size
    return None


def leads_astray(name: str) -> bool:
    """Whether a member's name could mean a place outside its zip to some program on some system."""
    return (
        name.startswith("/")
        or "\\" in name
        or "\0" in name
        or _DRIVE.match(name) is not None
        or ".." in name.split("/")
    )


def named(records: Sequence[Record], root_name: str) -> list[Record]:
    """The records with label and category by their folders; pictures on top are of the dish `root_name`.

    Records that are no pictures (a zip that was refused) or not to be trusted by name stay without.
    """
    places = {place: _folders(place) for place in {_place(r) for r in records if _has_dish(r)}}
    wrapping = _num_wrapping(places.values())
    means = {place: (parts[-1] if parts else root_name, category(parts[wrapping:])) for place, parts in places.items()}
    return [_with_dish(r, *means[_place(r)]) if _has_dish(r) else r for r in records]


def _has_dish(record: Record) -> bool:
    return suffix(record.source) in SUFFIXES and record.problem != "unsafe_path"


def _place(record: Record) -> str:
    return record.source.rpartition("/")[0]


def _with_dish(record: Record, label: str, category: str) -> Record:
    return replace(record, label=label, category=category)


def _folders(place: str) -> tuple[str, ...]:
    parts = place.split("/") if place else []
    return tuple(part[: -len(".zip")] if suffix(part) == ".zip" else part for part in parts)


def _num_wrapping(places: Iterable[tuple[str, ...]]) -> int:
    """How many folders at the top hold everything and mean nothing, such as `kfood` in `kfood/만두/만두/a.jpg`.

    They are told from a category by what is left below: everywhere a category and a dish, and somewhere the two
    called differently.
    """
    places = list(places)
    # What the first and the last in order begin with, all between them do.
    ends = zip(min(places, default=()), max(places, default=()), strict=False)
    shared = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], ends)) if len(places) > 1 else 0
    below = [place[shared:] for place in places]
    if all(len(p) >= 2 for p in below) and any(clean(p[-2]) != clean(p[-1]) for p in below):
        return shared
    return 0


def category(folders: Sequence[str]) -> str:
    """The nearest folder above the dish that is not called like it; "" when the dish's folder is on top.

    `folders` lead from the source's root to the picture, the last being the dish. Category folders may repeat
    (`구이/구이/갈비구이`, as extraction on Windows leaves them); a category may hold a dish of its own name, and
    then three in a row (`kfood/만두/만두/만두`) are that dish in its doubled category.
    """
    above = [unicodedata.normalize("NFC", name).strip() for name in folders[:-1]]
    dish = clean(folders[-1]) if folders else ""
    others = [name for name in above if clean(name) != dish]
    own_name = above[-2:] if len(above) >= 2 and all(clean(name) == dish for name in above[-2:]) else []
    return (own_name or others or above or [""])[-1]
