"""From a picture file's bytes to a Pillow image of 8 bits a channel; what cannot be used is refused with a reason.

    bytes ──► kind, by the first bytes ──► header ──► sides, memory ──► pixels (a JPEG's later, for they can be scaled)
      ▲                                                                   │ unreadable
      └────────────── the same without its metadata ◄─────────────────────┘

A file is what its bytes say, whatever its suffix. Of several pages or frames the first counts.
"""

import io
import re
from typing import NoReturn

import numpy as np
from PIL import Image
from PIL.JpegImagePlugin import JpegImageFile, jpeg_factory

from kfood_dist.data.picture.metadata import SCAN, jpeg_segments, without_metadata

# All that Pillow knows by their first bytes and that photographs are kept in; JPEG and HEIC are opened below.
_FORMATS = ("PNG", "GIF", "BMP", "DIB", "WEBP", "TIFF", "AVIF", "JPEG2000", "PPM")
_UNKNOWN = "not a JPEG, PNG, GIF, BMP, WebP, TIFF, AVIF, JPEG 2000, PPM or HEIC file"

# Brands of HEIF (ISO 23008-12, annex B) that pillow-heif opens; with an AVIF brand it is Pillow's.
_HEIF_BRANDS = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs", b"mif1", b"msf1"}
_AVIF_BRANDS = {b"avif", b"avis"}
NEEDS_HEIC = "needs_heic_extra"
HEIC_REMEDY = "pip install 'kfood_dist[heic]'"

MAX_PIXELS = 100_000_000
# libjpeg holds two bytes for each coefficient; four components in full resolution are the most that a pixel has.
_COEFFICIENT_BYTES = 8

# TIFF 6.0: how many bits a sample has, and which value is white.
_BITS_PER_SAMPLE, _PHOTOMETRIC = 258, 262


class ImageRejected(Exception):
    """A picture that is not used: `reason` is a word to count by, `detail` a sentence for a person."""

    def __init__(self, reason: str, detail: str):
        super().__init__(reason, detail)
        self.reason = reason
        self.detail = detail

    def __str__(self) -> str:
        return f"{self.reason}: {self.detail}"


def open_picture(data: bytes, min_side: int, max_pixels: int) -> tuple[Image.Image, bytes]:
    """Open a picture file, and decode it unless it is a JPEG; also returns the bytes that were opened.

    These lack the metadata if they stood in the way; what they say of the orientation is kept in the image's `info`.
    Raises ImageRejected: `unreadable`, `too_small`, `too_large`, or NEEDS_HEIC where pillow-heif is not installed.
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
    """Whether an opened picture is a JPEG, whose pixels `decode` is still to read. Phones' MPO is one."""
    return isinstance(image, JpegImageFile)


def open_jpeg(data: bytes) -> Image.Image:
    """Open a JPEG without decoding it. Raises ImageRejected `unreadable`.

    By its factory, as Image.open refuses over 179 million pixels, although they need not all be decoded.
    """
    try:
        return jpeg_factory(io.BytesIO(data))
    except Exception as error:
        reject_unreadable(error)


def decode(image: Image.Image, least: tuple[int, int]) -> Image.Image:
    """Read an opened picture's pixels, of a JPEG at 1/2, 1/4 or 1/8 of its size if that is not below `least`.

    Raises ImageRejected `unreadable`.
    """
    image.draft(None, least)
    try:
        image.load()
    except Exception as error:
        reject_unreadable(error)
    return image


def require_memory(image: Image.Image, data: bytes, least: tuple[int, int], max_pixels: int) -> None:
    """Raise ImageRejected `too_large` if decoding a JPEG down to `least` takes the memory of over `max_pixels`.

    Scaled decoding holds what comes out, and all coefficients too if each scan brings only a part of them.
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
    """Raise a decoder's error as ImageRejected `unreadable`; want of memory stays what it is."""
    if isinstance(error, MemoryError | ImageRejected):
        raise error
    # Decoders meet hostile bytes here and raise nearly anything; each is counted under its own words.
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
    # Now, for a PNG's EXIF may lie behind its pixels: asked for it, Pillow decodes them too.
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
        # Pillow's own text holds a memory address, which would differ from run to run.
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
        raise ImageRejected(NEEDS_HEIC, f"a HEIC picture, which takes pillow-heif → {HEIC_REMEDY}") from None
    try:
        return HeifImageFile(io.BytesIO(data))
    except Exception as error:
        reject_unreadable(error)


def _coefficient_bytes(image: JpegImageFile, data: bytes) -> int:
    """What libjpeg keeps of a JPEG's coefficients: all where a scan has not all components, or not all bits."""
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
    """A grey picture of more than 8 bits by its high byte; Pillow's conversion would clip it, to nearly white."""
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
