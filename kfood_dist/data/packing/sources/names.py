"""What a name says: its text, whatever wrote it; whether it leads astray; which dish and category it means.

    folder  …/구이/구이/갈비구이/Img_000_0001.jpg     class = own folder, category = the folder above it
    zip     구이.zip/갈비구이/Img_000_0001.jpg         a zip counts as the folder it would be extracted to

The rules look at `Record.source` alone, so a source has the same labels as folders, extracted or not.
"""

import os
import re
import unicodedata
import zipfile
from collections.abc import Collection, Iterable, Sequence
from dataclasses import replace
from itertools import takewhile

from kfood_dist.data.labels import normalise
from kfood_dist.data.packing.sources.layout import read_places, resolved, without_zip
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


def named(records: Sequence[Record], root_name: str, dishes: Collection[str] = ()) -> list[Record]:
    """The records with label, category and the publisher's split by their folders.

    Pictures on top are of the dish `root_name`; `dishes` are the normalised names that are dishes, never splits.
    Records that are no pictures (a zip that was refused) or not to be trusted by name stay without. Raises SourceError
    for a folder that may be a split or a dish.
    """
    folders = {place: _folders(place) for place in {_place(r) for r in records if _has_dish(r)}}
    said = read_places(folders.values(), lambda name: normalise(name) in dishes)
    places = {place: said[parts] for place, parts in folders.items()}
    wrapping = _num_wrapping({place.folders for place in places.values()})
    have_dish = any(place.folders for place in places.values())

    def with_dish(record: Record) -> Record:
        place = places[_place(record)]
        if place.split and not place.folders and have_dish:
            detail = "lies straight in the folder of a split, in no dish's folder"
            return replace(record, problem="bad_label", detail=detail, split=place.split)
        label = place.folders[-1] if place.folders else root_name
        return replace(record, label=label, category=category(place.folders[wrapping:]), split=place.split)

    return [with_dish(record) if _has_dish(record) else record for record in records]


def listed(records: Sequence[Record]) -> list[Record]:
    """The records of a table with category by their folders; so is the split, if the table itself names none."""
    folders = {place: tuple(p for p in place.split("/") if p not in ("", "..")) for place in map(_place, records)}
    # Where somebody keeps the set says nothing about it.
    above = _num_shared(parts for place, parts in folders.items() if place.startswith("/"))
    at = {place: above if place.startswith("/") else 0 for place in folders}
    labels = {normalise(record.label) for record in records}
    said = read_places(
        (parts[at[place] :] for place, parts in folders.items()), lambda name: normalise(name) in labels, ask=False
    )
    means = resolved(record.split for record in records)
    has_column = any(record.split for record in records)

    def with_place(record: Record) -> Record:
        parts, start = folders[_place(record)], at[_place(record)]
        place = said[parts[start:]]
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
    """How many folders at the top hold everything and mean nothing, such as `kfood` in `kfood/만두/만두/a.jpg`.

    They are told from a category by what is left below: everywhere a category and a dish, and somewhere the two
    called differently.
    """
    places = list(places)
    shared = _num_shared(places) if len(places) > 1 else 0
    below = [place[shared:] for place in places]
    if all(len(p) >= 2 for p in below) and any(normalise(p[-2]) != normalise(p[-1]) for p in below):
        return shared
    return 0


def _num_shared(places: Iterable[tuple[str, ...]]) -> int:
    """How many folders at the top all places begin with."""
    places = list(places)
    # What the first and the last in order begin with, all between them do.
    ends = zip(min(places, default=()), max(places, default=()), strict=False)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], ends))


def category(folders: Sequence[str]) -> str:
    """The nearest folder above the dish that is not called like it; "" when the dish's folder is on top.

    `folders` lead from the source's root to the picture, the last being the dish. Category folders may repeat
    (`구이/구이/갈비구이`, as extraction on Windows leaves them); a category may hold a dish of its own name, and
    then three in a row (`kfood/만두/만두/만두`) are that dish in its doubled category.
    """
    above = [unicodedata.normalize("NFC", name).strip() for name in folders[:-1]]
    dish = normalise(folders[-1]) if folders else ""
    others = [name for name in above if normalise(name) != dish]
    own_name = above[-2:] if len(above) >= 2 and all(normalise(name) == dish for name in above[-2:]) else []
    return (own_name or others or above or [""])[-1]
