"""Splits the text of a CSV into rows of cells, as RFC 4180 and spreadsheets write them.

    sep=;                          a first line may name the separator; else the header decides: comma, semicolon or tab
    image_path;label;note
    a.jpg;갈비구이;"two
    lines"                         a quoted cell may hold line breaks

Always holds: a stray quote makes only its own line malformed; a later line that is a row by itself stays a row.
"""

import csv
import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

SEPARATORS = (",", ";", "\t")
# A quote that is not closed within this many lines is a stray one.
_MAX_LINES = 1000


@dataclass(frozen=True)
class Row:
    """One row: the line where it begins, from 1; its cells, or None if it is malformed; its text."""

    line: int
    cells: list[str] | None
    text: str


class Table:
    """The header and the rows of a CSV. The header is in lower case without spaces around. Blank lines are ignored."""

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
        """Yield the rows below the header. `is_row` says whether the cells of one line are certainly a row."""
        at = self._start
        while at < len(self._lines):
            num_lines, cells = self._row(at, is_row)
            text = "".join(self._lines[at : at + num_lines])
            if text.strip():
                yield Row(at + 1, cells, text)
            at += num_lines

    def _read_header(self, separator: str) -> tuple[list[str], int]:
        """Return the names of the columns, none if they are malformed, and the number of lines they take."""
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
        """Return the number of lines of the row at line `at`, and its cells. A malformed row is 1 line and None."""
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
    """Return the character that a line such as `sep=;` names, as spreadsheets write it, or None for another line."""
    text = line.strip("\n").strip(" \"'")
    return text[4] if len(text) == 5 and text[:4].lower() == "sep=" else None


def _split(text: str, separator: str) -> list[str] | None:
    """Return the cells of one row, or None if it is malformed."""
    try:
        return next(csv.reader([text.removesuffix("\n")], delimiter=separator, strict=True), [])
    except csv.Error:
        return None
