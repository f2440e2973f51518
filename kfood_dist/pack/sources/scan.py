"""A source, whatever its shape, to one sorted list of records.

    folder, zip ──► files, zips ──► labels and categories by name ─┐
    CSV, JSONL  ──► rows ──────────────────────────────────────────┴──► checks ──► records sorted by `source`

Always holds: of records from folders and zips no two have the same `source`; those with a `problem` will be
refused under that name and are not read.
"""

import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

from kfood_dist.data.task.dish import MAX_SYLLABLES, DishClass, clean, num_syllables
from kfood_dist.errors import SourceError
from kfood_dist.pack.sources.boxes import BoxCount, give_boxes, read_list_file
from kfood_dist.pack.sources.files import list_folder
from kfood_dist.pack.sources.jsonl import list_jsonl
from kfood_dist.pack.sources.layout import holds_labels, without_zip
from kfood_dist.pack.sources.names import file_name, listed, named
from kfood_dist.pack.sources.opened import close_all
from kfood_dist.pack.sources.passed import PassedBy, container_kind, how_to_read, list_counts
from kfood_dist.pack.sources.record import SUFFIXES, Record, suffix
from kfood_dist.pack.sources.rows import check_rows
from kfood_dist.pack.sources.table import list_table
from kfood_dist.pack.sources.zips import ZipRejected, list_zip
from kfood_dist.system.utf8 import require_utf8_names

# Of a record with another problem nothing can be said by its label.
_STILL_CHECKED = (None, "missing")


@dataclass(frozen=True)
class Scan:
    """What a source holds: `kind` is folder, zip, csv or jsonl; `boxes` says what its lists of boxes were worth.

    `passed` counts the files that are no pictures.
    """

    kind: str
    records: list[Record]
    boxes: BoxCount
    passed: PassedBy


def scan(
    source: Path,
    image_root: Path | None = None,
    classes: Sequence[DishClass] | None = None,
    encoding: str | None = None,
) -> list[Record]:
    """The records of `scan_source`."""
    return scan_source(source, image_root, classes, encoding).records


def scan_source(
    source: Path,
    image_root: Path | None = None,
    classes: Sequence[DishClass] | None = None,
    encoding: str | None = None,
) -> Scan:
    """List the samples of a folder, a zip, a CSV or a JSONL file, sorted by name.

    `image_root` is where the paths of a list start, `encoding` a CSV's.

    With `classes`, labels become the names of that list (aliases count) and any other label is a problem.
    Raises SourceError when the source is missing, empty, of another kind, or not readable as what it is, and
    LaunchError in a process that reads the names of files in another encoding than UTF-8.
    """
    require_utf8_names()
    kind = _kind(source)
    is_list = kind in ("csv", "jsonl")
    for option, value, goes in (("--image-root", image_root, is_list), ("--encoding", encoding, kind == "csv")):
        if value is not None and not goes:
            raise SourceError(f"{option} does not go with the {kind} {source}", "leave it out")
    known = None if classes is None else {name: dish for dish in classes for name in dish.accepted()}
    passed = PassedBy()
    try:
        if is_list:
            records, boxes = _list_rows(kind, source, image_root or source.parent, encoding, known or ())
        else:
            records, boxes = _LISTING[kind](source, passed)
    finally:
        close_all()
    if is_list:
        records = listed(records)
    else:
        records = _without_labels(records, passed)
        records = named(records, without_zip(file_name(source.resolve().name)), known or ())
    if not records:
        raise _no_pictures(source, passed)
    if known is None:
        _require_no_file_names(records)
    is_asked = any(record.columns for record in records) and not any(clean(record.label) for record in records)
    if known is not None and is_asked:
        raise SourceError(f"{source} has no labels, which --classes is about", "leave --classes out")
    records = [
        replace(record, label="") if is_asked and record.columns else _check_label(record, known) for record in records
    ]
    records = list(check_rows(records, known)) if is_list else _with_own_names(records)
    return Scan(kind, sorted(records, key=_order), boxes, passed)


def _no_pictures(source: Path, passed: PassedBy) -> SourceError:
    remedies = ["name the folder or the zip that holds the dishes' folders, or a CSV with rows"]
    for kind, (_, first) in sorted(passed.containers.items()):
        remedies.append(f"{first}: {how_to_read(kind, str(source / first))}")
    holds = f", but {list_counts(passed.by_suffix)}" if passed.by_suffix else ""
    return SourceError(f"source {source} holds no pictures{holds}", "; ".join(remedies))


