"""What there is to pack: one record per picture, from a folder in the AI-Hub layout or from a CSV.

    folder  …/구이/구이/갈비구이/Img_000_0001.jpg   class = own folder, category = the folder above it
    CSV     image_path,label                        paths start at the CSV's folder or at --image-root
       │
       ▼
    scan ──► records sorted by `source`; those with a `problem` will be refused under that name, not read

Names are compared in NFC, whatever the file system kept (macOS writes NFD); files are opened by their real
path. Only listings and sizes are read here, no picture.
"""

import csv
import io
import os
import posixpath
import stat
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from kfood_dist.data.images import ImageRejected
from kfood_dist.data.labels import MAX_SYLLABLES, DishClass, clean, normalise
from kfood_dist.errors import SourceError

SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".gif", ".bmp", ".webp"})

# No photograph comes near it; it keeps a mislabelled film or archive out of memory.
_MAX_FILE_BYTES = 256 * 2**20


@dataclass(frozen=True)
class Record:
    """One picture of a source: where it is opened, what it is called, what it shows.

    `source` is its path relative to the source's root in NFC, `num_bytes` its file size (0 when missing);
    `problem` is None or the reason why it cannot be used, and `detail` says so in words.
    """

    path: Path
    source: str
    label: str
    category: str
    num_bytes: int = 0
    problem: str | None = None
    detail: str = ""


def scan(source: Path, image_root: Path | None = None, classes: Sequence[DishClass] | None = None) -> list[Record]:
    """List the pictures of a folder or a CSV, sorted by name.

    With `classes`, labels become the names of that list (aliases count) and any other label is a problem.
    Raises SourceError when the source is missing, empty, of another kind, or not readable as what it is.
    """
    if not source.exists():
        raise SourceError(f"source {source} does not exist", "name a folder of pictures or a .csv")
    if source.is_dir():
        if image_root is not None:
            raise SourceError(f"--image-root does not go with the folder {source}", "leave it out")
        records = list(_scan_folder(source))
    elif source.suffix.lower() == ".csv":
        records = list(_scan_csv(source, image_root or source.parent))
    elif source.suffix.lower() == ".zip":
        raise SourceError(f"{source}: zip archives are not supported yet", "unpack it first and name the folder")
    else:
        raise SourceError(f"source {source} is neither a folder nor a .csv", "name one of these")
    if not records:
        raise SourceError(
            f"source {source} holds no pictures ({' '.join(sorted(SUFFIXES))})",
            "name the folder that holds the dishes' folders, or a CSV with rows",
        )
    known = None if classes is None else {name: dish for dish in classes for name in dish.accepted()}
    records = [_check_label(record, known) for record in records]
    if not source.is_dir():
        records = list(_check_rows(records, known))
    return sorted(records, key=lambda record: (record.source, str(record.path)))


def read_picture(record: Record) -> bytes:
    """The file's bytes; raises ImageRejected `unreadable` or `too_large`."""
    try:
        with open(record.path, "rb") as file:
            num_bytes = os.fstat(file.fileno()).st_size
            if num_bytes > _MAX_FILE_BYTES:
                raise ImageRejected("too_large", f"a file of {num_bytes:,} bytes")
            return file.read()
    except OSError as error:
        raise ImageRejected("unreadable", f"cannot be read ({error.strerror})") from None


# --- folders


def _scan_folder(root: Path) -> Iterator[Record]:
    root_name = _text(root.resolve().name)
    for path in _walk(root):
        parts = [_text(part) for part in path.relative_to(root).parts]
        folders = parts[:-1]
        dish = folders[-1] if folders else root_name
        yield _record(path, "/".join(parts), dish, _category(folders))


