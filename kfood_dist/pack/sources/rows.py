"""Turns a row of a CSV or JSONL list into a record: its pictures, and a label or a question with its answer.

paths, label, split, columns ──► row_record ──► the file that each path means ──► Record
all records ──► check_rows ──► faults that only a list can have
"""

import posixpath
import unicodedata
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from kfood_dist.data.task.dish import DishClass, clean
from kfood_dist.pack.sources.files import file_record
from kfood_dist.pack.sources.layout import split_of
from kfood_dist.pack.sources.record import Record
from kfood_dist.pack.sources.spelling import Files, SeveralFit

# The columns that a list may have besides the pictures: a class, or a question and its answer.
LABEL, ASKED = "label", ("question", "answer")


def has_label_or_question(names: Collection[str]) -> bool:
    """Return whether a list with these columns describes its samples: by a label, or by a question and its answer."""
    return LABEL in names or set(ASKED) <= set(names)


def row_record(image_root: Path, files: Files, paths: Sequence[str], texts: Mapping[str, str], split: str) -> Record:
    """Return the record of one row: its first picture, the others as `more`. `texts` are those of its columns."""
    first, *more = [_picture(image_root, files, path) for path in paths]
    columns = tuple((name, _composed(texts[name])) for name in ASKED) if set(ASKED) <= set(texts) else ()
    record = replace(
        first, label=texts.get(LABEL, ""), split=split_of(split) or split, columns=columns, more=tuple(more)
    )
    for other in more:
        if record.problem is None and other.problem is not None:
            record = replace(record, problem=other.problem, detail=f"{other.source}: {other.detail}")
    empty = [name for name, text in columns if not text]
    if record.problem is None and empty:
        record = replace(record, problem="bad_row", detail=f"no {empty[0]}")
    return record


def _composed(text: str) -> str:
    """Return a text in NFC and without spaces around. A list that macOS made may be in NFD."""
    return unicodedata.normalize("NFC", text).strip()


def _picture(image_root: Path, files: Files, text: str) -> Record:
    try:
        found, spelled = files.find(text) or (image_root / text, text)
    except SeveralFit as several:
        record = Record(image_root / text, _named_from(image_root, text), problem="ambiguous_path")
        return replace(record, detail=f"may be any of {several}")
    return file_record(found, _named_from(image_root, spelled))


def _named_from(image_root: Path, text: str) -> str:
    """Return a path as a record's source: relative to the root if it is below the root."""
    source = posixpath.normpath(text)
    if posixpath.isabs(source) and Path(source).is_relative_to(image_root.absolute()):
        source = Path(source).relative_to(image_root.absolute()).as_posix()
    return source


def check_rows(records: Sequence[Record], known: Mapping[str, DishClass] | None) -> Iterator[Record]:
    """Yield the records, with a problem for a fault that only a list can have.

    The faults are a label that contradicts the picture's own folder, and a row given twice. `known` holds the classes
    by name. It is None if the labels found are the classes.
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
        elif record.label and folder not in (None, record.label):
            yield replace(record, problem="label_disagrees", detail=f"is in the folder of {folder}")
        elif (record.identity, record.label) in seen:
            yield replace(record, problem="duplicate_row", detail="listed before with the same words")
        else:
            seen.add((record.identity, record.label))
            yield record
