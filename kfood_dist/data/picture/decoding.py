"""Turn a picture file's bytes into a Pillow image with 8 bits per channel, or refuse it with a reason.

    bytes ──► kind, by the first bytes ──► header ──► sides, memory ──► pixels (a JPEG's later: they can be scaled)
      ▲                                                                   │ unreadable
      └────────────── the same without its metadata ◄─────────────────────┘

The bytes of a file decide its kind, not its suffix. If a file has several pages or frames, the first one is used.
"""

import io
import re
from typing import NoReturn

import numpy as np
from PIL import Image
from PIL.JpegImagePlugin import JpegImageFile, jpeg_factory

from kfood_dist.data.picture.metadata import SCAN, jpeg_segments, without_metadata

# Formats that photographs are kept in and that Pillow recognises by their first bytes. JPEG and HEIC are opened below.
_FORMATS = ("PNG", "GIF", "BMP", "DIB", "WEBP", "TIFF", "AVIF", "JPEG2000", "PPM")
_UNKNOWN = "not a JPEG, PNG, GIF, BMP, WebP, TIFF, AVIF, JPEG 2000, PPM or HEIC file"

# Brands of HEIF (ISO 23008-12, annex B) that pillow-heif opens. Pillow opens a file that also has an AVIF brand.
_HEIF_BRANDS = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs", b"mif1", b"msf1"}
_AVIF_BRANDS = {b"avif", b"avis"}
NEEDS_HEIC = "needs_heic_extra"
HEIC_REMEDY = "pip install 'kfood_dist[heic]'"

MAX_PIXELS = 100_000_000
# Per pixel: libjpeg holds two bytes per coefficient, and a pixel has at most four components in full resolution.
_COEFFICIENT_BYTES = 8

# Tags of TIFF 6.0: the number of bits of a value, and which value is white.
_BITS_PER_SAMPLE, _PHOTOMETRIC = 258, 262


class ImageRejected(Exception):
    """A picture that cannot be used. `reason` is a word to count by, `detail` is a text for a person."""

    def __init__(self, reason: str, detail: str):
        super().__init__(reason, detail)
        self.reason = reason
        self.detail = detail

    def __str__(self) -> str:
        return f"{self.reason}: {self.detail}"


def open_picture(data: bytes, min_side: int, max_pixels: int) -> tuple[Image.Image, bytes]:
    """Open a picture file, and decode it unless it is a JPEG. Returns the image and the bytes that were opened.

    If the file can only be opened without its metadata, these bytes lack it. Its EXIF and XMP, which may give the
    orientation, are then kept in the image's `info`.
    Raises ImageRejected: `unreadable`, `too_small`, `too_large`, or NEEDS_HEIC if pillow-heif is not installed.
    """
    try:
        return _open_checked(data, min_side, max_pixels), data
    except ImageRejected as rejected:
        plain, found = without_metadata(data)
        if rejected.reason != "unreadable" or plain is None:
            raise
    image = _open_checked(plain, min_side, max_pixels)
    image.info.update(found)
    return image, plain


def is_jpeg(image: Image.Image) -> bool:
    """Return whether an opened picture is a JPEG, whose pixels `decode` reads later. The MPO files of phones count."""
    return isinstance(image, JpegImageFile)


def open_jpeg(data: bytes) -> Image.Image:
    """Open a JPEG without decoding it. Raises ImageRejected `unreadable` if that fails.

    Calls Pillow's JPEG factory, because Image.open refuses over 179 million pixels, although not all of them need to
    be decoded.
    """
    try:
        return jpeg_factory(io.BytesIO(data))
    except Exception as error:
        reject_unreadable(error)


def decode(image: Image.Image, least: tuple[int, int]) -> Image.Image:
    """Read the pixels of an opened picture.

    A JPEG is decoded at 1/2, 1/4 or 1/8 of its size if that is not below `least` (width, height).
    Raises ImageRejected `unreadable` if the pixels cannot be read.
    """
    image.draft(None, least)
    try:
        image.load()
    except Exception as error:
        reject_unreadable(error)
    return image


