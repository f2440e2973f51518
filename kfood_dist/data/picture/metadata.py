"""Split a JPEG or PNG file by its markers: the parts that its pixels need, and the parts that only describe it.

    file bytes ──► segments or chunks ──► those of the pixels, as a file ──► opened if the original cannot be
                                     └──► EXIF and XMP, for the orientation

Pillow refuses a picture whose metadata it cannot read or finds too large, although no pixel depends on the metadata.
"""

import struct
import zlib
from collections.abc import Iterator

SCAN = 0xDA
_STANDALONE = (0x00, 0x01, *range(0xD0, 0xD9))  # stuffing, TEM, RST0 to RST7, SOI: markers without a length
_APP0, _APP1, _APP14, _APP15, _COMMENT = 0xE0, 0xE1, 0xEE, 0xEF, 0xFE
_EXIF, _XMP = b"Exif\0\0", b"http://ns.adobe.com/xap/1.0/\0"
# JFIF and Adobe segments decide how colours are stored. libjpeg ignores those with fewer bytes than this.
_OF_COLOURS = {_APP0: 4 + 14, _APP14: 4 + 12}

_PNG = b"\x89PNG\r\n\x1a\n"
_PNG_XMP = b"XML:com.adobe.xmp\0"
_XMP_BYTES = 2**20  # the orientation is near its start


def without_metadata(data: bytes) -> tuple[bytes | None, dict[str, bytes]]:
    """Return the file with only its pixels, and its `exif` and `xmp` in the form of Pillow's `info`.

    The file is None if it is neither JPEG nor PNG, or if its parts cannot be separated.
    """
    try:
        if data.startswith(b"\xff\xd8"):
            return _plain_jpeg(data)
        if data.startswith(_PNG):
            return _plain_png(data)
    except (struct.error, ValueError, IndexError):
        pass
    return None, {}


def jpeg_segments(data: bytes) -> Iterator[tuple[int, int, int]]:
    """Yield each segment of a JPEG up to the header of its first scan: marker, start and end in bytes.

    Raises struct.error, ValueError or IndexError if the file ends before that.
    """
    marker, end = 0, 2
    while marker != SCAN:
        start = data.index(b"\xff", end)
        while data[start + 1] == 0xFF:
            start += 1
        marker, end = data[start + 1], start + 2
        if marker not in _STANDALONE:
            end += max(2, struct.unpack_from(">H", data, end)[0])
            yield marker, start, end


def _plain_jpeg(data: bytes) -> tuple[bytes, dict[str, bytes]]:
    kept, found, end = [data[:2]], dict[str, bytes](), 2
    for marker, start, end in jpeg_segments(data):
        body = data[start + 4 : end]
        if marker == _APP1 and body.startswith(_EXIF):
            found["exif"] = found["exif"] + body[len(_EXIF) :] if "exif" in found else body
        elif marker == _APP1 and body.startswith(_XMP):
            found["xmp"] = body[len(_XMP) :]
        is_about = _APP0 <= marker <= _APP15 or marker == _COMMENT
        if end - start >= _OF_COLOURS[marker] if marker in _OF_COLOURS else not is_about:
            kept.append(data[start:end])
    return b"".join([*kept, data[end:]]), found


def _plain_png(data: bytes) -> tuple[bytes, dict[str, bytes]]:
    kept, found = [_PNG], dict[str, bytes]()
    at = len(_PNG)
    while at < len(data):
        (length,) = struct.unpack_from(">I", data, at)
        kind, body, end = data[at + 4 : at + 8], data[at + 8 : at + 8 + length], at + 12 + length
        if kind == b"eXIf":
            found["exif"] = _EXIF + body
        elif kind == b"iTXt" and body.startswith(_PNG_XMP):
            found["xmp"] = _png_text(body[len(_PNG_XMP) :])
        if kind[:1].isupper() or kind == b"tRNS":  # a capital marks a critical chunk (PNG 3rd edition, 5.4)
            kept.append(data[at:end])
        at = end
    return b"".join(kept), found


def _png_text(body: bytes) -> bytes:
    """Return the text of an iTXt chunk. `body` follows its keyword: two flags, language, translated keyword, text."""
    _, _, text = body[2:].split(b"\0", 2)
    if not body[0]:
        return text
    try:
        return zlib.decompressobj().decompress(text, _XMP_BYTES)
    except zlib.error:
        return b""
