"""Reads names: their text in any encoding, whether they are unsafe, and the dish and category they mean.

    folder  …/구이/구이/갈비구이/Img_000_0001.jpg     class = own folder, category = the folder above it
    zip     구이.zip/갈비구이/Img_000_0001.jpg         a zip counts as the folder it would be extracted to

The rules use only `Record.source`, so a source has the same labels before and after its zips are extracted.
"""

import os
import re
import struct
import unicodedata
import zipfile
import zlib
from collections.abc import Collection, Iterable, Sequence
from dataclasses import replace
from functools import lru_cache
from itertools import takewhile

from kfood_dist.data.encoding import UTF8, name_text, side_of
from kfood_dist.data.task.dish import clean
from kfood_dist.pack.sources.layout import read_places, resolved, without_zip
from kfood_dist.pack.sources.record import SUFFIXES, Record, suffix

# APPNOTE.TXT 4.4.4: general purpose bit 11, the name is UTF-8.
_UTF8_FLAG = 0x800
# APPNOTE.TXT 4.6.9: the extra field "Info-ZIP Unicode Path".
_UNICODE_PATH = 0x7075
_DRIVE = re.compile(r"[A-Za-z]:")


@lru_cache(maxsize=2**16)  # the name of a folder is looked up for each of its files
def file_name(name: str, side: str = UTF8) -> str:
    """Return a file's name as text, whatever program wrote it.

    `side` is the encoding of the names beside it. It decides for a name that may have either encoding.
    """
    return name if name.isascii() else name_text(os.fsencode(name), side)


def file_side(names: Iterable[str]) -> str:
    """Return the `side` of the names of many files."""
    return side_of(os.fsencode(name) for name in set(names))


def member_name(info: zipfile.ZipInfo, side: str) -> str:
    """Return the full name of a zip's member as text. `side` is the encoding of its names without UTF-8 flag."""
    raw = _unflagged(info)
    return info.orig_filename if raw is None else _unicode_path_field(info, raw) or name_text(raw, side)


def member_side(infos: Iterable[zipfile.ZipInfo]) -> str:
    """Return the `side` of a zip's names. macOS writes UTF-8 without the UTF-8 flag, Korean Windows writes CP949."""
    return side_of(raw for info in infos if (raw := _unflagged(info)) is not None)


def _unflagged(info: zipfile.ZipInfo) -> bytes | None:
    """Return the bytes of a name without the UTF-8 flag, which zipfile has read as CP437. None for other names."""
    name = info.orig_filename
    return None if info.flag_bits & _UTF8_FLAG or name.isascii() else name.encode("cp437")


def _unicode_path_field(info: zipfile.ZipInfo, raw: bytes) -> str | None:
    """Return the UTF-8 name that some programs add to the one in the system's encoding (APPNOTE.TXT 4.6.9), or None."""
    at = 0
    while at + 4 <= len(info.extra):
        kind, size = struct.unpack_from("<HH", info.extra, at)
        version_and_crc = b"\1" + zlib.crc32(raw).to_bytes(4, "little")
        field = info.extra[at + 4 : at + 4 + size]
        if kind == _UNICODE_PATH and field.startswith(version_and_crc):
            return field[len(version_and_crc) :].decode("utf-8", errors="replace")
        at += 4 + size
    return None


def is_unsafe_path(name: str) -> bool:
    """Return whether some program on some system could take a member's name for a place outside its zip."""
    return (
        name.startswith("/")
        or "\\" in name
        or "\0" in name
        or _DRIVE.match(name) is not None
        or ".." in name.split("/")
    )


