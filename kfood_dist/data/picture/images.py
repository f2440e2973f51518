"""Prepare a picture file as a JPEG, in one way for packing, training, evaluation and prediction.

    file bytes ──► opened ──► decoded (a JPEG scaled) ──► upright ──► box ──► RGB ──► size×size ──► JPEG bytes
      decoding.py        └──► an ordinary JPEG: brightness and colour resized separately ──────────────┘

Always holds: the result depends only on the arguments, not on files on disk or global settings. The same input bytes
give the same output bytes. A picture that cannot be used raises ImageRejected, with a reason that a table can count.
Lack of memory is the machine's fault, not the picture's, and stays a MemoryError. Colour profiles are ignored, as
training pipelines usually do. If a file has several pages or frames, the first one is used.
"""

import io
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import simplejpeg
from PIL import Image

from kfood_dist.data.picture.decoding import (
    MAX_PIXELS,
    ImageRejected,
    decode,
    is_jpeg,
    open_jpeg,
    open_picture,
    reject_unreadable,
    require_memory,
)
from kfood_dist.data.picture.resample import resample

RESIZE_POLICIES = ("squash", "letterbox", "crop")

# A grey near the middle of the range: after normalisation it is near zero for every usual mean and deviation.
_LETTERBOX_RGB = (114, 114, 114)

# EXIF tag 0x0112 (TIFF 6.0, "Orientation"): how to turn the stored picture upright.
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
_TURNED = (5, 6, 7, 8)  # width and height are swapped

# Out of 255. If no pixel is more opaque than this, the picture over white would just be white.
_HIDDEN_ALPHA = 12
# Out of 255. A row whose colours differ by less than this shows nothing: libwebp gives a hidden row almost one colour.
_VISIBLE_RANGE = 8

# Pillow writes a picture's own comment into the JPEG, and fails if it is longer than a JPEG segment.
_MAX_COMMENT_BYTES = 65533

Box = tuple[int, int, int, int]
_MIN_BOX = 8


def prepare_jpeg(
    data: bytes,
    size: int,
    policy: str = "squash",
    quality: int = 90,
    min_side: int = 32,
    max_pixels: int = MAX_PIXELS,
    box: Box | None = None,
) -> bytes:
    """Turn a picture file into an upright RGB JPEG of size×size pixels (4:2:0, baseline).

    `squash` ignores the aspect ratio, `letterbox` fits the picture on grey 114, `crop` keeps the centre square.
    A JPEG is decoded scaled, so it may be larger than `max_pixels`. If a `box` (x, y, width, height in pixels of the
    upright picture) is usable, only this part is kept.

    Raises ImageRejected with one of these reasons:

    * `empty`: no bytes
    * `unreadable`: not a picture, or cut short
    * `too_small`: a side is under `min_side` pixels
    * `too_large`: over `max_pixels` pixels to decode (refused before any is decoded), or so long that the picture
      would have more when resized for `crop`
    * `invisible`: fully transparent, with no colours beneath
    * `needs_heic_extra`: pillow-heif is not installed
    """
    return prepare_cropped(data, size, policy, quality, min_side, box, max_pixels)[0]


def prepare_cropped(
    data: bytes,
    size: int,
    policy: str,
    quality: int,
    min_side: int,
    box: Box | None,
    max_pixels: int = MAX_PIXELS,
) -> tuple[bytes, bool | None]:
    """Return the JPEG of `prepare_jpeg`, and whether only the box was kept.

    That is False if the box is unusable, and None without a box.
    """
    if policy not in RESIZE_POLICIES:
        raise ValueError(f"resize policy {policy!r} is not one of {', '.join(RESIZE_POLICIES)}")
    if not data:
        raise ImageRejected("empty", "0 bytes")
    with warnings.catch_warnings():
        # Pillow warns about odd EXIF blocks, palettes and sizes. The code below decides which of these matter.
        warnings.simplefilter("ignore")
        image, data = open_picture(data, min_side, max_pixels)
        view = _View.of(image, box)
        target = _target(view.size, size, policy)
        _check_target(target, size, max_pixels)
        if is_jpeg(image):
            require_memory(image, data, view.scale_for(target), max_pixels)
        cropped = None if box is None else view.box is not None
        if policy == "squash" and (jpeg := _by_planes(data, image, view, size, quality)) is not None:
            return jpeg, cropped
        if is_jpeg(image):
            image = decode(image, view.scale_for(target))
        image = view.cut(_upright(image, view.orientation))
        image = _fit(_to_rgb(image), size, policy)
    if len(image.info.get("comment", b"")) > _MAX_COMMENT_BYTES:
        del image.info["comment"]
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality, subsampling="4:2:0")
    return buffer.getvalue(), cropped


