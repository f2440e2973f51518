"""The text of a CSV to rows of cells, as RFC 4180 and spreadsheets write them.

    sep=;                          a first line that names the separator; else the header tells: comma, semicolon or tab
    image_path;label;note
    a.jpg;갈비구이;"two
    lines"                         a quoted cell may hold line breaks

Always holds: a stray quote costs its own line; lines that are rows by themselves are never swallowed by it.
"""

import csv
import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

SEPARATORS = (",", ";", "\t")
# An open quote that no line closes within so many is a stray one.
_MAX_LINES = 1000


@dataclass(frozen=True)
class Row:
    """One row: the line where it begins, from 1; its cells, None where it is malformed; its text."""

    line: int
    cells: list[str] | None
    text: str


class Table:
    """The header of a CSV, in small letters without spaces around, and its rows, blank lines aside."""

    def __init__(self, text: str, wanted: Sequence[str]):
        self._lines = list(io.StringIO(text, newline=None))
        self._start = 0
        separators: Sequence[str] = SEPARATORS
        if self._lines and (named := _named_separator(self._lines[0])):
            separators, self._start = (named,), 1
        header = self._lines[self._start] if self._start < len(self._lines) else ""
        self._separator, self.header = max(
            ((separator, _names(header, separator)) for separator in separators),
            key=lambda found: (len(set(wanted) & set(found[1])), len(found[1])),
        )

    def rows(self, is_row: Callable[[list[str]], bool]) -> Iterator[Row]:
        """The rows below the header; `is_row` tells whether cells of one line are surely a row by themselves."""
        at = self._start + 1
        while at < len(self._lines):
            count = self._num_lines(at, is_row)
            text = "".join(self._lines[at : at + count])
            if text.strip():
                yield Row(at + 1, _split(text, self._separator), text)
            at += count

    def _num_lines(self, at: int, is_row: Callable[[list[str]], bool]) -> int:
        """How many lines from `at` on are one row: up to that which closes an open quote, if that makes a row."""
        if self._lines[at].count('"') % 2 == 0:
            return 1
        for end in range(at + 1, min(at + _MAX_LINES, len(self._lines))):
            line = self._lines[end]
            if line.count('"') % 2:
                cells = _split("".join(self._lines[at : end + 1]), self._separator)
                return end + 1 - at if cells is not None and len(cells) == len(self.header) else 1
            cells = _split(line, self._separator)
            if cells is not None and len(cells) == len(self.header) and is_row(cells):
                return 1
        return 1


def _named_separator(line: str) -> str | None:
    """The character that a line such as `sep=;` names, as spreadsheets write it."""
    said = line.strip("\n").strip(" \"'")
    return said[4] if len(said) == 5 and said[:4].lower() == "sep=" else None


def _names(line: str, separator: str) -> list[str]:
    return [name.strip().lower() for name in _split(line, separator) or []]


def _split(text: str, separator: str) -> list[str] | None:
    """The cells of one row, None where it is malformed."""
    try:
        return next(csv.reader([text.removesuffix("\n")], delimiter=separator, strict=True), [])
    except csv.Error:
        return None