def named(records: Sequence[Record], root_name: str, dishes: Collection[str] = ()) -> list[Record]:
    """Return the records with the label, the category and the publisher's split that their folders name.

    Pictures in the top folder have the label `root_name`. `dishes` are the cleaned names that are always dishes, never
    splits. A record that is not a picture (a refused zip) or has an unsafe name is returned unchanged. Raises
    SourceError for a folder that may be a split or a dish.
    """
    folders = {place: _folders(place) for place in {_place(r) for r in records if _has_dish(r)}}
    readings = read_places(folders.values(), lambda name: clean(name) in dishes)
    places = {place: readings[parts] for place, parts in folders.items()}
    wrapping = _num_wrapping({place.folders for place in places.values()})
    categories = {name: category(place.folders[wrapping:]) for name, place in places.items()}
    have_dish = any(place.folders for place in places.values())

    def with_dish(record: Record) -> Record:
        place = places[_place(record)]
        if place.split and not place.folders and have_dish:
            detail = "is directly in the folder of a split, not in a dish's folder"
            return replace(record, problem="bad_label", detail=detail, split=place.split)
        label = place.folders[-1] if place.folders else root_name
        return replace(record, label=label, category=categories[_place(record)], split=place.split)

    return [with_dish(record) if _has_dish(record) else record for record in records]


def listed(records: Sequence[Record]) -> list[Record]:
    """Return the records of a list with the category that their folders name, and the split if the list names none."""
    folders = {place: tuple(p for p in place.split("/") if p not in ("", "..")) for place in map(_place, records)}
    # The folders that all absolute paths share only show where somebody keeps the data set.
    above = _num_shared(parts for place, parts in folders.items() if place.startswith("/"))
    at = {place: above if place.startswith("/") else 0 for place in folders}
    labels = {clean(record.label) for record in records}
    readings = read_places(
        (parts[at[place] :] for place, parts in folders.items()), lambda name: clean(name) in labels, ask=False
    )
    means = resolved(record.split for record in records)
    has_column = any(record.split for record in records)

    def with_place(record: Record) -> Record:
        parts, start = folders[_place(record)], at[_place(record)]
        place = readings[parts[start:]]
        split = means[record.split] if has_column else place.split
        return replace(record, category=category((*parts[:start], *place.folders)), split=split)

    return [with_place(record) for record in records]


def _has_dish(record: Record) -> bool:
    return suffix(record.source) in SUFFIXES and record.problem != "unsafe_path"


def _place(record: Record) -> str:
    return record.source.rpartition("/")[0]


def _folders(place: str) -> tuple[str, ...]:
    return tuple(map(without_zip, place.split("/"))) if place else ()


def _num_wrapping(places: Iterable[tuple[str, ...]]) -> int:
    """Return how many folders at the top hold everything and mean nothing, such as `kfood` in `kfood/만두/만두/a.jpg`.

    They are not categories if every path below them still has a category and a dish, and if the two have different
    names in at least one path.
    """
    places = list(places)
    shared = _num_shared(places) if len(places) > 1 else 0
    below = [place[shared:] for place in places]
    if all(len(p) >= 2 for p in below) and any(clean(p[-2]) != clean(p[-1]) for p in below):
        return shared
    return 0


def _num_shared(places: Iterable[tuple[str, ...]]) -> int:
    """Return how many folders at the top all places share."""
    places = list(places)
    # In sorted order, all places begin with what the first and the last have in common.
    ends = zip(min(places, default=()), max(places, default=()), strict=False)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], ends))


def category(folders: Sequence[str]) -> str:
    """Return the nearest folder above the dish that has another name; "" if the dish's folder is at the top.

    `folders` lead from the source's root to the picture. The last one is the dish. Category folders may repeat, as
    after extraction on Windows (`구이/구이/갈비구이`). A category may hold a dish of the same name. Then three in a row
    (`kfood/만두/만두/만두`) are that dish in its repeated category. If all folders above have the dish's name, so does
    the category.
    """
    above = [unicodedata.normalize("NFC", name).strip() for name in folders[:-1]]
    dish = clean(folders[-1]) if folders else ""
    others = [name for name in above if clean(name) != dish]
    own_name = above[-2:] if len(above) >= 2 and all(clean(name) == dish for name in above[-2:]) else []
    return (own_name or others or above or [""])[-1]