def _without_labels(records: Sequence[Record], passed: PassedBy) -> list[Record]:
    """The records that lie in no folder or zip of labels; the others are counted."""
    kept = list[Record]()
    for record in records:
        if holds_labels(record.source):
            passed.add(record.source)
        else:
            kept.append(record)
    return kept


def _require_no_file_names(records: Sequence[Record]) -> None:
    """Raise SourceError for a dish or category that is called like a picture's file: its folder is a machine's."""
    for record in records:
        for name in (record.label, record.category):
            if suffix(name.strip()) in SUFFIXES:
                raise SourceError(
                    f"{record.source} would be of the dish or category {name}, a picture's name: is that meant?",
                    "if so, rename its folder, or name all dishes with --classes; if not, take the folder out of the "
                    "source",
                )


def _order(record: Record) -> tuple[str, str, str]:
    return record.source, str(record.path), record.identity


def _kind(source: Path) -> str:
    try:
        exists = source.exists()
    except OSError as error:
        raise SourceError(f"source {source} cannot be read ({error.strerror})", "check its permissions") from None
    if not exists:
        raise SourceError(f"source {source} does not exist", "name a folder of pictures, a .zip, .csv or .jsonl")
    kind = "folder" if source.is_dir() else source.suffix.lower().removeprefix(".")
    kind = "csv" if kind == "tsv" else kind
    if kind not in (*_LISTING, "csv", "jsonl"):
        container = container_kind(source.name)
        remedy = how_to_read(container, str(source)) if container else "name one of these"
        raise SourceError(f"source {source} is neither a folder nor a .zip, .csv or .jsonl", remedy)
    return kind


def _list_zip(source: Path, passed: PassedBy) -> tuple[list[Record], BoxCount]:
    try:
        return list_zip(source, "", passed)
    except ZipRejected as rejected:
        raise SourceError(
            f"{source} cannot be read: {rejected.detail}", "download it again, or mend it with `zip -FF`"
        ) from None
    except OSError as error:
        raise SourceError(f"{source} cannot be read ({error.strerror})", "check its permissions") from None


def _list_rows(
    kind: str, source: Path, image_root: Path, encoding: str | None, known: Collection[str]
) -> tuple[list[Record], BoxCount]:
    if not os.path.isdir(image_root):
        raise SourceError(f"image root {image_root} is not a folder", "name the folder with --image-root DIR")
    records = list(
        list_jsonl(source, image_root) if kind == "jsonl" else list_table(source, image_root, encoding, known)
    )
    pictures = [picture for record in records for picture in record.pictures]
    boxed, boxes = give_boxes(pictures, lambda picture: str(picture.path.parent), read_list_file)
    given = iter(boxed)
    records = [replace(next(given), more=tuple(islice(given, len(record.more)))) for record in records]
    # A list may well name some of a folder's pictures only.
    return records, replace(boxes, lines_unmatched=0)


_LISTING = {"folder": list_folder, "zip": _list_zip}


def _check_label(record: Record, known: Mapping[str, DishClass] | None) -> Record:
    """The record with its label cleaned, or with the problem of its label; `known`: a class list's classes by name."""
    if record.problem not in _STILL_CHECKED:
        return record
    cleaned = clean(record.label)
    if "\ufffd" in cleaned:
        return replace(record, label=cleaned, problem="bad_label", detail="written in no known encoding")
    if not cleaned:
        return replace(record, label=cleaned, problem="bad_label", detail="no label")
    if known is None:
        return replace(record, label=cleaned)
    if (length := num_syllables(cleaned)) > MAX_SYLLABLES:
        return replace(record, label=cleaned, problem="bad_label", detail=f"{length} syllables")
    dish = known.get(cleaned)
    if dish is None:
        return replace(record, label=cleaned, problem="unknown_label", detail="not in the class list")
    return replace(record, label=dish.name, category=dish.category or record.category)


def _with_own_names(records: Sequence[Record]) -> list[Record]:
    """The records, those called like another numbered: two spellings of a name, or a name twice in a zip.

    The first of them by path, sound ones before others, keeps the name.
    """
    own, seen = list[Record](), set[str]()
    numbers: dict[str, int] = {}  # the last given to each name: all below it are taken
    for record in sorted(records, key=lambda record: (record.problem is not None, _order(record))):
        name = record.source
        stem, dot = os.path.splitext(name)
        while name in seen:
            numbers[record.source] = number = numbers.get(record.source, 1) + 1
            name = f"{stem} ({number}){dot}"
        seen.add(name)
        own.append(record if name == record.source else replace(record, source=name))
    return own
