"""Pictures listed in a CSV: `image_path,label`, the paths starting at one folder; `split` if the publisher has one.

    bytes ──► encoding.py: text ──► cells.py: rows ──► spelling.py: the file that each path means ──► records

A faulty row becomes a record that names it and costs no other; a row whose file is not there is `missing`.
"""

import os
import posixpath
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from kfood_dist.data.encoding import read_text
from kfood_dist.data.task.dish import DishClass, clean
from kfood_dist.errors import SourceError
from kfood_dist.pack.sources.cells import Row, Table
from kfood_dist.pack.sources.files import file_record
from kfood_dist.pack.sources.layout import split_of
from kfood_dist.pack.sources.names import file_name
from kfood_dist.pack.sources.record import SUFFIXES, Record, suffix
from kfood_dist.pack.sources.spelling import Files, SeveralFit

COLUMNS = ("image_path", "label")


def list_table(
    path: Path, image_root: Path, encoding: str | None = None, known: Collection[str] = ()
) -> Iterator[Record]:
    """One record per row, labelled as the row says; `known` labels help to tell the encoding where none is given.

    Raises SourceError when the file, its encoding or its columns cannot be read, or `image_root` is no folder.
    """
    if not os.path.isdir(image_root):
        raise SourceError(f"image root {image_root} is not a folder", "name the folder with --image-root DIR")
    try:
        data = path.read_bytes()
    except OSError as error:
        raise SourceError(f"{path} cannot be read ({error.strerror})", "check its permissions") from None
    files = Files(image_root)
    text = read_text(data, path, encoding, lambda text: _num_fitting(text, files, known))
    table = Table(text, COLUMNS)
    if any(table.header.count(name) != 1 for name in COLUMNS):
        raise SourceError(
            f"{path} has the columns {', '.join(table.header) or '(none)'}",
            "give it a first line `image_path,label`, each name once",
        )
    for row in _rows(table):
        if row.cells is None:
            detail = f"not {len(table.header)} columns: {row.text.strip()[:200]}"
            yield Record(path, f"{file_name(path.name)}:{row.line}", "", "", problem="bad_row", detail=detail)
        else:
            path_text, label, split = row.cells
            yield replace(_row_record(image_root, files, path_text, label), split=split_of(split) or split)


def _rows(table: Table) -> Iterator[Row]:
    """The rows of a table, of those that are sound path, label and split alone."""
    at_path, at_label = (table.header.index(name) for name in COLUMNS)
    at_split = table.header.index("split") if "split" in table.header else None
    for row in table.rows(lambda cells: suffix(cells[at_path].strip()) in SUFFIXES):
        cells = row.cells
        if cells is None or len(cells) != len(table.header) or not cells[at_path].strip():
            yield replace(row, cells=None)
        else:
            split = "" if at_split is None else cells[at_split].strip()
            yield replace(row, cells=[cells[at_path].strip().replace("\\", "/"), cells[at_label], split])


def _num_fitting(text: str, files: Files, known: Collection[str]) -> int:
    """How many paths of a table, read one way, lead to files, and how many of its labels are known; ASCII aside."""
    table, num_fitting = Table(text, COLUMNS), 0
    if not set(COLUMNS) <= set(table.header):
        return 0
    for path, label, _ in (row.cells for row in _rows(table) if row.cells is not None):
        num_fitting += not label.isascii() and clean(label) in known
        try:
            num_fitting += not path.isascii() and files.find(path) is not None
        except SeveralFit:
            num_fitting += 1
    return num_fitting


def _row_record(image_root: Path, files: Files, text: str, label: str) -> Record:
    try:
        found, spelled = files.find(text) or (image_root / text, text)
    except SeveralFit as several:
        record = Record(image_root / text, _named_from(image_root, text), problem="ambiguous_path")
        return replace(record, label=label, detail=f"any of {several}")
    source = _named_from(image_root, spelled)
    return replace(file_record(found, source), label=label)


def _named_from(image_root: Path, text: str) -> str:
    """A path as a record's source: from the root where it lies there."""
    source = posixpath.normpath(text)
    if posixpath.isabs(source) and Path(source).is_relative_to(image_root.absolute()):
        source = Path(source).relative_to(image_root.absolute()).as_posix()
    return source


def check_rows(records: Sequence[Record], known: Mapping[str, DishClass] | None) -> Iterator[Record]:
    """What only a table can get wrong: a label against the picture's own folder, and a row given twice.

    `known` are the classes by name, None where the labels found are the classes.
    """
    if known is None:
        labels = {record.label: record.label for record in records if record.problem in (None, "missing")}
    else:
        labels = {name: dish.name for name, dish in known.items()}
    seen: set[tuple[str, str]] = set()
    for record in records:
        folder = labels.get(clean(posixpath.basename(posixpath.dirname(record.source))))
        if record.problem is not None:
            yield record
        elif folder not in (None, record.label):
            yield replace(record, problem="label_disagrees", detail=f"lies in the folder of {folder}")
        elif (record.source, record.label) in seen:
            yield replace(record, problem="duplicate_row", detail="listed before with the same label")
        else:
            seen.add((record.source, record.label))
            yield record
