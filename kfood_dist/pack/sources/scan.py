"""Turns a source of any kind into one sorted list of records.

    folder, zip ──► files, zips ──► labels and categories by name ─┐
    CSV, JSONL  ──► rows ──────────────────────────────────────────┴──► checks ──► records sorted by `source`

Always holds: no two records from folders and zips have the same `source`; a record with a `problem` is refused under
that name and its picture is not read.
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
from kfood_dist.pack.sources.ignored import IgnoredFiles, container_kind, how_to_read, list_counts
from kfood_dist.pack.sources.jsonl import list_jsonl
from kfood_dist.pack.sources.layout import holds_labels, without_zip
from kfood_dist.pack.sources.names import file_name, listed, named
from kfood_dist.pack.sources.opened import close_all
from kfood_dist.pack.sources.record import SUFFIXES, Record, suffix
from kfood_dist.pack.sources.rows import check_rows
from kfood_dist.pack.sources.table import list_table
from kfood_dist.pack.sources.zips import ZipRejected, list_zip
from kfood_dist.system.utf8 import require_utf8_names

# The label of a record with any other problem says nothing, so it is not checked.
_STILL_CHECKED = (None, "missing")


@dataclass(frozen=True)
class Scan:
    """What a source holds.

    `kind` is folder, zip, csv or jsonl. `boxes` holds the counts of its box lists. `ignored` counts the files that are
    not pictures.
    """

    kind: str
    records: list[Record]
    boxes: BoxCount
    ignored: IgnoredFiles


def scan(
    source: Path,
    image_root: Path | None = None,
    classes: Sequence[DishClass] | None = None,
    encoding: str | None = None,
) -> list[Record]:
    """Return the records of `scan_source`."""
    return scan_source(source, image_root, classes, encoding).records


def scan_source(
    source: Path,
    image_root: Path | None = None,
    classes: Sequence[DishClass] | None = None,
    encoding: str | None = None,
) -> Scan:
    """List the samples of a folder, a zip, a CSV or a JSONL file, sorted by name.

    `image_root` is the folder where the paths of a list start. `encoding` is the encoding of a CSV.

    With `classes`, labels become the names in that list (aliases count), and any other label is a problem. Raises
    SourceError if the source is missing, empty, of another kind, or not readable as its kind. Raises LaunchError in a
    process that reads file names in an encoding other than UTF-8.
    """
    require_utf8_names()
    kind = _kind(source)
    is_list = kind in ("csv", "jsonl")
    for option, value, goes in (("--image-root", image_root, is_list), ("--encoding", encoding, kind == "csv")):
        if value is not None and not goes:
            raise SourceError(f"{option} does not go with the {kind} {source}", "leave it out")
    known = None if classes is None else {name: dish for dish in classes for name in dish.accepted()}
    ignored = IgnoredFiles()
    try:
        if is_list:
            records, boxes = _list_rows(kind, source, image_root or source.parent, encoding, known or ())
        else:
            records, boxes = _LISTING[kind](source, ignored)
    finally:
        close_all()
    if is_list:
        records = listed(records)
    else:
        records = _without_labels(records, ignored)
        records = named(records, without_zip(file_name(source.resolve().name)), known or ())
    if not records:
        raise _no_pictures(source, ignored)
    if known is None:
        _require_no_file_names(records)
    is_asked = any(record.columns for record in records) and not any(clean(record.label) for record in records)
    if known is not None and is_asked:
        raise SourceError(f"{source} has no labels, but --classes needs them", "leave --classes out")
    records = [
        replace(record, label="") if is_asked and record.columns else _check_label(record, known) for record in records
    ]
    records = list(check_rows(records, known)) if is_list else _with_unique_names(records)
    return Scan(kind, sorted(records, key=_order), boxes, ignored)


def _no_pictures(source: Path, ignored: IgnoredFiles) -> SourceError:
    remedies = ["name the folder or the zip that holds the dishes' folders, or a CSV with rows"]
    for kind, (_, first) in sorted(ignored.containers.items()):
        remedies.append(f"{first}: {how_to_read(kind, str(source / first))}")
    holds = f", but {list_counts(ignored.by_suffix)}" if ignored.by_suffix else ""
    return SourceError(f"source {source} holds no pictures{holds}", "; ".join(remedies))


def _without_labels(records: Sequence[Record], ignored: IgnoredFiles) -> list[Record]:
    """Return the records that are not in a folder or zip of labels. The others are counted in `ignored`."""
    kept = list[Record]()
    for record in records:
        if holds_labels(record.source):
            ignored.add(record.source)
        else:
            kept.append(record)
    return kept


def _require_no_file_names(records: Sequence[Record]) -> None:
    """Raise SourceError for a dish or category with the name of a picture file: a machine may have made its folder."""
    for record in records:
        for name in (record.label, record.category):
            if suffix(name.strip()) in SUFFIXES:
                raise SourceError(
                    f"{record.source} would get the dish or category {name}, a picture's name: is that meant?",
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


def _list_zip(source: Path, ignored: IgnoredFiles) -> tuple[list[Record], BoxCount]:
    try:
        return list_zip(source, "", ignored)
    except ZipRejected as rejected:
        raise SourceError(
            f"{source} cannot be read: {rejected.detail}", "download it again, or repair it with `zip -FF`"
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
    # A list may name only some pictures of a folder, so a box without a picture is not counted.
    return records, replace(boxes, lines_unmatched=0)


_LISTING = {"folder": list_folder, "zip": _list_zip}


def _check_label(record: Record, known: Mapping[str, DishClass] | None) -> Record:
    """Return the record with a cleaned label or the problem of its label. `known` holds a class list by name."""
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


def _with_unique_names(records: Sequence[Record]) -> list[Record]:
    """Return the records with a number added to every repeated name.

    Two records have one name if it exists in two spellings, or twice in a zip. The first one keeps the name: records
    without a problem come before others, then the path decides.
    """
    own, seen = list[Record](), set[str]()
    numbers: dict[str, int] = {}  # the last number given to each name: all lower numbers are taken
    for record in sorted(records, key=lambda record: (record.problem is not None, _order(record))):
        name = record.source
        stem, dot = os.path.splitext(name)
        while name in seen:
            numbers[record.source] = number = numbers.get(record.source, 1) + 1
            name = f"{stem} ({number}){dot}"
        seen.add(name)
        own.append(record if name == record.source else replace(record, source=name))
    return own
