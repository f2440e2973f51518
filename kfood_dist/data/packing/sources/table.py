"""Pictures listed in a CSV: `image_path,label`, the paths starting at one folder; `split` if the publisher has one.

A faulty row becomes a record that names it and costs no other; a row whose file is not there is `missing`.
"""

import csv
import io
import os
import posixpath
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from kfood_dist.data.labels import DishClass, normalise
from kfood_dist.data.packing.sources.files import file_record
from kfood_dist.data.packing.sources.layout import split_of
from kfood_dist.data.packing.sources.names import file_name
from kfood_dist.data.packing.sources.record import Record
from kfood_dist.errors import SourceError


def list_table(path: Path, image_root: Path) -> Iterator[Record]:
    """One record per row, labelled as the row says.

    Raises SourceError when the file or its columns cannot be read, or `image_root` is no folder.
    """
    if not os.path.isdir(image_root):
        raise SourceError(f"image root {image_root} is not a folder", "name the folder with --image-root DIR")
    lines = io.StringIO(_read_text(path), newline=None)
    header = [name.strip() for name in _split_row(next(lines, "")) or []]
    if not {"image_path", "label"} <= set(header):
        raise SourceError(
            f"{path} has the columns {', '.join(header) or '(none)'}",
            "give it a first line `image_path,label`",
        )
    at_path, at_label = header.index("image_path"), header.index("label")
    at_split = header.index("split") if "split" in header else None
    for number, line in enumerate(lines, start=2):
        row = _split_row(line)
        if row == []:
            continue
        if row is None or len(row) != len(header) or not row[at_path].strip():
            detail = f"not {len(header)} columns: {line.strip()[:200]}"
            yield Record(path, f"{file_name(path.name)}:{number}", "", "", problem="bad_row", detail=detail)
            continue
        split = "" if at_split is None else row[at_split].strip()
        record = _row_record(image_root, row[at_path].strip().replace("\\", "/"), row[at_label])
        yield replace(record, split=split_of(split) or split)


def _read_text(path: Path) -> str:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise SourceError(f"{path} cannot be read ({error.strerror})", "check its permissions") from None
    for encoding in ("utf-8-sig", "cp949"):
        try:
            return data.decode(encoding)
        except UnicodeDecodeError:
            continue
    raise SourceError(f"{path} is neither UTF-8 nor CP949 text", "save it as CSV UTF-8")


def _split_row(line: str) -> list[str] | None:
    """One line's cells: [] when blank, None when malformed. By line, so that a stray quote costs one row."""
    if not line.strip():
        return []
    try:
        return next(csv.reader([line.strip("\n")], strict=True))
    except csv.Error:
        return None


def _row_record(image_root: Path, text: str, label: str) -> Record:
    spellings = (text, unicodedata.normalize("NFC", text), unicodedata.normalize("NFD", text))
    found = next((image_root / s for s in spellings if os.path.isfile(image_root / s)), image_root / text)
    source = posixpath.normpath(text)
    if posixpath.isabs(source) and Path(source).is_relative_to(image_root.absolute()):
        source = Path(source).relative_to(image_root.absolute()).as_posix()
    return replace(file_record(found, source), label=label)


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
        folder = labels.get(normalise(posixpath.basename(posixpath.dirname(record.source))))
        if record.problem is not None:
            yield record
        elif folder not in (None, record.label):
            yield replace(record, problem="label_disagrees", detail=f"lies in the folder of {folder}")
        elif (record.source, record.label) in seen:
            yield replace(record, problem="duplicate_row", detail="listed before with the same label")
        else:
            seen.add((record.source, record.label))
            yield record
