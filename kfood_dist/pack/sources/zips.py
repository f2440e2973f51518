"""Lists the pictures in a zip, and in the zips inside it, without unpacking anything to disk.

    kfood.zip ─┬─ 구이.zip (stored) ──► Archive: a window of kfood.zip ──► its members ──► records
               ├─ 국.zip (compressed) ─► unpacked in memory, up to a limit ─► its members ──► records
               └─ 구이/불고기/a.jpg ──────────────────────────────────────────────────────► a record

Always holds: a damaged zip inside is named, and only its own pictures are lost; no member's name is ever used to open
or write a file; of several members with one name the last counts, as it would after extraction.
"""

import os
import stat
import struct
import unicodedata
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from kfood_dist.data.picture.images import ImageRejected
from kfood_dist.pack.sources.boxes import LIST_NAME, MAX_LIST_BYTES, BoxCount, give_boxes
from kfood_dist.pack.sources.ignored import IgnoredFiles, made_by_machine
from kfood_dist.pack.sources.names import is_unsafe_path, member_name, member_side
from kfood_dist.pack.sources.opened import MAX_UNPACKED_BYTES, open_view
from kfood_dist.pack.sources.read import data_offset, read_member
from kfood_dist.pack.sources.record import SUFFIXES, Archive, Member, Record, suffix

# APPNOTE.TXT 4.4.4: general purpose bit 0.
_ENCRYPTED_FLAG = 0x1
_LOCAL_HEADER_BYTES = 30
_INPUTS = SUFFIXES | {".zip"}


# The errors that zipfile raises for a damaged directory. ValueError: a name is not the UTF-8 that its flag says.
# OSError: a position before the start, because the view turns every other OSError into a SourceError.
_DAMAGE = (zipfile.BadZipFile, NotImplementedError, ValueError, OverflowError, EOFError, OSError, struct.error)


class ZipRejected(Exception):
    """A zip that is not read. `reason` is one word, used for counting. `detail` is a sentence for a person."""

    def __init__(self, reason: str, detail: str):
        super().__init__(reason, detail)
        self.reason = reason
        self.detail = detail


@dataclass(frozen=True)
class _Entry:
    """A member that is listed: its name, whether the name is unsafe, and its entry in the zip's directory."""

    name: str
    unsafe: bool
    info: zipfile.ZipInfo


def list_zip(path: Path, under: str, ignored: IgnoredFiles) -> tuple[list[Record], BoxCount]:
    """List the pictures of the zip `path` and of the zips in it. The names of the records start with `under`.

    Files that are not pictures are counted in `ignored`. Raises ZipRejected if the zip is damaged or incomplete. Raises
    OSError if it cannot be opened.
    """
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise ZipRejected("unreadable_archive", "not a file")
    with open(path, "rb") as file:
        status = os.fstat(file.fileno())
    archive = Archive(path, status.st_size, status.st_mtime_ns, start=0, num_bytes=status.st_size)
    return _list(archive, under, ignored, may_hold_zips=True)


def _list(archive: Archive, under: str, ignored: IgnoredFiles, may_hold_zips: bool) -> tuple[list[Record], BoxCount]:
    entries = list(_entries(_directory(archive), under, ignored))
    last = {entry.name: entry for entry in entries}
    pictures, inner, lists = list[Record](), list[Record](), dict[str, Member]()
    count = BoxCount()
    for entry in entries:
        source = f"{under}/{entry.name}" if under else entry.name
        member = _member(archive, entry.info)
        record = Record(archive.path, source, num_bytes=entry.info.file_size, member=member)
        if suffix(entry.name) not in _INPUTS and not entry.unsafe:
            lists[source.rpartition("/")[0]] = member
        elif entry.unsafe:
            pictures.append(_refused(record, "unsafe_path", "its name points outside the zip"))
        elif last[entry.name] is not entry:
            pictures.append(_refused(record, "duplicate_member", "a later member of the zip has the same name"))
        elif entry.info.flag_bits & _ENCRYPTED_FLAG:
            pictures.append(_refused(record, "encrypted", "needs a password; make a zip without one"))
        elif suffix(entry.name) in SUFFIXES:
            pictures.append(record)
        else:
            found, found_count = _list_inner(record, member, ignored, may_hold_zips)
            inner += found
            count += found_count
    pictures, own_count = give_boxes(
        pictures,
        place_of=lambda record: record.source.rpartition("/")[0],
        read_list=lambda place: _read_list(lists[place]) if place in lists else None,
    )
    return pictures + inner, count + own_count


