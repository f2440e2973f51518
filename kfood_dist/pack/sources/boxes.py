"""Reads where the dish is in a picture, from the lists `crop_area.properties` beside the AI-Hub pictures.

    Img_000_0001=76,41,485,427      file name, with or without suffix = x, y, width, height in pixels

The lists were written by hand, so names may be in any case, `:` may stand for `=`, and words may follow the numbers.
A line without a usable box is counted and ignored. So is a box that fits no picture or several pictures.
"""

import codecs
import re
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from kfood_dist.data.encoding import name_text, wide_encoding
from kfood_dist.data.picture.images import ImageRejected
from kfood_dist.pack.sources.record import SUFFIXES, Record, suffix

LIST_NAME = "crop_area.properties"
# 1000 lines of a dish are 40 kB.
MAX_LIST_BYTES = 16 * 2**20

_NUMBER = r"(-?\d{1,9})(?:\.\d*)?"
_LINE = re.compile(rf"(.+?)\s*[=:]\s*{_NUMBER}\s*,\s*{_NUMBER}\s*,\s*{_NUMBER}\s*,\s*{_NUMBER}(?:[\s,]+\D.*)?[\s,]*")
_MAX_LINE = 1000

Box = tuple[int, int, int, int]


@dataclass(frozen=True)
class BoxCount:
    """The counts of a source's box lists: lists read, lists not readable, malformed lines, boxes without a picture."""

    lists: int = 0
    lists_unreadable: int = 0
    lines_malformed: int = 0
    lines_unmatched: int = 0

    def __add__(self, other: "BoxCount") -> "BoxCount":
        return BoxCount(
            self.lists + other.lists,
            self.lists_unreadable + other.lists_unreadable,
            self.lines_malformed + other.lines_malformed,
            self.lines_unmatched + other.lines_unmatched,
        )


def give_boxes(
    records: Sequence[Record], place_of: Callable[[Record], str], read_list: Callable[[str], bytes | None]
) -> tuple[list[Record], BoxCount]:
    """Return the records, with the boxes that the lists of their places have for them, and the counts of the lists.

    `read_list` gives the bytes of the list of a place, or None if there is none. It may raise ImageRejected.
    """
    at: dict[str, list[int]] = defaultdict(list)
    for i, record in enumerate(records):
        if suffix(record.source) in SUFFIXES:
            at[place_of(record)].append(i)
    given, count = list(records), BoxCount()
    for place, indexes in at.items():
        try:
            data = read_list(place)
        except ImageRejected:
            count += BoxCount(lists_unreadable=1)
            continue
        if data is None:
            continue
        boxes, num_malformed = parse(data)
        names = {i: records[i].source.rpartition("/")[2] for i in indexes}
        found, num_unmatched = _match(boxes, dict.fromkeys(names.values()))
        count += BoxCount(1, 0, num_malformed, num_unmatched)
        for i, name in names.items():
            if name in found:
                given[i] = replace(records[i], box=found[name])
    return given, count


def read_list_file(folder: str) -> bytes | None:
    """Return the bytes of a folder's list, or None if there is none. Raises ImageRejected if it cannot be read."""
    try:
        with open(Path(folder) / LIST_NAME, "rb") as file:
            data = file.read(MAX_LIST_BYTES + 1)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        raise ImageRejected("unreadable", str(error)) from None
    if len(data) > MAX_LIST_BYTES:
        raise ImageRejected("too_large", f"over {MAX_LIST_BYTES:,} bytes")
    return data


def parse(data: bytes) -> tuple[dict[str, Box], int]:
    """Return the boxes by name, and the number of malformed lines. The last box of a name counts."""
    boxes, num_malformed = dict[str, Box](), 0
    for line in map(str.strip, _lines(data)):
        if not line or line.startswith(("#", "!")):
            continue
        found = _LINE.fullmatch(line) if len(line) <= _MAX_LINE else None
        x, y, width, height = map(int, found.groups()[1:]) if found else (0, 0, 0, 0)
        if found and width > 0 and height > 0:
            boxes[found[1]] = (x, y, width, height)
        else:
            num_malformed += 1
    return boxes, num_malformed


def _lines(data: bytes) -> list[str]:
    """Return the lines, each decoded separately: a list written by hand may mix encodings.

    A wrongly decoded name does no harm, because it fits no picture.
    """
    if encoding := wide_encoding(data):
        return data.decode(encoding).removeprefix("\ufeff").splitlines()
    return [name_text(line) for line in data.removeprefix(codecs.BOM_UTF8).splitlines()]


def _match(boxes: dict[str, Box], names: Iterable[str]) -> tuple[dict[str, Box], int]:
    """Return the boxes by the pictures' own names, and the number of boxes that fit no name or several."""
    fitting: dict[str, set[str]] = defaultdict(set)
    for name in names:
        fitting[_folded(name)].add(name)
        fitting[_folded(_stem(name))].add(name)
    found, num_unmatched = dict[str, Box](), 0
    for key, box in boxes.items():
        fits = fitting.get(_folded(key)) or fitting.get(_folded(_stem(key))) or set()
        if len(fits) == 1:
            found[next(iter(fits))] = box
        else:
            num_unmatched += 1
    return found, num_unmatched


def _folded(name: str) -> str:
    return unicodedata.normalize("NFC", name).casefold()


def _stem(name: str) -> str:
    return name[: -len(suffix(name))] if suffix(name) in SUFFIXES else name