def usable_box(box: Box, width: int, height: int) -> Box | None:
    """Return the part of a box (x, y, width, height) that is inside a picture of this size, all in pixels.

    Returns None if a side of this part is under _MIN_BOX pixels: such a box is a mistake, not a dish.
    """
    left, top = max(0, box[0]), max(0, box[1])
    right, bottom = min(width, box[0] + box[2]), min(height, box[1] + box[3])
    if right - left < _MIN_BOX or bottom - top < _MIN_BOX:
        return None
    return left, top, right - left, bottom - top


def decode_rgb(jpeg: bytes) -> np.ndarray:
    """Decode a JPEG into uint8 RGB of shape (height, width, 3). Raises ImageRejected `unreadable` if that fails.

    Uses libjpeg-turbo with its exact DCT and smooth colour: the same values as Pillow, in half the time.
    """
    try:
        return simplejpeg.decode_jpeg(jpeg, "RGB", fastdct=False, fastupsample=False, strict=True)
    except Exception as error:
        reject_unreadable(error)


@dataclass(frozen=True)
class _View:
    """The visible part of a picture: its upright size, its EXIF orientation, and the box that is kept, in pixels."""

    whole: tuple[int, int]
    orientation: int
    box: Box | None

    @classmethod
    def of(cls, image: Image.Image, box: Box | None) -> "_View":
        orientation = _orientation(image)
        whole = image.size[::-1] if orientation in _TURNED else image.size
        return cls(whole, orientation, None if box is None else usable_box(box, *whole))

    @property
    def size(self) -> tuple[int, int]:
        """Width and height of the part that is kept."""
        return self.whole if self.box is None else self.box[2:]

    def scale_for(self, target: tuple[int, int]) -> tuple[int, int]:
        """Return the stored size that scaled decoding must not go below, so that the kept part has twice the target.

        Twice the target leaves the resampling filter enough pixels to work on.
        """
        least = [
            math.ceil(2 * wanted * whole / kept)
            for wanted, whole, kept in zip(target, self.whole, self.size, strict=True)
        ]
        width, height = reversed(least) if self.orientation in _TURNED else least
        return width, height

    def within(self, size: tuple[int, int]) -> tuple[float, float, float, float]:
        """Return the box as left, top, right and bottom in the upright picture decoded at `size`."""
        left, top, width, height = self.box or (0, 0, *self.whole)
        x, y = size[0] / self.whole[0], size[1] / self.whole[1]
        return left * x, top * y, min(size[0], (left + width) * x), min(size[1], (top + height) * y)

    def cut(self, image: Image.Image) -> Image.Image:
        """Crop an upright picture to the box, rounded outwards to full pixels."""
        if self.box is None:
            return image
        left, top, right, bottom = self.within(image.size)
        return image.crop((math.floor(left), math.floor(top), math.ceil(right), math.ceil(bottom)))


