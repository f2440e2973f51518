import io
import struct
import tracemalloc

import numpy as np
import pytest
import simplejpeg
from pictures import encoded, picture
from PIL import Image, ImageCms
from PIL.PngImagePlugin import PngImageFile, PngInfo

from kfood_dist.data.picture.images import (
    RESIZE_POLICIES,
    ImageRejected,
    _colour,
    decode_rgb,
    prepare_cropped,
    prepare_jpeg,
    usable_box,
)

RED, GREEN, BLUE, WHITE = (200, 30, 30), (30, 160, 60), (40, 60, 200), (255, 255, 255)


def quarters(width=120, height=80):
    """Return a picture with red and green above, blue and white below. It shows if a result is turned or mirrored."""
    image = Image.new("RGB", (width, height))
    for i, colour in enumerate((RED, GREEN, BLUE, WHITE)):
        left, top = i % 2 * width // 2, i // 2 * height // 2
        image.paste(colour, (left, top, left + width // 2, top + height // 2))
    return image


def corners(pixels):
    """Return the colours in the middle of the four quarters, row by row."""
    height, width, _ = pixels.shape
    return [tuple(pixels[y, x]) for y in (height // 4, height * 3 // 4) for x in (width // 4, width * 3 // 4)]


def assert_colours(found, expected, tolerance=12):
    difference = np.abs(np.array(found, dtype=int) - np.array(expected, dtype=int)).max()
    assert difference <= tolerance, f"{found} is not {expected}"


# For each EXIF orientation (TIFF 6.0), the transpose from the upright picture to the one that a camera stores.
STORED = {
    1: None,
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


@pytest.mark.parametrize("orientation", STORED)
def test_exif_orientation_is_applied(orientation):
    stored = quarters() if STORED[orientation] is None else quarters().transpose(STORED[orientation])
    exif = Image.Exif()
    exif[0x0112] = orientation
    prepared = decode_rgb(prepare_jpeg(encoded(stored, exif=exif, quality=95), 64))
    assert_colours(corners(prepared), [RED, GREEN, BLUE, WHITE])


def test_the_aspect_ratio_of_a_turned_picture_is_that_of_the_upright_picture():
    exif = Image.Exif()
    exif[0x0112] = 6
    stored = Image.new("RGB", (400, 200), RED)
    pixels = decode_rgb(prepare_jpeg(encoded(stored, exif=exif), 64, "letterbox"))
    assert_colours([pixels[32, 4], pixels[4, 32]], [(114, 114, 114), RED])


def test_a_picture_with_a_broken_exif_block_is_still_used():
    text = PngInfo()
    text.add_text("Raw profile type exif", "\nexif\n4\nno hexadecimal digits")
    with_text = encoded(quarters(), "PNG", pnginfo=text)
    with pytest.raises(ValueError, match="fromhex"):
        Image.open(io.BytesIO(with_text)).getexif()
    for data in (encoded(quarters(), exif=b"Exif\x00\x00II*\x00\xff\xff\xff\xff broken"), with_text):
        assert_colours(corners(decode_rgb(prepare_jpeg(data, 64))), [RED, GREEN, BLUE, WHITE])


@pytest.mark.parametrize(
    ("mode", "kind"),
    [
        ("RGB", "JPEG"),
        ("RGB", "PNG"),
        ("RGB", "BMP"),
        ("RGB", "GIF"),
        ("RGB", "WEBP"),
        ("RGB", "MPO"),
        ("RGB", "TIFF"),
        ("RGB", "AVIF"),
        ("RGB", "JPEG2000"),
        ("CMYK", "JPEG"),
        ("CMYK", "TIFF"),
        ("LAB", "TIFF"),
        ("P", "TIFF"),
        ("P", "PNG"),
        ("P", "GIF"),
        ("RGBA", "PNG"),
    ],
)
def test_every_format_and_mode_becomes_the_same_rgb_square(mode, kind):
    image = {"P": lambda: quarters().quantize(16), "LAB": lambda: as_lab(quarters())}.get(
        mode, lambda: quarters().convert(mode)
    )()
    pixels = decode_rgb(prepare_jpeg(encoded(image, kind), 64))
    assert pixels.shape == (64, 64, 3)
    assert pixels.dtype == np.uint8
    assert_colours(corners(pixels), [RED, GREEN, BLUE, WHITE], tolerance=20)


def as_lab(image):
    srgb, lab = (ImageCms.createProfile(name) for name in ("sRGB", "LAB"))
    return ImageCms.applyTransform(image, ImageCms.buildTransform(srgb, lab, "RGB", "LAB"))


def hidden(alpha=0):
    """Return a colour picture that is completely transparent."""
    image = picture(1).convert("RGBA")
    image.putalpha(alpha)
    return image


def bmp_with_alpha(image):
    """Return a 32-bit BMP with a BITMAPV5HEADER and an alpha mask. Pillow cannot write one."""
    width, height = image.size
    pixels = image.transpose(Image.Transpose.FLIP_TOP_BOTTOM).tobytes("raw", "BGRA")
    masks = (0xFF0000, 0xFF00, 0xFF, 0xFF000000)
    header = struct.pack("<IiiHHIIiiII4I", 124, width, height, 1, 32, 3, len(pixels), 2835, 2835, 0, 0, *masks)
    return struct.pack("<2sIHHI", b"BM", 138 + len(pixels), 0, 0, 138) + header.ljust(124, b"\0") + pixels


GREY_HIDDEN = hidden().convert("LA")
HIDDEN = {
    "bmp": bmp_with_alpha(hidden()),
    "png": encoded(hidden(), "PNG"),
    "png, alpha of 1": encoded(hidden(1), "PNG"),
    "png, grey": encoded(GREY_HIDDEN, "PNG"),
    "png, palette": encoded(picture(1).quantize(256), "PNG", transparency=bytes(256)),
    "webp": encoded(hidden(), "WEBP", lossless=True, exact=True),
    "tiff": encoded(hidden(), "TIFF"),
    "avif": encoded(hidden(), "AVIF"),
    "jpeg 2000": encoded(hidden(), "JPEG2000"),
}


@pytest.mark.parametrize("kind", HIDDEN)
@pytest.mark.parametrize("policy", RESIZE_POLICIES)
def test_an_alpha_that_hides_everything_is_ignored(kind, policy):
    visible = GREY_HIDDEN.convert("L") if "grey" in kind else picture(1)
    wanted = decode_rgb(prepare_jpeg(encoded(visible, "PNG"), 64, policy)).astype(int)
    found = decode_rgb(prepare_jpeg(HIDDEN[kind], 64, policy)).astype(int)
    assert np.abs(found - wanted).mean() < 12


def test_a_transparent_picture_without_hidden_colours_is_refused():
    """Without the option `exact`, libwebp drops hidden colours: each row of blocks becomes nearly one colour."""
    empty = Image.new("RGBA", (64, 64), (0, 0, 0, 0))
    blank = Image.new("P", (64, 64))
    for data in (
        encoded(empty, "PNG"),
        bmp_with_alpha(empty),
        encoded(blank, "GIF", transparency=0),
        encoded(Image.new("RGB", (64, 64), RED), "PNG", transparency=RED),
        encoded(hidden().resize((300, 200)), "WEBP"),
    ):
        with pytest.raises(ImageRejected, match="invisible: all of it is transparent"):
            prepare_jpeg(data, 64)


def test_an_alpha_that_hides_only_the_crop_box_is_ignored_too():
    image = picture(1, 200, 100).convert("RGBA")
    alpha = Image.new("L", (200, 100), 255)
    alpha.paste(0, (100, 0, 200, 100))
    image.putalpha(alpha)
    found, wanted = (
        decode_rgb(prepare_jpeg(encoded(which, "PNG"), 64, box=(100, 0, 100, 100))).astype(int)
        for which in (image, picture(1, 200, 100))
    )
    assert np.abs(found - wanted).mean() < 1


def test_transparent_parts_become_white():
    image = Image.new("RGBA", (80, 80), (*RED, 0))
    image.paste((*RED, 255), (0, 0, 40, 80))
    palette = Image.new("P", (80, 80), 1)
    palette.putpalette([*RED, *GREEN])
    palette.paste(0, (0, 0, 40, 80))
    for data in (encoded(image, "PNG"), encoded(palette, "PNG", transparency=1)):
        assert_colours(corners(decode_rgb(prepare_jpeg(data, 64)))[:2], [RED, WHITE])


def test_16_bit_grey_keeps_its_gradations():
    grey = np.repeat(np.linspace(0, 65535, 64).astype(np.uint16)[None], 64, axis=0)
    pixels = decode_rgb(prepare_jpeg(encoded(Image.fromarray(grey), "PNG"), 64))
    assert_colours(pixels[32, [0, 16, 32, 48, 63], 0], (grey[0, [0, 16, 32, 48, 63]] >> 8), tolerance=6)


def test_each_resize_policy_treats_a_wide_picture_as_documented():
    image = Image.new("RGB", (400, 200), GREEN)
    image.paste(RED, (0, 0, 60, 200))
    data = encoded(image, "PNG")
    squash, letterbox, crop = (decode_rgb(prepare_jpeg(data, 64, p)) for p in ("squash", "letterbox", "crop"))
    assert {p.shape for p in (squash, letterbox, crop)} == {(64, 64, 3)}
    assert_colours([squash[32, 4], squash[4, 32]], [RED, GREEN])
    assert_colours([letterbox[32, 4], letterbox[4, 32], letterbox[60, 32]], [RED, (114,) * 3, (114,) * 3])
    assert_colours([crop[32, 4], crop[4, 32]], [GREEN, GREEN])
    with pytest.raises(ValueError, match="stretch"):
        prepare_jpeg(data, 64, "stretch")


@pytest.mark.parametrize("shape", [(33, 4000), (4000, 33), (97, 101), (64, 64)])
@pytest.mark.parametrize("policy", ["squash", "letterbox", "crop"])
def test_any_shape_fills_the_square(shape, policy):
    pixels = decode_rgb(prepare_jpeg(encoded(picture(1, *shape)), 64, policy))
    assert pixels.shape == (64, 64, 3)


def test_scaled_decoding_stays_close_to_full_decoding():
    """A PNG of the same pixels is always decoded at full size. The difference must be invisible (over 38 dB)."""
    image = picture(2, 1600, 1200)
    jpeg = encoded(image, quality=95)
    same_as_png = encoded(Image.open(io.BytesIO(jpeg)), "PNG")
    for policy in ("squash", "letterbox", "crop"):
        scaled, full = (decode_rgb(prepare_jpeg(d, 64, policy, 95)) for d in (jpeg, same_as_png))
        error = np.mean((scaled.astype(float) - full.astype(float)) ** 2)
        assert 10 * np.log10(255**2 / max(error, 1e-9)) > 38


def test_fine_detail_survives_scaled_decoding():
    """The pattern is just coarse enough for the target. It is lost if the decoder scales below twice the target."""
    x = np.arange(1024)
    stripes = (127 + 100 * np.sin(2 * np.pi * x * 20 / 1024)).astype(np.uint8)
    image = Image.fromarray(np.repeat(stripes[None], 1024, axis=0)).convert("RGB")
    pixels = decode_rgb(prepare_jpeg(encoded(image, quality=95), 64, quality=95))
    assert pixels[32, :, 0].std() > 55


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty"),
        (b"not a picture at all", "unreadable"),
        (b"\xff\xd8\xff\xe0" + bytes(64), "unreadable"),
        (encoded(picture(3))[:-400], "unreadable"),
        (encoded(picture(3), "PNG")[:900], "unreadable"),
        (encoded(picture(3, 31, 90)), "too_small"),
        (encoded(Image.new("1", (10001, 10000)), "PNG"), "too_large"),
        (encoded(Image.new("1", (20000, 20000)), "PNG"), "too_large"),
    ],
)
def test_an_unusable_picture_is_rejected_with_a_one_word_reason(data, reason):
    with pytest.raises(ImageRejected) as rejected:
        prepare_jpeg(data, 64)
    assert rejected.value.reason == reason
    assert rejected.value.detail
    assert "0x" not in rejected.value.detail.replace("0x…", "")  # no memory address, because it differs in each run


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
@pytest.mark.parametrize("box", [None, (8, 8, 16, 59_000)])
def test_a_picture_too_long_to_crop_is_refused_before_it_takes_memory(monkeypatch, kind, box):
    data = encoded(Image.new("L", (32, 60_000)), kind)
    monkeypatch.setattr(Image.Image, "resize", lambda *_, **__: pytest.fail("resized"))
    if kind == "JPEG":
        monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda *_: pytest.fail("decoded"))
    with pytest.raises(ImageRejected, match=r"too_large: 448×(840000|1652000) with its short side at 448, more"):
        prepare_jpeg(data, 448, "crop", box=box)


def test_limits_are_inclusive_and_can_be_set():
    assert prepare_jpeg(encoded(picture(4, 32, 32)), 64)
    with pytest.raises(ImageRejected, match="too_small"):
        prepare_jpeg(encoded(picture(4, 96, 72)), 64, min_side=73)
    assert prepare_jpeg(encoded(picture(4, 100, 100)), 64, max_pixels=10_000)
    with pytest.raises(ImageRejected, match="too_large"):
        prepare_jpeg(encoded(picture(4, 100, 101)), 64, max_pixels=10_000)


def test_the_result_is_deterministic_and_depends_on_the_quality():
    data = encoded(picture(5, 300, 200))
    assert prepare_jpeg(data, 64) == prepare_jpeg(data, 64)
    assert len(prepare_jpeg(data, 64, quality=30)) < len(prepare_jpeg(data, 64, quality=95))


def test_the_packed_jpeg_is_baseline_rgb_without_metadata():
    exif = Image.Exif()
    exif[0x0112] = 6
    with Image.open(io.BytesIO(prepare_jpeg(encoded(picture(6), exif=exif), 64))) as image:
        assert (image.format, image.mode, image.size) == ("JPEG", "RGB", (64, 64))
        assert not image.getexif()
        assert "progressive" not in image.info


def test_decoding_anything_but_a_complete_jpeg_is_refused():
    for data in (b"", b"junk", encoded(picture(7), "PNG"), encoded(picture(7))[:300]):
        with pytest.raises(ImageRejected, match="unreadable"):
            decode_rgb(data)


@pytest.mark.parametrize(
    ("decoder", "kind", "policy"),
    [
        ("simplejpeg.decode_jpeg", "JPEG", "squash"),
        ("PIL.ImageFile.ImageFile.load", "JPEG", "crop"),
        ("PIL.ImageFile.ImageFile.load", "PNG", "squash"),
        ("PIL.ImageFile.ImageFile.load", "GIF", "letterbox"),
        ("kfood_dist.data.picture.decoding.jpeg_factory", "JPEG", "squash"),
        ("PIL.Image.open", "PNG", "squash"),
    ],
)
def test_a_lack_of_memory_does_not_reject_a_picture(monkeypatch, decoder, kind, policy):
    data = encoded(picture(8), kind)
    monkeypatch.setattr(decoder, lambda *_, **__: bytes(1 << 62))
    with pytest.raises(MemoryError):
        prepare_jpeg(data, 64, policy)


def test_a_lack_of_memory_does_not_reject_a_packed_picture(monkeypatch):
    monkeypatch.setattr("simplejpeg.decode_jpeg", lambda *_, **__: bytes(1 << 62))
    with pytest.raises(MemoryError):
        decode_rgb(encoded(picture(8)))


# --- crop boxes


def quadrants(width=400, height=300, **save):
    """Return a picture file with red, green, blue and white quarters, a JPEG by default."""
    image = Image.new("RGB", (width, height))
    for i, colour in enumerate(COLOURS):
        image.paste(
            colour, (i % 2 * width // 2, i // 2 * height // 2, (i % 2 + 1) * width // 2, (i // 2 + 1) * height // 2)
        )
    buffer = io.BytesIO()
    image.save(buffer, save.pop("format", "JPEG"), quality=95, **save)
    return buffer.getvalue()


COLOURS = ((220, 30, 30), (30, 220, 30), (30, 30, 220), (240, 240, 240))


@pytest.mark.parametrize("policy", RESIZE_POLICIES)
@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
@pytest.mark.parametrize("quarter", range(4))
def test_only_the_crop_box_is_kept(policy, kind, quarter):
    box = (quarter % 2 * 200 + 10, quarter // 2 * 150 + 10, 180, 130)
    rgb = decode_rgb(prepare_jpeg(quadrants(format=kind), 32, policy, box=box)).astype(int)
    assert np.abs(rgb[12:20, 4:28] - COLOURS[quarter]).max() < 12


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_crop_box_refers_to_the_upright_picture(orientation, kind):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = quadrants(format=kind, exif=exif.tobytes())
    upright = decode_rgb(prepare_jpeg(data, 64)).astype(int)
    width, height = (400, 300) if orientation < 5 else (300, 400)
    for i, (x, y) in enumerate(((0, 0), (1, 0), (0, 1), (1, 1))):
        box = (x * width // 2 + 8, y * height // 2 + 8, width // 2 - 16, height // 2 - 16)
        kept = decode_rgb(prepare_jpeg(data, 32, box=box)).astype(int).mean((0, 1))
        assert np.abs(kept - upright[i // 2 * 32 + 16, i % 2 * 32 + 16]).max() < 12


@pytest.mark.parametrize(
    ("box", "usable"),
    [
        ((0, 0, 100, 80), (0, 0, 100, 80)),
        ((-20, -10, 60, 50), (0, 0, 40, 40)),
        ((95, 10, 500, 500), None),
        ((60, 10, 500, 500), (60, 10, 40, 70)),
        ((0, 0, 0, 0), None),
        ((10, 10, -5, 20), None),
        ((200, 200, 50, 50), None),
        ((10, 10, 3, 60), None),
    ],
)
def test_a_crop_box_is_clipped_to_the_picture(box, usable):
    assert usable_box(box, 100, 80) == usable
    data = quadrants(100, 80)
    assert prepare_jpeg(data, 32, box=box) == prepare_jpeg(data, 32, box=usable)
    if usable is None:
        assert prepare_jpeg(data, 32, box=box) == prepare_jpeg(data, 32)


@pytest.mark.parametrize(("box", "cropped"), [(None, None), ((10, 10, 60, 40), True), ((90, 10, 60, 40), False)])
def test_a_png_is_decoded_once_and_not_before_its_size_is_checked(monkeypatch, box, cropped):
    decoded, load = [], PngImageFile.load_prepare
    monkeypatch.setattr(PngImageFile, "load_prepare", lambda image: decoded.append(image) or load(image))
    assert prepare_cropped(quadrants(95, 80, format="PNG"), 32, "squash", 90, 32, box)[1] is cropped
    assert len(decoded) == 1
    with pytest.raises(ImageRejected, match="too_large"):
        prepare_cropped(quadrants(95, 80, format="PNG"), 32, "squash", 90, 32, box, max_pixels=7000)
    assert len(decoded) == 1


def test_a_small_box_of_a_large_picture_is_decoded_at_twice_the_target(monkeypatch):
    """A box of a 4,000-pixel picture becomes 224 px. Scaled decoding must leave at least 448 pixels of the box."""
    seen = []
    decode = simplejpeg.decode_jpeg
    monkeypatch.setattr(
        simplejpeg, "decode_jpeg", lambda *a, **k: seen.append(decode(*a, **k).shape) or decode(*a, **k)
    )
    for box, width, height in (
        (None, 448, 448),
        ((0, 0, 2000, 1500), 896, 896),
        ((100, 100, 600, 600), 2987, 2240),
    ):
        prepare_jpeg(quadrants(4000, 3000), 224, box=box)
        brightness, colour = seen
        seen.clear()
        assert brightness[1] >= width and brightness[0] >= height
        assert brightness[1] < 4000, "decoded at full size"
        assert colour[1] >= width / 2 and colour[0] >= height / 2
        assert colour[1] < brightness[1], "the colour planes were decoded larger than stored"


def test_colour_conversion_follows_the_jfif_standard():
    """The expected values are computed in float64 by the standard's formula. Pure colours must not overflow."""
    steps = np.array([0, 1, 77, 128, 200, 254, 255], dtype=np.uint8)
    rgb = np.stack(np.meshgrid(steps, steps, steps), -1).reshape(1, -1, 3)
    red, green, blue = np.moveaxis(rgb.astype(float), -1, 0)
    brightness = 0.299 * red + 0.587 * green + 0.114 * blue
    exact = np.stack([128 + 0.5 * (blue - brightness) / (1 - 0.114), 128 + 0.5 * (red - brightness) / (1 - 0.299)])
    assert np.abs(_colour(rgb) - exact.clip(0, 255)).max() <= 0.52


def test_colour_conversion_takes_little_more_memory_than_its_result():
    """A small box of a picture of 100 million pixels is decoded unscaled. In float32 that would take gigabytes."""
    rgb = np.zeros((2000, 3000, 3), dtype=np.uint8)
    tracemalloc.start()
    result = _colour(rgb)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < result.nbytes + 2 * 2**20


# --- brightness and colour resized separately


def pillow_alone(data, size=224):
    return Image.open(io.BytesIO(data)).convert("RGB").resize((size, size), Image.Resampling.LANCZOS)


def psnr(a, b):
    return 10 * np.log10(255**2 / np.mean((np.asarray(a, float) - np.asarray(b, float)) ** 2))


@pytest.mark.parametrize("size", [(640, 480), (1600, 1200), (333, 517), (224, 224), (100, 900)])
@pytest.mark.parametrize("sampling", ["4:2:0", "4:2:2", "4:4:4"])
def test_the_fast_path_is_nearly_as_exact_as_pillows_own_jpeg(size, sampling):
    """On drawn forms, ours may be at most 2 dB below Pillow's, and must be above 40 dB.

    tests/bench/README.md has the figures of real photographs.
    """
    forms = np.random.default_rng(3).integers(0, 256, (9, 12, 3), dtype=np.uint8)
    image = Image.fromarray(forms).resize(size, Image.Resampling.BICUBIC)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=92, subsampling=sampling)
    exact = pillow_alone(buffer.getvalue())
    stored = io.BytesIO()
    exact.save(stored, "JPEG", quality=90, subsampling="4:2:0")
    ours, pillows = decode_rgb(prepare_jpeg(buffer.getvalue(), 224)), decode_rgb(stored.getvalue())
    assert psnr(ours, exact) > max(40, psnr(pillows, exact) - 2)


@pytest.mark.parametrize(
    "save", [{"keep_rgb": True}, {"progressive": True}, {"optimize": True}, {"restart_marker_rows": 1}]
)
def test_other_kinds_of_jpeg_look_the_same(save):
    image = Image.fromarray(np.random.default_rng(5).integers(0, 256, (6, 8, 3), dtype=np.uint8)).resize((300, 200))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=95, **save)
    assert psnr(decode_rgb(prepare_jpeg(buffer.getvalue(), 64)), pillow_alone(buffer.getvalue(), 64)) > 30


def test_decoding_gives_the_same_values_as_pillow():
    for data in (quadrants(), quadrants(progressive=True), quadrants(101, 67)):
        assert (decode_rgb(data) == np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))).all()
    grey = io.BytesIO()
    Image.new("L", (30, 20), 99).save(grey, "JPEG")
    assert decode_rgb(grey.getvalue()).shape == (20, 30, 3)
    for length in range(0, len(quadrants()), 97):
        with pytest.raises(ImageRejected, match="unreadable"):
            decode_rgb(quadrants()[:length])