def require_memory(image: Image.Image, data: bytes, least: tuple[int, int], max_pixels: int) -> None:
    """Raise ImageRejected `too_large` if decoding a JPEG down to `least` takes the memory of over `max_pixels` pixels.

    Scaled decoding holds the decoded picture. If each scan of the file has only a part of the coefficients, it also
    holds all of them.
    """
    assert isinstance(image, JpegImageFile)
    width, height = image.size
    scale = next(n for n in (8, 4, 2, 1) if n == 1 or min(width // least[0], height // least[1]) >= n)
    decoded = -(-width // scale) * -(-height // scale)
    if decoded > max_pixels:
        at = "" if scale == 1 else f"{decoded:,} when decoded at 1/{scale}, "
        raise ImageRejected("too_large", f"{width}×{height}, {at}more than {max_pixels:,} pixels")
    coefficients, limit = _coefficient_bytes(image, data), _COEFFICIENT_BYTES * max_pixels
    if coefficients > limit:
        raise ImageRejected(
            "too_large",
            f"{width}×{height} in several scans, which take {coefficients:,} bytes to decode, more than {limit:,}",
        )


def reject_unreadable(error: Exception) -> NoReturn:
    """Raise a decoder's error as ImageRejected `unreadable`. Raises a MemoryError or an ImageRejected unchanged."""
    if isinstance(error, MemoryError | ImageRejected):
        raise error
    # Decoders get hostile bytes here and raise almost any exception. The detail keeps each one's own text.
    words = re.sub(r"0x[0-9a-fA-F]{6,}", "0x…", f"{type(error).__name__}: {error}")
    raise ImageRejected("unreadable", words[:200]) from None


def _open_checked(data: bytes, min_side: int, max_pixels: int) -> Image.Image:
    image = _open(data)
    width, height = image.size
    if min(width, height) < min_side:
        raise ImageRejected("too_small", f"{width}×{height}, a side is under {min_side} pixels")
    if is_jpeg(image):
        return image
    if width * height > max_pixels:
        raise ImageRejected("too_large", f"{width}×{height}, more than {max_pixels:,} pixels")
    # Decoded now, because a PNG's EXIF may come after its pixels: Pillow decodes them anyway to read the EXIF.
    image = decode(image, image.size)
    return _in_8_bits(image) if image.mode[0] in "IF" else image


def _open(data: bytes) -> Image.Image:
    if data.startswith(b"\xff\xd8\xff"):
        return open_jpeg(data)
    if _is_heif(data):
        return _open_heif(data)
    try:
        return Image.open(io.BytesIO(data), formats=_FORMATS)
    except Image.UnidentifiedImageError:
        # Pillow's own text contains a memory address, which would differ from run to run.
        raise ImageRejected("unreadable", _UNKNOWN) from None
    except Image.DecompressionBombError as error:
        raise ImageRejected("too_large", str(error)) from None
    except Exception as error:
        reject_unreadable(error)


def _is_heif(data: bytes) -> bool:
    if data[4:8] != b"ftyp":
        return False
    end = min(int.from_bytes(data[:4], "big"), 1024)
    brands = {data[8:12], *(data[at : at + 4] for at in range(16, end, 4))}
    return bool(brands & _HEIF_BRANDS) and not brands & _AVIF_BRANDS


def _open_heif(data: bytes) -> Image.Image:
    try:
        from pillow_heif import HeifImageFile
    except ImportError:
        raise ImageRejected(NEEDS_HEIC, f"a HEIC picture, which needs pillow-heif → {HEIC_REMEDY}") from None
    try:
        return HeifImageFile(io.BytesIO(data))
    except Exception as error:
        reject_unreadable(error)


def _coefficient_bytes(image: JpegImageFile, data: bytes) -> int:
    """Return the bytes of coefficients that libjpeg holds while it decodes a JPEG.

    It holds all coefficients if a scan has only some of the components or only some of the bits, otherwise none.
    """
    try:
        scan = next(start for marker, start, _ in jpeg_segments(data) if marker == SCAN)
        if "progressive" not in image.info and data[scan + 4] == image.layers:
            return 0
        samples = sum(across * down for _, across, down, _ in image.layer)
        whole = max(across for _, across, *_ in image.layer) * max(down for _, _, down, _ in image.layer)
        return 2 * image.width * image.height * samples // whole
    except Exception as error:
        reject_unreadable(error)


def _in_8_bits(image: Image.Image) -> Image.Image:
    """Convert a grey picture of more than 8 bits to its high byte. Pillow's conversion would clip it to nearly white.

    Raises ImageRejected `unreadable` if it is not known which value is white.
    """
    tags = getattr(image, "tag_v2", {})
    values = np.asarray(image)
    if image.mode == "F" or values.max() > 65535:
        raise ImageRejected("unreadable", f"a picture of mode {image.mode}, which does not say what value is white")
    [bits] = tags.get(_BITS_PER_SAMPLE, (16,))
    grey = (values.clip(0, 65535) >> (min(bits, 16) - 8)).astype(np.uint8)
    if tags.get(_PHOTOMETRIC) == 0:
        grey = 255 - grey
    result = Image.fromarray(grey)
    result.info = {key: value for key, value in image.info.items() if key != "transparency"}
    return result
