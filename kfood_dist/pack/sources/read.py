"""Reads the bytes of one record, from its file or from its zip, never more than MAX_FILE_BYTES.

A fault of one picture raises ImageRejected. If the source itself is gone, a SourceError stops the packing, because
otherwise every later picture would be refused.
"""

import errno
import os
import struct
import zipfile
import zlib
from typing import BinaryIO

from kfood_dist.data.picture.images import ImageRejected
from kfood_dist.errors import SourceError
from kfood_dist.pack.sources.opened import changed, open_view, require_unchanged
from kfood_dist.pack.sources.record import MAX_FILE_BYTES, Member, Record

# Errors of one file. Any other error (the file is gone, an input error, a stale mount) is a fault of the source.
_FAULTS_OF_ONE_FILE = {errno.EACCES, errno.EPERM, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG}

# APPNOTE.TXT 4.3.7, local file header: signature, 22 bytes that the directory repeats, two lengths.
_LOCAL_HEADER = struct.Struct("<4s22xHH")
_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)


def read_picture(record: Record) -> bytes:
    """Return the bytes of the picture file.

    Raises ImageRejected `unreadable` or `too_large`. Raises SourceError if the source is gone, has changed since it was
    listed, or its disk fails.
    """
    return _read_file(record) if record.member is None else read_member(record.member)


def is_fault_of_one_file(error: OSError) -> bool:
    """Return whether an error concerns one file, not its disk or its folder."""
    return error.errno in _FAULTS_OF_ONE_FILE


def _read_file(record: Record) -> bytes:
    try:
        with open(record.path, "rb") as file:
            num_bytes = os.fstat(file.fileno()).st_size
            if num_bytes != record.num_bytes:
                raise changed(record.path)
            if num_bytes > MAX_FILE_BYTES:
                raise ImageRejected("too_large", f"a file of {num_bytes:,} bytes")
            return file.read(num_bytes)  # a special file, such as one in /proc, has size 0 and gives nothing
    except OSError as error:
        if is_fault_of_one_file(error):
            raise ImageRejected("unreadable", f"cannot be read ({error.strerror})") from None
        raise SourceError(
            f"{record.path} was listed and can no longer be read ({error.strerror})",
            "bring it and its disk back, or take it out of the source; then run the same command again",
        ) from None


def read_member(member: Member) -> bytes:
    """Return the unpacked bytes of a zip's member, with their CRC checked. Raises the same errors as `read_picture`."""
    if member.num_bytes > MAX_FILE_BYTES:
        raise ImageRejected("too_large", f"{member.num_bytes:,} bytes when unpacked")
    if member.method not in _METHODS:
        raise ImageRejected("unreadable", f"compressed by method {member.method}: only stored and deflate are read")
    view = open_view(member.archive, read_member)
    info = zipfile.ZipInfo("member")
    info.compress_type = member.method
    info.compress_size = member.packed_bytes
    info.file_size = member.num_bytes
    info.CRC = member.crc32
    try:
        view.seek(data_offset(view, member.offset))
        # It inflates no more bytes than it is asked for, here the size in the directory, even if the data holds more.
        data = zipfile.ZipExtFile(view, "r", info).read(member.num_bytes)
    except (zipfile.BadZipFile, zlib.error, EOFError, ValueError, OverflowError, OSError) as error:
        require_unchanged(member.archive)
        raise ImageRejected("unreadable", f"damaged in its zip ({str(error) or 'it ends too early'})") from None
    if len(data) != member.num_bytes:
        raise ImageRejected("unreadable", f"damaged in its zip ({len(data):,} of {member.num_bytes:,} bytes)")
    return data


def data_offset(view: BinaryIO, offset: int) -> int:
    """Return where a member's data begins in its zip. `offset` is where its local header begins. Raises BadZipFile."""
    view.seek(offset)
    header = view.read(_LOCAL_HEADER.size)
    if len(header) != _LOCAL_HEADER.size or not header.startswith(b"PK\3\4"):
        raise zipfile.BadZipFile("no member where the directory says")
    _, num_name, num_extra = _LOCAL_HEADER.unpack(header)
    return offset + _LOCAL_HEADER.size + num_name + num_extra