def _list_inner(
    record: Record, member: Member, ignored: IgnoredFiles, may_be_read: bool
) -> tuple[list[Record], BoxCount]:
    """List the pictures of a zip inside a zip. If that zip is refused, give its record as one refused input."""
    try:
        if not may_be_read:
            raise ZipRejected("nested_archive", "a zip in a zip in a zip; extract the outermost and pack the folder")
        found, count = _list(_inner(member), record.source, ignored, may_hold_zips=False)
    except ZipRejected as rejected:
        return [_refused(record, rejected.reason, rejected.detail)], BoxCount()
    if not found:
        ignored.add(record.source)
    return found, count


def _inner(member: Member) -> Archive:
    """Return the zip that a member is: a window if it is stored, else a zip to be unpacked in memory."""
    outer = member.archive
    if member.method == zipfile.ZIP_STORED:
        try:
            at = data_offset(open_view(outer, read_member), member.offset)
        except _DAMAGE as error:
            raise ZipRejected("unreadable_archive", str(error)) from None
        if member.packed_bytes != member.num_bytes or at + member.num_bytes > outer.num_bytes:
            raise ZipRejected("unreadable_archive", "its size in the outer zip's directory is wrong")
        return Archive(outer.path, outer.file_bytes, outer.mtime_ns, outer.start + at, member.num_bytes)
    if member.num_bytes > MAX_UNPACKED_BYTES:
        detail = f"{member.num_bytes:,} bytes, compressed in a zip; extract the outer zip and pack the folder"
        raise ZipRejected("too_large", detail)
    return Archive(outer.path, outer.file_bytes, outer.mtime_ns, 0, member.num_bytes, packed=member)


def _directory(archive: Archive) -> list[zipfile.ZipInfo]:
    """Return the directory of a zip. Raises ZipRejected if it is damaged or its members overlap."""
    try:
        with zipfile.ZipFile(open_view(archive, read_member)) as opened:
            infos, end = opened.infolist(), opened.start_dir
    except _DAMAGE as error:
        raise ZipRejected("unreadable_archive", f"not a complete zip ({error})") from None
    except ImageRejected as error:
        raise ZipRejected("unreadable_archive", error.detail) from None
    spans = sorted((info.header_offset, info.header_offset + _num_bytes_at_least(info)) for info in infos)
    if any(first_end > second for (_, first_end), (second, _) in pairwise([*spans, (end, end)])):
        raise ZipRejected("unreadable_archive", "its members overlap")
    if spans and spans[0][0] < 0:
        raise ZipRejected("unreadable_archive", "its first bytes are missing")
    return infos


def _num_bytes_at_least(info: zipfile.ZipInfo) -> int:
    return _LOCAL_HEADER_BYTES + info.compress_size


def _entries(infos: list[zipfile.ZipInfo], under: str, ignored: IgnoredFiles) -> Iterator[_Entry]:
    """Yield the pictures, zips and box lists among the members. Other files are counted in `ignored`."""
    side = member_side(infos)
    for info in infos:
        name = unicodedata.normalize("NFC", member_name(info, side))
        unsafe = is_unsafe_path(name)
        parts = [part for part in name.replace("\\", "/").split("/") if part not in ("", ".")]
        if not parts or name.endswith("/"):
            continue
        if made_by := made_by_machine(parts):
            ignored.machine_made[made_by] += 1
        # Some programs end a name at a NUL and others do not, so both readings of such a name are checked.
        elif any(suffix(file) in _INPUTS for file in (parts[-1], *parts[-1].split("\0"))):
            yield _Entry(name if unsafe else "/".join(parts), unsafe, info)
        elif not unsafe and parts[-1] == LIST_NAME:
            yield _Entry("/".join(parts), False, info)
        else:
            ignored.add("/".join([under, *parts] if under else parts))


def _member(archive: Archive, info: zipfile.ZipInfo) -> Member:
    return Member(archive, info.header_offset, info.compress_size, info.file_size, info.CRC, info.compress_type)


def _refused(record: Record, problem: str, detail: str) -> Record:
    return Record(record.path, record.source, "", "", record.num_bytes, problem, detail, record.member)


def _read_list(member: Member) -> bytes:
    if member.num_bytes > MAX_LIST_BYTES:
        raise ImageRejected("too_large", f"{member.num_bytes:,} bytes")
    return read_member(member)
