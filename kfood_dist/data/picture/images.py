"""One way from a picture file to the JPEG that is packed, trained on, evaluated and predicted from.

    file bytes ──► opened ──► decoded (a JPEG scaled) ──► upright ──► box ──► RGB ──► size×size ──► JPEG bytes
      decoding.py        └──► an ordinary JPEG: brightness and colour each by itself, never made RGB ──┘

A pure function of its arguments: nothing on disk, no global setting, the same bytes for the same bytes. What
cannot be used leaves as ImageRejected with a reason that a table can count; want of memory is the machine's fault and
stays a MemoryError. Colour profiles are ignored, as training pipelines usually do; of several pages or frames the first
counts.
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
_TURNED = (5, 6, 7, 8)  # width and height change places

# Of 255: what is no more opaque than this anywhere would be a white picture.
_HIDDEN_ALPHA = 12
# Of 255: rows whose colours differ less than this show nothing. libwebp makes hidden rows nearly one colour each.
_VISIBLE_RANGE = 8

# Pillow writes a picture's own comment into the JPEG, and fails if it is longer than a segment.
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

    `squash` ignores the aspect ratio, `letterbox` fits the picture on grey 114, `crop` keeps the centre
    square. Raises ImageRejected with reason `empty` (no bytes), `unreadable` (no picture, or cut short),
    `too_small` (a side under `min_side` pixels), `too_large` (over `max_pixels` to decode, refused before any is; or
    so long that it would be, resized to be cropped), `invisible` (all of it transparent, with no colours beneath) or
    `needs_heic_extra` (pillow-heif is not installed). A JPEG is decoded scaled, so it may be larger than `max_pixels`.
    A usable `box` (x, y, width, height in pixels of the upright picture) is all that is kept of it.
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
    """What `prepare_jpeg` gives, and whether it is the box alone: False where that is unusable, None without a box."""
    if policy not in RESIZE_POLICIES:
        raise ValueError(f"resize policy {policy!r} is none of {', '.join(RESIZE_POLICIES)}")
    if not data:
        raise ImageRejected("empty", "0 bytes")
    with warnings.catch_warnings():
        # Pillow warns of odd EXIF blocks, palettes and sizes; what matters of that is decided below.
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
    """The part of a box (x, y, width, height) that lies in a picture of this size, all in pixels; None if hardly any.

    A box of under _MIN_BOX pixels on a side is a slip of the pen, not a dish.
    """
    left, top = max(0, box[0]), max(0, box[1])
    right, bottom = min(width, box[0] + box[2]), min(height, box[1] + box[3])
    if right - left < _MIN_BOX or bottom - top < _MIN_BOX:
        return None
    return left, top, right - left, bottom - top


def decode_rgb(jpeg: bytes) -> np.ndarray:
    """Decode a JPEG into uint8 RGB of shape (height, width, 3); raises ImageRejected `unreadable`.

    By libjpeg-turbo with its exact DCT and smooth colour: the same values as Pillow, in half the time.
    """
    try:
        return simplejpeg.decode_jpeg(jpeg, "RGB", fastdct=False, fastupsample=False, strict=True)
    except Exception as error:
        reject_unreadable(error)


@dataclass(frozen=True)
class _View:
    """What is seen of a picture: its size when upright, how to turn it so, and the box that is kept, all in pixels."""

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
        """Width and height of what is kept."""
        return self.whole if self.box is None else self.box[2:]

    def scale_for(self, target: tuple[int, int]) -> tuple[int, int]:
        """The stored size that a scaled decoding must not go below, so that what is kept has twice the target.

        Twice leaves the resampling filter enough to work on.
        """
        least = [
            math.ceil(2 * wanted * whole / kept)
            for wanted, whole, kept in zip(target, self.whole, self.size, strict=True)
        ]
        width, height = reversed(least) if self.orientation in _TURNED else least
        return width, height

    def within(self, size: tuple[int, int]) -> tuple[float, float, float, float]:
        """The box as left, top, right and bottom in the upright picture decoded at `size`."""
        left, top, width, height = self.box or (0, 0, *self.whole)
        x, y = size[0] / self.whole[0], size[1] / self.whole[1]
        return left * x, top * y, min(size[0], (left + width) * x), min(size[1], (top + height) * y)

    def cut(self, image: Image.Image) -> Image.Image:
        """The box of an upright picture, to whole pixels."""
        if self.box is None:
            return image
        left, top, right, bottom = self.within(image.size)
        return image.crop((math.floor(left), math.floor(top), math.ceil(right), math.ceil(bottom)))


def _by_planes(data: bytes, image: Image.Image, view: _View, size: int, quality: int) -> bytes | None:
    """An ordinary JPEG squashed to size×size without ever being made RGB; None if it is another kind of picture.

    Resampling is most of the work, and colour is stored at half the resolution: so brightness is resized by itself,
    and colour straight to the half-size planes of the result. tests/bench/README.md has what that gains, and how near
    the result is to the exactly resized picture.
    """
    if not is_jpeg(image) or image.mode != "RGB" or size % 2:
        return None
    try:
        planes = _decode_planes(data, image, view, size)
    except MemoryError:
        raise
    except Exception:
        # Damaged, or stored in another way: the other path decides which.
        return None
    resized = []
    for plane, side in zip(planes, (size, size // 2, size // 2), strict=True):
        upright = _upright_plane(plane, view.orientation)
        resized.append(resample(upright, side, view.within(upright.shape[::-1])))
    return simplejpeg.encode_jpeg_yuv_planes(*resized, quality)


def _decode_planes(data: bytes, image: Image.Image, view: _View, size: int) -> Sequence[np.ndarray]:
    """Brightness, blueness and redness, (h, w) each, at twice the size it is wanted at or more; raises anything.

    Brightness alone decodes fast, and colour from half the size: two decodings cost less than one of everything. Of a
    progressive file they do not: there finding the coefficients, which both must do, is most of the work.
    """
    width, height = view.scale_for((size, size))
    if image.info.get("progressive"):
        image = open_jpeg(data)  # should it fail, the other path needs its own as it was
        image.draft("YCbCr", (width, height))
        return [np.asarray(plane) for plane in image.split()]
    grey = simplejpeg.decode_jpeg(data, "GRAY", min_width=width, min_height=height, strict=True)[:, :, 0]
    width, height = view.scale_for((size // 2, size // 2))
    blue, red = _colour(simplejpeg.decode_jpeg(data, "RGB", min_width=width, min_height=height, strict=True))
    return grey, blue, red


# Cb and Cr of R, G and B (JFIF 1.02, section 7), in whole multiples of 2⁻¹⁴: then float32 adds them without error.
_COLOUR = (
    np.rint(np.array([[-0.168736, -0.331264, 0.5], [0.5, -0.418688, -0.081312]]) * 2**14).astype(np.float32) / 2**14
)


# Rows are converted so many pixels at a time, to stay in the processor's cache and take no memory to speak of.
_PIXELS_AT_ONCE = 1 << 15


def _colour(rgb: np.ndarray) -> np.ndarray:
    """(h, w, 3) uint8 RGB to (2, h, w) uint8 Cb and Cr."""
    height, width, _ = rgb.shape
    out = np.empty((2, height, width), dtype=np.uint8)
    rows = max(1, _PIXELS_AT_ONCE // width)
    for top in range(0, height, rows):
        strip = rgb[top : top + rows]
        pixels = strip.reshape(-1, 3).T.astype(np.float32, order="C")
        # The half that rounds is one unit short of it, or the purest blue and red would become 256, which is 0.
        out[:, top : top + rows] = (_COLOUR @ pixels + np.float32(128.5 - 2**-14)).reshape(2, *strip.shape[:2])
    return out


def _check_target(target: tuple[int, int], size: int, max_pixels: int) -> None:
    width, height = target
    if width * height > max(max_pixels, size * size):
        raise ImageRejected(
            "too_large", f"{width}×{height} with its short side at {size}, more than {max_pixels:,} pixels"
        )


def _target(source: tuple[int, int], size: int, policy: str) -> tuple[int, int]:
    """The size in pixels to resize a picture to, before it is padded or cropped to size×size."""
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
        # A broken EXIF block says nothing of the orientation: the picture is shown as stored, as viewers do.
        return 1
    return orientation if orientation in _UPRIGHT else 1


def _upright(image: Image.Image, orientation: int) -> Image.Image:
    method = _UPRIGHT.get(orientation)
    return image if method is None else image.transpose(method)


def _upright_plane(plane: np.ndarray, orientation: int) -> np.ndarray:
    return np.asarray(_upright(Image.fromarray(plane), orientation)) if orientation in _UPRIGHT else plane


def _to_rgb(image: Image.Image) -> Image.Image:
    """RGB, with transparent parts over white; or the colours alone where transparency would hide them all."""
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
        raise ImageRejected("invisible", "all of it is transparent, and no picture lies beneath")
    return colours


def _fit(image: Image.Image, size: int, policy: str) -> Image.Image:
    target = _target(image.size, size, policy)
    resized = image.resize(target, Image.Resampling.LANCZOS)
    if target == (size, size):
        return resized
    # Larger than the square is cut on both sides alike, smaller is padded on both sides alike.
    canvas = Image.new("RGB", (size, size), _LETTERBOX_RGB)
    canvas.paste(resized, ((size - target[0]) // 2, (size - target[1]) // 2))
    return canvas
