"""Zips for the packing tests, with names as Korean Windows, macOS and other systems write them, and with faults."""

import io
import struct
import unicodedata
import zipfile
from collections.abc import Iterable
from pathlib import Path

_UTF8_FLAG = 0x800

# Fields of a directory entry: the offset in the entry and the type (APPNOTE.TXT 4.3.12).
FLAGS, METHOD, CRC, PACKED, UNPACKED, OFFSET = (8, "<H"), (10, "<H"), (16, "<I"), (20, "<I"), (24, "<I"), (42, "<I")
_ENTRY_BYTES = 46


class _Named(zipfile.ZipInfo):
    """A member whose name is written as the bytes in `raw`."""

    raw: bytes
    flag: int

    def _encodeFilenameFlags(self):
        return self.raw, self.flag


def zipped(
    members: dict[str | bytes, bytes] | Iterable[tuple[str | bytes, bytes]],
    writer: str = "windows",
    method: int = zipfile.ZIP_STORED,
    extra: bytes = b"",
) -> bytes:
    """Return a zip of `members` in their order, each with the `extra` field.

    Names that are bytes are written unchanged. Others depend on `writer`: `windows` writes CP949, `macos` writes UTF-8
    in NFD, and `flagged` writes UTF-8 and sets the flag for UTF-8.
    """
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", method) as archive:
        for name, data in members.items() if isinstance(members, dict) else members:
            info = _Named(str(len(archive.filelist)))
            info.compress_type = method
            info.extra = extra
            info.raw, info.flag = _raw_name(name, writer)
            archive.writestr(info, data)
    return file.getvalue()


def _raw_name(name: str | bytes, writer: str) -> tuple[bytes, int]:
    if isinstance(name, bytes):
        return name, 0
    if writer == "windows":
        return name.encode("cp949"), 0
    if writer == "macos":
        return unicodedata.normalize("NFD", name).encode("utf-8"), 0
    return name.encode("utf-8"), _UTF8_FLAG


def with_field(data: bytes, number: int, field: tuple[int, str], value: int) -> bytes:
    """Return the zip with one field of directory entry `number` overwritten."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        at = archive.start_dir
    for _ in range(number):
        lengths = struct.unpack_from("<HHH", data, at + 28)
        at += _ENTRY_BYTES + sum(lengths)
    assert data[at : at + 4] == b"PK\1\2"
    offset, kind = field
    changed = bytearray(data)
    struct.pack_into(kind, changed, at + offset, value)
    return bytes(changed)


def as_folder(path: Path, members: dict[str, bytes]) -> Path:
    """Write the members as files under `path`, and return it."""
    for name, data in members.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(data)
    return path
