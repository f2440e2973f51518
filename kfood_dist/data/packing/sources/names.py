"""What a name says: its text, whatever wrote it; whether it leads astray; which dish and category it means.

    folder  …/구이/구이/갈비구이/Img_000_0001.jpg     class = own folder, category = the folder above it
    zip     구이.zip/갈비구이/Img_000_0001.jpg         a zip counts as the folder it would be extracted to

The rules look at `Record.source` alone, so a source has the same labels as folders, extracted or not.
"""

import os
import re
import unicodedata
import zipfile
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import takewhile

from kfood_dist.data.labels import clean
from kfood_dist.data.packing.sources.record import SUFFIXES, Record, suffix

# APPNOTE.TXT 4.4.4: general purpose bit 11, the name is UTF-8.
_UTF8_FLAG = 0x800
_DRIVE = re.compile(r"[A-Za-z]:")


def file_name(name: str) -> str:
    """A file's name as text: names that are not UTF-8 are read as CP949, as Korean Windows wrote them."""
    try:
        name.encode("utf-8")
        return name
    except UnicodeEncodeError:
        return os.fsencode(name).decode("cp949", errors="replace")


def member_name(info: zipfile.ZipInfo) -> str:
    """The whole name of a zip's member as text; without a flag for UTF-8, zipfile has read its bytes as CP437."""
    name = info.orig_filename
    return name if info.flag_bits & _UTF8_FLAG or name.isascii() else _unflagged(name.encode("cp437"))


def _unflagged(data: bytes) -> str:
    """macOS writes UTF-8 without the flag, Korean Windows CP949.

    Some syllables in CP949 are valid UTF-8, among them that of the category 회, which would be `ȸ`. But only
    for two-byte characters, below U+0800, and those are no Korean.
    """
    cp949 = data.decode("cp949", errors="replace")
    try:
        utf8 = data.decode("utf-8")
    except UnicodeDecodeError:
        return cp949
    return cp949 if max(utf8) < "\u0800" and all(c.isascii() or "가" <= c <= "힣" for c in cp949) else utf8


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