def _by_planes(data: bytes, image: Image.Image, view: _View, size: int, quality: int) -> bytes | None:
    """Squash an ordinary JPEG to size×size plane by plane. Returns None if it is another kind of picture.

    Resampling is most of the work, and colour is stored at half the resolution. So brightness is resized separately,
    and colour directly to the half-size planes of the result. tests/bench/README.md shows what this gains, and how
    near the result is to the exactly resized picture.
    """
    if not is_jpeg(image) or image.mode != "RGB" or size % 2:
        return None
    try:
        planes = _decode_planes(data, image, view, size)
    except MemoryError:
        raise
    except Exception:
        # The file is damaged or stored in another way. `prepare_cropped` decodes it as RGB and finds out which.
        return None
    resized = []
    for plane, side in zip(planes, (size, size // 2, size // 2), strict=True):
        upright = _upright_plane(plane, view.orientation)
        resized.append(resample(upright, side, view.within(upright.shape[::-1])))
    return simplejpeg.encode_jpeg_yuv_planes(*resized, quality)


def _decode_planes(data: bytes, image: Image.Image, view: _View, size: int) -> Sequence[np.ndarray]:
    """Decode the brightness, blue and red planes (Y, Cb, Cr), uint8 (h, w) each. May raise any exception.

    If the file has enough pixels, each plane has at least twice the size that it is resized to. Decoding only
    brightness is fast, and colour needs only half the size, so two decodings cost less than one of everything. A
    progressive file is decoded once: both decodings would have to find its coefficients, and that is most of the work.
    """
    width, height = view.scale_for((size, size))
    if image.info.get("progressive"):
        image = open_jpeg(data)  # a new image: if decoding fails, `prepare_cropped` needs the first one unchanged
        image.draft("YCbCr", (width, height))
        return [np.asarray(plane) for plane in image.split()]
    grey = simplejpeg.decode_jpeg(data, "GRAY", min_width=width, min_height=height, strict=True)[:, :, 0]
    width, height = view.scale_for((size // 2, size // 2))
    blue, red = _colour(simplejpeg.decode_jpeg(data, "RGB", min_width=width, min_height=height, strict=True))
    return grey, blue, red


# Weights of R, G and B in Cb and Cr (JFIF 1.02, section 7), in integer multiples of 2⁻¹⁴: float32 adds them exactly.
_COLOUR = (
    np.rint(np.array([[-0.168736, -0.331264, 0.5], [0.5, -0.418688, -0.081312]]) * 2**14).astype(np.float32) / 2**14
)


# Rows are converted this many pixels at a time, which stay in the processor's cache and take little memory.
_PIXELS_AT_ONCE = 1 << 15


def _colour(rgb: np.ndarray) -> np.ndarray:
    """Convert (h, w, 3) uint8 RGB to (2, h, w) uint8 Cb and Cr."""
    height, width, _ = rgb.shape
    out = np.empty((2, height, width), dtype=np.uint8)
    rows = max(1, _PIXELS_AT_ONCE // width)
    for top in range(0, height, rows):
        strip = rgb[top : top + rows]
        pixels = strip.reshape(-1, 3).T.astype(np.float32, order="C")
        # The 0.5 for rounding is reduced by 2⁻¹⁴. Otherwise the purest blue and red become 256, which is 0 in uint8.
        out[:, top : top + rows] = (_COLOUR @ pixels + np.float32(128.5 - 2**-14)).reshape(2, *strip.shape[:2])
    return out


def _check_target(target: tuple[int, int], size: int, max_pixels: int) -> None:
    width, height = target
    if width * height > max(max_pixels, size * size):
        raise ImageRejected(
            "too_large", f"{width}×{height} with its short side at {size}, more than {max_pixels:,} pixels"
        )


def _target(source: tuple[int, int], size: int, policy: str) -> tuple[int, int]:
    """Return the size in pixels to resize a picture to, before it is padded or cropped to size×size."""
    if policy == "squash":
        return size, size
    side = max(source) if policy == "letterbox" else min(source)
    width, height = (max(1, round(length * size / side)) for length in source)
    return width, height


def _orientation(image: Image.Image) -> int:
    try:
        orientation = image.getexif().get(_ORIENTATION_TAG, 1)
    except MemoryError:
        raise
    except Exception:
        # A damaged EXIF block gives no orientation: the picture is shown as stored, as viewers do.
        return 1
    return orientation if orientation in _UPRIGHT else 1


def _upright(image: Image.Image, orientation: int) -> Image.Image:
    method = _UPRIGHT.get(orientation)
    return image if method is None else image.transpose(method)


def _upright_plane(plane: np.ndarray, orientation: int) -> np.ndarray:
    return np.asarray(_upright(Image.fromarray(plane), orientation)) if orientation in _UPRIGHT else plane


def _to_rgb(image: Image.Image) -> Image.Image:
    """Convert a picture to RGB, with transparent parts over white.

    If transparency would hide everything, only the colours are used. Raises ImageRejected: `unreadable`, or
    `invisible` if these colours show nothing.
    """
    try:
        if not image.has_transparency_data:
            return image if image.mode == "RGB" else image.convert("RGB")
        overlay = image if image.mode == "RGBA" else image.convert("RGBA")
    except Exception as error:
        reject_unreadable(error)
    alpha = overlay.getchannel("A")
    if not any(alpha.histogram()[_HIDDEN_ALPHA + 1 :]):
        return _without_alpha(overlay)
    paper = Image.new("RGB", overlay.size, (255, 255, 255))
    paper.paste(overlay, mask=alpha)
    return paper


def _without_alpha(overlay: Image.Image) -> Image.Image:
    colours = overlay.convert("RGB")
    rows = np.asarray(colours.resize((64, 64), Image.Resampling.NEAREST))
    low, high = np.percentile(rows, (10, 90), axis=1)
    if np.mean((high - low).max(axis=-1) < _VISIBLE_RANGE) > 0.9:
        raise ImageRejected("invisible", "all of it is transparent, and the colours beneath show nothing")
    return colours


def _fit(image: Image.Image, size: int, policy: str) -> Image.Image:
    target = _target(image.size, size, policy)
    resized = image.resize(target, Image.Resampling.LANCZOS)
    if target == (size, size):
        return resized
    # A side longer than the square is cut equally at both ends, a shorter one is padded equally at both ends.
    canvas = Image.new("RGB", (size, size), _LETTERBOX_RGB)
    canvas.paste(resized, ((size - target[0]) // 2, (size - target[1]) // 2))
    return canvas
