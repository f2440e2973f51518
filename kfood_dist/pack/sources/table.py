"""Reads samples from a CSV: `image_path` with `label`, or with `question` and `answer`; also `split` if it is there.

    bytes ──► encoding.py: text ──► cells.py: rows ──► rows.py: the file that each path means ──► records

The paths start at one folder. Several pictures of one sample are in one cell, as `a.jpg|b.jpg`. A faulty row becomes a
record that names the row; the other rows are still used. A row whose file does not exist has the problem `missing`.
"""

from collections.abc import Collection, Iterator
from dataclasses import replace
from pathlib import Path

from kfood_dist.data.encoding import read_text
from kfood_dist.data.task.dish import clean
from kfood_dist.errors import SourceError
from kfood_dist.pack.sources.cells import Row, Table
from kfood_dist.pack.sources.names import file_name
from kfood_dist.pack.sources.record import SUFFIXES, Record, suffix
from kfood_dist.pack.sources.rows import ASKED, LABEL, has_label_or_question, row_record
from kfood_dist.pack.sources.spelling import Files, SeveralFit

PATH = "image_path"
_WANTED = (PATH, LABEL, *ASKED)


def list_table(
    path: Path, image_root: Path, encoding: str | None = None, known: Collection[str] = ()
) -> Iterator[Record]:
    """Yield one record per row, with the label of the row.

    If no `encoding` is given, the `known` labels help to find it. Raises SourceError if the file, its encoding or its
    columns cannot be read.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise SourceError(f"{path} cannot be read ({error.strerror})", "check its permissions") from None
    files = Files(image_root)
    text = read_text(data, path, encoding, lambda text: _num_fitting(text, files, known))
    table = Table(text, _WANTED)
    if any(table.header.count(name) > 1 for name in _WANTED) or not _is_list(table):
        raise SourceError(
            f"{path} has the columns {', '.join(table.header) or '(none)'}",
            "give it a first line `image_path,label` or `image_path,question,answer`, each name once",
        )
    for row in _rows(table):
        if row.cells is None:
            detail = f"not {len(table.header)} columns: {row.text.strip()[:200]}"
            yield Record(path, f"{file_name(path.name)}:{row.line}", "", "", problem="bad_row", detail=detail)
        else:
            values = dict(zip(table.header, row.cells, strict=True))
            paths, split = _paths(values[PATH], files), values.get("split", "").strip()
            yield row_record(image_root, files, paths, {n: values[n] for n in _WANTED[1:] if n in values}, split)


def _is_list(table: Table) -> bool:
    return PATH in table.header and has_label_or_question(table.header)


def _rows(table: Table) -> Iterator[Row]:
    """Yield the rows of a table. A malformed row has no cells."""
    at_path = table.header.index(PATH)
    for row in table.rows(lambda cells: suffix(cells[at_path].strip()) in SUFFIXES):
        cells = row.cells
        if cells is not None and (len(cells) != len(table.header) or not cells[at_path].strip()):
            yield replace(row, cells=None)
        else:
            yield row


def _paths(cell: str, files: Files) -> list[str]:
    """Return the paths in a cell. A `|` separates them unless it is part of a file's name."""
    text = cell.strip().replace("\\", "/")
    parts = [part.strip() for part in text.split("|")]
    return parts if len(parts) > 1 and all(parts) and not _is_there(text, files) else [text]


def _is_there(path: str, files: Files) -> bool:
    try:
        return files.find(path) is not None
    except SeveralFit:
        return True


def _num_fitting(text: str, files: Files, known: Collection[str]) -> int:
    """Count the paths of a table that lead to files, plus its known labels, when its text is decoded in one way.

    Paths and labels in ASCII do not count, because they do not help to choose an encoding.
    """
    table, num_fitting = Table(text, _WANTED), 0
    if not _is_list(table):
        return 0
    for cells in (row.cells for row in _rows(table) if row.cells is not None):
        values = dict(zip(table.header, cells, strict=True))
        label = values.get(LABEL, "")
        num_fitting += not label.isascii() and clean(label) in known
        num_fitting += sum(not path.isascii() and _is_there(path, files) for path in _paths(values[PATH], files))
    return num_fitting
