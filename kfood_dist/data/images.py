"""One way from a picture file to the JPEG that is packed, trained on, evaluated and predicted from.

    file bytes ──► header checks ──► decode (scaled, if JPEG) ──► upright ──► RGB ──► size×size ──► JPEG bytes

A pure function of its arguments: nothing on disk, no global setting, the same bytes for the same bytes. What
cannot be used leaves as ImageRejected with a reason that a table can count. Colour profiles are ignored, as
training pipelines usually do; of an animation the first frame counts.
"""

import io
import re
import warnings
from typing import NoReturn

import numpy as np
from PIL import Image

RESIZE_POLICIES = ("squash", "letterbox", "crop")

# What the AI-Hub set holds; a file is what its bytes say, whatever its suffix. Phones' MPO opens as JPEG.
_FORMATS = ("JPEG", "PNG", "GIF", "BMP", "WEBP")

# The middle of the range: after normalisation it is near zero for every usual mean and deviation.
_LETTERBOX_RGB = (114, 114, 114)

# EXIF tag 0x0112 (TIFF 6.0, "Orientation"): what turns the stored picture upright.
_ORIENTATION_TAG = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class ImageRejected(Exception):
    """A picture that is not used: `reason` is a word to count by, `detail` a sentence for a person."""

    def __init__(self, reason: str, detail: str):
        super().__init__(reason, detail)
        self.reason = reason
        self.detail = detail

    def __str__(self) -> str:
        return f"{self.reason}: {self.detail}"


def prepare_jpeg(
    data: bytes,
    size: int,
    policy: str = "squash",
    quality: int = 90,
    min_side: int = 32,
    max_pixels: int = 100_000_000,
) -> bytes:
    """Turn a picture file into an upright RGB JPEG of size×size pixels (4:2:0, baseline).

    `squash` ignores the aspect ratio, `letterbox` fits the picture on grey 114, `crop` keeps the centre
    square. Raises ImageRejected with reason `empty` (no bytes), `unreadable` (no picture, or cut short),
    `too_small` (a side under `min_side` pixels) or `too_large` (over `max_pixels`; refused before any pixel
    is decoded).
    """
    if policy not in RESIZE_POLICIES:
        raise ValueError(f"resize policy {policy!r} is none of {', '.join(RESIZE_POLICIES)}")
    if not data:
        raise ImageRejected("empty", "0 bytes")
    with warnings.catch_warnings():
        # Pillow warns of odd EXIF blocks, palettes and sizes; what matters of that is decided below.
        warnings.simplefilter("ignore")
        image = _open(data)
        _check_size(image, min_side, max_pixels)
        image = _to_rgb(_upright(_decode(image, size, policy)))
    buffer = io.BytesIO()
    _fit(image, size, policy).save(buffer, "JPEG", quality=quality, subsampling="4:2:0")
    return buffer.getvalue()


def decode_rgb(jpeg: bytes) -> np.ndarray:
    """Decode a JPEG into uint8 RGB of shape (height, width, 3); raises ImageRejected `unreadable`."""
    try:
        with Image.open(io.BytesIO(jpeg), formats=("JPEG",)) as image:
            return np.array(image.convert("RGB"))
    except Exception as error:
        _reject_unreadable(error)


def _open(data: bytes) -> Image.Image:
    try:
        return Image.open(io.BytesIO(data), formats=_FORMATS)
    except Image.UnidentifiedImageError:
        # Pillow's own text holds a memory address, which would differ from run to run.
        raise ImageRejected("unreadable", "not a JPEG, PNG, GIF, BMP or WebP file") from None
    except Image.DecompressionBombError as error:
        raise ImageRejected("too_large", str(error)) from None
    except Exception as error:
        _reject_unreadable(error)


def _check_size(image: Image.Image, min_side: int, max_pixels: int) -> None:
    width, height = image.size
    if min(width, height) < min_side:
        raise ImageRejected("too_small", f"{width}×{height}, a side is under {min_side} pixels")
    if width * height > max_pixels:
        raise ImageRejected("too_large", f"{width}×{height}, more than {max_pixels:,} pixels")


def _decode(image: Image.Image, size: int, policy: str) -> Image.Image:
    # A JPEG decodes to 1/2, 1/4 or 1/8 almost for free. `draft` takes the smallest that still covers the size
    # asked for; twice the target leaves the resampling filter enough to work on.
    width, height = _target(image.size, size, policy)
    image.draft(None, (2 * width, 2 * height))
    try:
        image.load()
    except Exception as error:
        _reject_unreadable(error)
    return image


def _reject_unreadable(error: Exception) -> NoReturn:
    # Decoders meet hostile bytes here and raise nearly anything; each is counted under its own words.
    words = re.sub(r"0x[0-9a-fA-F]{6,}", "0x…", f"{type(error).__name__}: {error}")
    raise ImageRejected("unreadable", words[:200]) from None


def _target(source: tuple[int, int], size: int, policy: str) -> tuple[int, int]:
    """The size in pixels to resize a picture to, before it is padded or cropped to size×size."""
    if policy == "squash":
        return size, size
    side = max(source) if policy == "letterbox" else min(source)
    width, height = (max(1, round(length * size / side)) for length in source)
    return width, height


def _upright(image: Image.Image) -> Image.Image:
    try:
        orientation = image.getexif().get(_ORIENTATION_TAG, 1)
    except Exception:
        # A broken EXIF block says nothing of the orientation: the picture is shown as stored, as viewers do.
        orientation = 1
    method = _UPRIGHT.get(orientation)
    return image if method is None else image.transpose(method)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):
        # 16-bit grey; Pillow's own conversion clips at 255 and would leave it nearly white.
        high_bytes = np.asarray(image).clip(0, 65535).astype(np.uint16) >> 8
        return Image.fromarray(high_bytes.astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        overlay = image.convert("RGBA")
        paper = Image.new("RGB", overlay.size, (255, 255, 255))
        paper.paste(overlay, mask=overlay.getchannel("A"))
        return paper
    return image if image.mode == "RGB" else image.convert("RGB")


def _fit(image: Image.Image, size: int, policy: str) -> Image.Image:
    target = _target(image.size, size, policy)
    resized = image.resize(target, Image.Resampling.LANCZOS)
    if target == (size, size):
        return resized
    # Larger than the square is cut on both sides alike, smaller is padded on both sides alike.
    canvas = Image.new("RGB", (size, size), _LETTERBOX_RGB)
    canvas.paste(resized, ((size - target[0]) // 2, (size - target[1]) // 2))
    return canvas
