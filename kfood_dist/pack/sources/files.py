"""Lists pictures that are files in folders, and the zips among them.

Each real folder is entered once, linked folders last. A zip is read like the folder that it would be extracted to. If
that folder is beside the zip, the folder is read instead.
"""

import os
import stat
import unicodedata
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from kfood_dist.errors import SourceError
from kfood_dist.pack.sources.boxes import LIST_NAME, BoxCount, give_boxes, read_list_file
from kfood_dist.pack.sources.ignored import IgnoredFiles, made_by_machine
from kfood_dist.pack.sources.names import file_name, file_side
from kfood_dist.pack.sources.read import is_fault_of_one_file
from kfood_dist.pack.sources.record import SUFFIXES, Record, suffix
from kfood_dist.pack.sources.zips import ZipRejected, list_zip


def list_folder(root: Path, ignored: IgnoredFiles) -> tuple[list[Record], BoxCount]:
    """List the pictures under a folder. Files that are not pictures are counted in `ignored`.

    Raises SourceError if a folder cannot be listed.
    """
    pictures, zipped, count = list[Record](), list[Record](), BoxCount()
    paths = [(path, path.relative_to(root).parts) for path in _walk(root, ignored)]
    side = file_side(part for _, parts in paths for part in parts)
    for path, parts in paths:
        source = "/".join(file_name(part, side) for part in parts)
        if suffix(path.name) not in SUFFIXES | {".zip"}:
            ignored.add(source)
            continue
        record = file_record(path, source)
        if suffix(path.name) != ".zip" or record.problem is not None:
            pictures.append(record)
            continue
        found, found_count = _zip_in_folder(record, ignored)
        zipped += found
        count += found_count
    pictures, own_count = give_boxes(pictures, lambda record: str(record.path.parent), read_list_file)
    return pictures + zipped, count + own_count


def _zip_in_folder(record: Record, ignored: IgnoredFiles) -> tuple[list[Record], BoxCount]:
    if _is_extracted(record.path):
        ignored.add(record.source, "extracted")
        return [], BoxCount()
    try:
        found, count = list_zip(record.path, record.source, ignored)
    except ZipRejected as rejected:
        if _is_last_part(record.path):
            ignored.add(record.source)
            return [], BoxCount()
        return [replace(record, problem=rejected.reason, detail=rejected.detail)], BoxCount()
    except OSError as error:
        if is_fault_of_one_file(error):
            detail = f"cannot be read ({error.strerror})"
            return [replace(record, problem="unreadable_archive", detail=detail)], BoxCount()
        raise SourceError(f"{record.path} cannot be read ({error.strerror})", "check its disk") from None
    if not found:
        ignored.add(record.source)
    return found, count


def _is_last_part(path: Path) -> bool:
    """Return whether a zip is the last part of a zip that was split into .z01, .z02 and so on."""
    return any(path.with_suffix(first).exists() for first in (".z01", ".Z01"))


def _is_extracted(path: Path) -> bool:
    """Return whether the folder that a zip was extracted to is beside it."""
    stem = path.name[: -len(".zip")]
    spellings = (stem, unicodedata.normalize("NFC", stem), unicodedata.normalize("NFD", stem))
    return any(name and (path.parent / name).is_dir() for name in spellings)


def file_record(path: Path, source: str) -> Record:
    """Return the record of a file, without a label. Its problem is `missing` if there is no such file."""
    source = unicodedata.normalize("NFC", source)
    try:
        status = path.stat()
    except (OSError, ValueError):  # ValueError: a NUL in a CSV's path
        return Record(path, source, problem="missing", detail="no such file")
    if not stat.S_ISREG(status.st_mode):
        return Record(path, source, problem="missing", detail="not a file")
    changed_ns = max(status.st_mtime_ns, status.st_ctime_ns)
    return Record(path, source, num_bytes=status.st_size, changed_ns=changed_ns)


def _walk(root: Path, ignored: IgnoredFiles) -> Iterator[Path]:
    """Yield every file except box lists and machine-made files. The latter are counted in `ignored`.

    Each real folder is entered once, so loops of links end. Linked folders come last, so a picture is named by its real
    place if that is in the source.
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
                entries = sorted(listing, key=lambda e: e.name)
        except OSError as error:
            raise SourceError(f"folder {folder} cannot be listed ({error.strerror})", "check its permissions") from None
        for entry in entries:
            if made_by := made_by_machine([entry.name]):
                ignored.add_made(Path(entry.path), made_by)
            elif entry.is_dir(follow_symlinks=False):
                folders.append(folder / entry.name)
            elif entry.is_symlink() and os.path.isdir(entry.path):
                links.append(folder / entry.name)
            elif entry.name != LIST_NAME:
                yield folder / entry.name
        links.sort()
