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
        while self._start < len(self._lines) and not self._lines[self._start].strip():
            self._start += 1
        self._separator, self.header, num_lines = max(
            ((separator, *self._read_header(separator)) for separator in separators),
            key=lambda found: (len(set(wanted) & set(found[1])), len(found[1])),
        )
        self._start += num_lines

    def rows(self, is_row: Callable[[list[str]], bool]) -> Iterator[Row]:
        """The rows below the header; `is_row` tells whether cells of one line are surely a row by themselves."""
        at = self._start
        while at < len(self._lines):
            num_lines, cells = self._row(at, is_row)
            text = "".join(self._lines[at : at + num_lines])
            if text.strip():
                yield Row(at + 1, cells, text)
            at += num_lines

    def _read_header(self, separator: str) -> tuple[list[str], int]:
        """The columns' names, none where they are malformed, and how many lines they take."""
        reader = csv.reader(self._lines[self._start : self._start + _MAX_LINES], delimiter=separator, strict=True)
        try:
            names = next(reader, [])
        except csv.Error:
            return [], 1
        inside = self._lines[self._start + 1 : self._start + reader.line_num]
        if any(len(_split(line, separator) or []) >= len(names) for line in inside):
            return [], 1
        return [name.strip().lower() for name in names], reader.line_num

    def _row(self, at: int, is_row: Callable[[list[str]], bool]) -> tuple[int, list[str] | None]:
        """How many lines from `at` on are one row, and its cells; of a malformed row, the first line alone."""
        end = min(at + _MAX_LINES, len(self._lines))
        reader = csv.reader((self._lines[i] for i in range(at, end)), delimiter=self._separator, strict=True)
        try:
            cells = next(reader)
        except csv.Error:
            return 1, None
        inside = (_split(self._lines[i], self._separator) for i in range(at + 1, at + reader.line_num))
        if any(other is not None and len(other) == len(self.header) and is_row(other) for other in inside):
            return 1, None
        return reader.line_num, cells


def _named_separator(line: str) -> str | None:
    """The character that a line such as `sep=;` names, as spreadsheets write it."""
    said = line.strip("\n").strip(" \"'")
    return said[4] if len(said) == 5 and said[:4].lower() == "sep=" else None


def _split(text: str, separator: str) -> list[str] | None:
    """The cells of one row, None where it is malformed."""
    try:
        return next(csv.reader([text.removesuffix("\n")], delimiter=separator, strict=True), [])
    except csv.Error:
        return None