def _walk(root: Path) -> Iterator[Path]:
    """Every file with a picture's suffix, hidden ones aside; each real folder is entered once.

    Linked folders come last, so that a picture is named by its real place where it has one in the source, and
    loops end.
    """
    folders, links, entered = [root], list[Path](), set[tuple[int, int]]()
    while folders or links:
        folder = folders.pop() if folders else links.pop(0)
        try:
            status = folder.stat()
            if (status.st_dev, status.st_ino) in entered:
                continue
            entered.add((status.st_dev, status.st_ino))
            with os.scandir(folder) as listing:
                entries = sorted((e for e in listing if not e.name.startswith(".")), key=lambda e: e.name)
        except OSError as error:
            raise SourceError(f"folder {folder} cannot be listed ({error.strerror})", "check its permissions") from None
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                folders.append(folder / entry.name)
            elif entry.is_symlink() and os.path.isdir(entry.path):
                links.append(folder / entry.name)
            elif os.path.splitext(entry.name)[1].lower() in SUFFIXES:
                yield folder / entry.name
        links.sort()


def _category(folders: list[str]) -> str:
    """The nearest folder above the dish that is not called like it; "" when the dish's folder is on top.

    `folders` lead from the source's root to the picture, the last being the dish. Category folders may repeat
    (`구이/구이/갈비구이`, as extraction on Windows leaves them); a category may hold a dish of its own name, and
    then three in a row (`kfood/만두/만두/만두`) are that dish in its doubled category.
    """
    above = [unicodedata.normalize("NFC", name).strip() for name in folders[:-1]]
    dish = normalise(folders[-1]) if folders else ""
    others = [name for name in above if normalise(name) != dish]
    own_name = above[-2:] if len(above) >= 2 and all(normalise(name) == dish for name in above[-2:]) else []
    return (own_name or others or above or [""])[-1]


def _text(name: str) -> str:
    """A file name as text: names that are not UTF-8 are read as CP949, as Korean Windows wrote them."""
    try:
        name.encode("utf-8")
        return name
    except UnicodeEncodeError:
        return os.fsencode(name).decode("cp949", errors="replace")


# --- CSV


def _scan_csv(path: Path, image_root: Path) -> Iterator[Record]:
    if not image_root.is_dir():
        raise SourceError(f"image root {image_root} is not a folder", "name the folder with --image-root DIR")
    lines = io.StringIO(_read_text(path), newline=None)
    header = [name.strip() for name in _split_row(next(lines, "")) or []]
    if not {"image_path", "label"} <= set(header):
        raise SourceError(
            f"{path} has the columns {', '.join(header) or '(none)'}",
            "give it a first line `image_path,label`",
        )
    at_path, at_label = header.index("image_path"), header.index("label")
    for number, line in enumerate(lines, start=2):
        row = _split_row(line)
        if row == []:
            continue
        if row is None or len(row) != len(header) or not row[at_path].strip():
            detail = f"not {len(header)} columns: {line.strip()[:200]}"
            yield Record(path, f"{path.name}:{number}", "", "", problem="bad_row", detail=detail)
            continue
        yield _row_record(image_root, row[at_path].strip().replace("\\", "/"), row[at_label])


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
    folders = [part for part in source.split("/")[:-1] if part not in ("", "..")]
    return _record(found, source, label, _category(folders))


# --- both


def _record(path: Path, source: str, label: str, category: str) -> Record:
    source = unicodedata.normalize("NFC", source)
    try:
        status = path.stat()
    except (OSError, ValueError):  # ValueError: a NUL in a CSV's path
        return Record(path, source, label, category, problem="missing", detail="no such file")
    if not stat.S_ISREG(status.st_mode):
        return Record(path, source, label, category, problem="missing", detail="not a file")
    return Record(path, source, label, category, num_bytes=status.st_size)


def _check_label(record: Record, known: Mapping[str, DishClass] | None) -> Record:
    """The record with its label normalised, or with the problem of its label; `known`: classes by name."""
    if record.problem == "bad_row":
        return record
    cleaned = clean(record.label)
    if not 0 < len(cleaned) <= MAX_SYLLABLES:
        detail = f"{len(cleaned)} syllables" if cleaned else "no label"
        return replace(record, label=cleaned, problem="bad_label", detail=detail)
    if known is None:
        return replace(record, label=cleaned)
    dish = known.get(cleaned)
    if dish is None:
        return replace(record, label=cleaned, problem="unknown_label", detail="not in the class list")
    return replace(record, label=dish.name, category=dish.category or record.category)


def _check_rows(records: list[Record], known: Mapping[str, DishClass] | None) -> Iterator[Record]:
    """What only a table can get wrong: a label against the picture's own folder, and a row given twice."""
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
