"""The picture files that are read, the memory to decode them, and metadata that is ignored."""

import io
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
from pictures import encoded, picture, tall_jpeg
from PIL import Image

from kfood_dist.data.picture.images import ImageRejected, decode_rgb, prepare_jpeg


def heic(image, **options):
    """Return the image as the bytes of a HEIC file."""
    from pillow_heif import from_pillow

    buffer = io.BytesIO()
    from_pillow(image).save(buffer, quality=95, **options)
    return buffer.getvalue()


def packed(data, size=64, **options):
    return decode_rgb(prepare_jpeg(data, size, **options)).astype(int)


def assert_shows(data, image, tolerance=4.0, **options):
    assert np.abs(packed(data, **options) - packed(encoded(image, "PNG"))).mean() < tolerance


# --- formats


@pytest.mark.parametrize("orientation", [1, 3, 5, 6, 8])
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF", "HEIC"])
def test_every_kind_of_file_is_turned_upright(kind, orientation):
    turned = {1: None, 3: 1, 5: 5, 6: 2, 8: 4}[orientation]  # Pillow's Transpose from upright to stored
    turns = {None: None, 1: Image.Transpose.ROTATE_180, 5: Image.Transpose.TRANSPOSE}
    turns |= {2: Image.Transpose.ROTATE_90, 4: Image.Transpose.ROTATE_270}
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = picture(2) if turned is None else picture(2).transpose(turns[turned])
    data = heic(stored, exif=exif.tobytes()) if kind == "HEIC" else encoded(stored, kind, exif=exif)
    assert_shows(data, picture(2), tolerance=8)


def tiff(pixels, bits, photometric, extra=()):
    """Return a plain TIFF of packed samples.

    `pixels` has the shape (height, width, samples) with little-endian numbers, or is bytes of 96×72 grey values.
    """
    height, width, samples = (72, 96, 1) if isinstance(pixels, bytes) else pixels.shape
    data = pixels if isinstance(pixels, bytes) else pixels.tobytes()
    tags = [(256, width), (257, height), (259, 1), (262, photometric), (277, samples), (278, height), (279, len(data))]
    entries = [(tag, 4, 1, value) for tag, value in tags] + list(extra)
    after = 8 + 2 + 12 * (len(entries) + 2) + 4
    entries += [(258, 3, samples, after if samples > 2 else bits), (273, 4, 1, after + 2 * samples)]
    rows = b"".join(struct.pack("<HHII", *entry) for entry in sorted(entries))
    head = b"II*\0" + struct.pack("<IH", 8, len(entries)) + rows + bytes(4)
    return head + struct.pack(f"<{samples}H", *[bits] * samples) + data


GREY = np.asarray(picture(2).convert("L"))
GREY_16 = GREY.astype("<u2") * 257
RGB_16 = np.asarray(picture(2)).astype("<u2") * 257


def in_12_bits(grey):
    first, second = (grey.reshape(-1, 2).astype(int) * 16).T
    return np.stack([first >> 4, (first & 15) << 4 | second >> 8, second & 255], 1).astype(np.uint8).tobytes()


@pytest.mark.parametrize(
    ("data", "grey"),
    [
        (tiff(RGB_16, 16, 2), False),
        (tiff(np.dstack([RGB_16, RGB_16[..., 0] * 0]), 16, 2, [(338, 3, 1, 2)]), False),  # its alpha hides everything
        (tiff(GREY_16[..., None], 16, 1), True),
        (tiff(65535 - GREY_16[..., None], 16, 0), True),  # white is zero
        (tiff(255 - GREY[..., None], 8, 0), True),
        (tiff(in_12_bits(GREY), 12, 1), True),
        (encoded(Image.fromarray(GREY_16.astype(">u2")), "TIFF"), True),
        (encoded(Image.fromarray(GREY_16.astype(np.int32)), "TIFF"), True),
        (encoded(picture(2), "TIFF", compression="tiff_lzw"), False),
        (encoded(picture(2), "TIFF", compression="jpeg", quality=95), False),
        (encoded(picture(2), "TIFF", save_all=True, append_images=[Image.new("RGB", (500, 400))]), False),
        (encoded(Image.fromarray(GREY_16), "JPEG2000"), True),
    ],
)
def test_a_tiff_with_more_bits_or_pages_is_decoded_correctly(data, grey):
    assert_shows(data, picture(2).convert("L") if grey else picture(2))


@pytest.mark.parametrize("values", [GREY.astype(np.float32) / 255, GREY.astype(np.int32) * 2**20])
def test_pixel_values_without_a_defined_white_are_refused(values):
    with pytest.raises(ImageRejected, match=r"unreadable: a picture of mode [FI], which does not say what value"):
        prepare_jpeg(encoded(Image.fromarray(values), "TIFF"), 64)


def test_heic_is_read():
    assert_shows(heic(picture(2)), picture(2))
    assert_shows(heic(picture(2).convert("L")), picture(2).convert("L"))
    with pytest.raises(ImageRejected, match="too_large: 96×72, more than 1,000 pixels"):
        prepare_jpeg(heic(picture(2)), 64, max_pixels=1000)
    with pytest.raises(ImageRejected, match="unreadable"):
        prepare_jpeg(heic(picture(2))[:-200], 64)


def test_heic_without_its_package_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    with pytest.raises(ImageRejected, match=r"needs_heic_extra: .*pillow-heif → pip install 'kfood_dist\[heic\]'"):
        prepare_jpeg(heic_header(b"mif1", b"heic"), 64)
    assert_shows(encoded(picture(2), "AVIF", quality=95), picture(2))
    for brands in ((b"isom", b"mp42"), (b"mif1", b"avif")):
        with pytest.raises(ImageRejected, match="unreadable"):
            prepare_jpeg(heic_header(*brands), 64)


def heic_header(*brands):
    body = b"ftyp" + brands[0] + bytes(4) + b"".join(brands)
    return struct.pack(">I", 4 + len(body)) + body + bytes(100)


# --- metadata


def segment(marker, body):
    return struct.pack(">BBH", 0xFF, marker, len(body) + 2) + body


def jpeg_with(*segments, **options):
    data = encoded(picture(2), **options)
    return data[:2] + b"".join(segments) + data[2:]


def chunk(kind, body, crc=None):
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", crc or zlib.crc32(kind + body))


def png_with(*chunks, behind=False):
    data = encoded(picture(2), "PNG")
    at = len(data) - 12 if behind else 33  # before IEND, or after IHDR
    return data[:at] + b"".join(chunks) + data[at:]


def exif_of(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif.tobytes()


LARGE = bytes(1_500_000)
XMP = b"<x:xmpmeta/>" + b" " * 1_500_000
PNG_XMP = chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + zlib.compress(XMP))
PHOTOSHOP = b"Photoshop 3.0\0" + b"8BIM\x04\x04\0\0" + struct.pack(">I", 40_000) + bytes(40_000)
UNUSED = {
    "png, large XMP": png_with(PNG_XMP),
    "png, large XMP behind the pixels": png_with(PNG_XMP, behind=True),
    "png, large text": png_with(chunk(b"zTXt", b"Comment\0\0" + zlib.compress(XMP))),
    "png, many large texts": png_with(*[chunk(b"zTXt", b"k\0\0" + zlib.compress(LARGE[:999_999]))] * 70),
    "png, large profile": encoded(picture(2), "PNG", icc_profile=LARGE),
    "png, profile of another compression": png_with(chunk(b"iCCP", b"profile\0\7rubbish")),
    "png, profile without an end": png_with(chunk(b"iCCP", b"profile\0")),
    "png, wrong checksum of a text": png_with(chunk(b"tEXt", b"Comment\0none", crc=1)),
    "png, short resolution": png_with(chunk(b"pHYs", b"\0")),
    "png, short gamma": png_with(chunk(b"gAMA", b"\0")),
    "png, broken EXIF": png_with(chunk(b"eXIf", b"MM\0*\xff\xff\xff\xff")),
    "jpeg, large profile": encoded(picture(2), icc_profile=LARGE),
    "jpeg, large XMP": encoded(picture(2), xmp=XMP[:65_000]),
    "jpeg, large EXIF": jpeg_with(*[segment(0xE1, b"Exif\0\0" + bytes(60_000))] * 5),
    "jpeg, large Photoshop block": jpeg_with(segment(0xED, PHOTOSHOP)),
    "jpeg, empty profile": jpeg_with(segment(0xE2, b"ICC_PROFILE\0")),
    "jpeg, short profile": jpeg_with(segment(0xE2, b"ICC_PROFILE\0\1")),
    "jpeg, short JFIF": jpeg_with(segment(0xE0, b"JFIF\0")),
    "jpeg, short Adobe": jpeg_with(segment(0xEE, b"Adobe")),
    "jpeg, short Photoshop block": jpeg_with(segment(0xED, b"Photoshop 3.0\x008BIM\0\0")),
    "jpeg, broken EXIF": jpeg_with(segment(0xE1, b"Exif\0\0MM\0*\0\0\0\x08\0\4\1\x12\0\x63")),
    "jpeg, broken MPF": jpeg_with(segment(0xE2, b"MPF\0MM\0*\0\0\0\x08\0\3\xb0\1\0\4\0\0\0\1\xff\xff\xff\xff")),
    "webp, large": encoded(picture(2), "WEBP", quality=95, icc_profile=LARGE, xmp=XMP, exif=b"Exif\0\0" + LARGE),
    "tiff, large": encoded(picture(2), "TIFF", icc_profile=LARGE, tiffinfo={700: XMP, 305: "x" * 1_500_000}),
    "tiff, broken": tiff(np.asarray(picture(2)), 8, 2, [(700, 99, 999, 5), (34665, 4, 1, 2**32 - 9)]),
    "avif, large": encoded(picture(2), "AVIF", quality=95, icc_profile=LARGE, xmp=XMP, exif=exif_of(1) + LARGE),
    "heic, large": heic(picture(2), xmp=XMP, exif=exif_of(1) + LARGE),
    "gif, large comment": encoded(picture(2), "GIF", comment=LARGE),
}


@pytest.mark.parametrize("kind", UNUSED)
def test_unused_metadata_never_rejects_a_picture(kind):
    assert_shows(UNUSED[kind], picture(2), tolerance=8)


@pytest.mark.parametrize(
    "data",
    [
        png_with(PNG_XMP, chunk(b"eXIf", exif_of(6)[6:])),
        png_with(PNG_XMP, chunk(b"eXIf", exif_of(6)[6:]), behind=True),
        png_with(PNG_XMP, chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0<tiff:Orientation>6</>")),
        png_with(chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + zlib.compress(b"<tiff:Orientation>6</>" + XMP))),
        jpeg_with(segment(0xE2, b"ICC_PROFILE\0"), segment(0xE1, exif_of(6))),
        jpeg_with(segment(0xE2, b"ICC_PROFILE\0"), segment(0xE1, exif_of(6)[:30]), segment(0xE1, exif_of(6)[30:])),
        jpeg_with(segment(0xE0, b"JFIF\0"), xmp=b"<tiff:Orientation>6</>"),
    ],
)
def test_the_orientation_is_applied_if_other_metadata_is_unreadable(data):
    """Orientation 6 means a quarter turn to the right."""
    assert_shows(data, picture(2).transpose(Image.Transpose.ROTATE_270))


def test_colours_are_unchanged_if_other_metadata_is_unreadable():
    """The marker that a JPEG holds RGB or inverted CMYK affects the pixels, so it must not be dropped."""
    broken = segment(0xE2, b"ICC_PROFILE\0")
    for image, options in ((picture(2), {"keep_rgb": True}), (picture(2).convert("CMYK"), {})):
        sound = encoded(image, quality=95, **options)
        assert (packed(sound[:2] + broken + sound[2:]) == packed(sound)).all()


def test_a_damaged_picture_is_refused_with_and_without_its_metadata():
    for data in (UNUSED["png, large XMP"][:-300], UNUSED["jpeg, empty profile"][:-300], UNUSED["png, large XMP"][:40]):
        with pytest.raises(ImageRejected, match="unreadable"):
            prepare_jpeg(data, 64)


# --- memory

# The peak is the process's own (VmHWM). ru_maxrss would begin at the value of the parent process.
MEASURED = """
import sys
from kfood_dist.data.picture.images import prepare_jpeg
peak = lambda: int(next(s for s in open("/proc/self/status") if s.startswith("VmHWM")).split()[1]) * 1024
prepare_jpeg(open(sys.argv[2], "rb").read(), 224)
before, data = peak(), open(sys.argv[1], "rb").read()
prepare_jpeg(data, int(sys.argv[3]), sys.argv[4])
print(peak() - before - len(data))
"""


def peak_bytes(tmp_path, data, size=224, policy="squash"):
    """Return the bytes of memory that preparing a picture takes, without the libraries and the file itself."""
    for name, content in (("picture", data), ("small", encoded(picture(2)))):
        (tmp_path / name).write_bytes(content)
    command = [sys.executable, "-c", MEASURED, tmp_path / "picture", tmp_path / "small", str(size), policy]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


@pytest.mark.parametrize(("width", "height"), [(12_000, 9_000), (16_320, 12_240)])
def test_pictures_of_108_and_200_megapixels_take_little_memory(tmp_path, width, height):
    """At full size the pixels would take 324 and 599 MB. Decoded at 1/8 they take 5 and 9 MB."""
    data = tall_jpeg(width, height)
    assert peak_bytes(tmp_path, data) < 60e6
    assert peak_bytes(tmp_path, data, 448, "crop") < 100e6


def test_a_progressive_jpeg_takes_the_memory_of_its_coefficients(tmp_path):
    """The coefficients take 2 bytes a sample, 1.5 samples a pixel: 324 MB, also when it is decoded small."""
    assert 250e6 < peak_bytes(tmp_path, tall_jpeg(12_000, 9_008, progressive=True)) < 450e6


@pytest.fixture
def undecoded(monkeypatch):
    for decoder in ("PIL.ImageFile.ImageFile.load", "simplejpeg.decode_jpeg"):
        monkeypatch.setattr(decoder, lambda *_, **__: pytest.fail("decoded"))


def in_two_scans(data):
    """Return a baseline JPEG whose first scan has one of its three components."""
    at = data.index(b"\xff\xda") + 4
    return data[:at] + b"\1" + data[at + 1 :]


def resized(data, width, height):
    """Return the JPEG with this size in its header."""
    at = next(data.index(marker) for marker in (b"\xff\xc0\0\x11", b"\xff\xc2\0\x11") if marker in data)
    return data[: at + 5] + struct.pack(">HH", height, width) + data[at + 9 :]


@pytest.mark.parametrize(
    ("data", "detail"),
    [
        (resized(encoded(picture(2), progressive=True), 20_000, 20_000), "in several scans, which take 1,200,000,000"),
        (resized(in_two_scans(encoded(picture(2))), 20_000, 20_000), "in several scans, which take 1,200,000,000"),
        (resized(encoded(picture(2), progressive=True, subsampling=0), 12_000, 12_000), "which take 864,000,000 bytes"),
        (resized(encoded(picture(2)), 60_000, 4_000), "more than 100,000,000 pixels"),
        (encoded(Image.new("1", (20_000, 20_000)), "TIFF", compression="group4"), "pixels"),
        (encoded(Image.new("1", (15_000, 10_000)), "TIFF", compression="group4"), "more than 100,000,000 pixels"),
    ],
)
def test_a_picture_that_takes_too_much_memory_is_refused_before_decoding(undecoded, data, detail):
    with pytest.raises(ImageRejected, match=f"too_large: .*{detail}"):
        prepare_jpeg(data, 1024)


def test_the_pixel_limit_counts_the_decoded_pixels():
    """A picture of 400×400 is decoded at 1/4 to 100×100. For a small box of it, it is decoded at full size."""
    data = encoded(picture(2, 400, 400))
    assert prepare_jpeg(data, 32, max_pixels=10_000)
    with pytest.raises(ImageRejected, match="too_large: 400×400, 10,000 when decoded at 1/4, more than 9,999 pixels"):
        prepare_jpeg(data, 32, max_pixels=9_999)
    with pytest.raises(ImageRejected, match="too_large: 400×400, more than 100,000 pixels"):
        prepare_jpeg(data, 32, max_pixels=100_000, box=(0, 0, 50, 50))
    progressive = encoded(picture(2, 400, 400), progressive=True, subsampling="4:2:0")
    assert prepare_jpeg(progressive, 32, max_pixels=60_000)
    with pytest.raises(ImageRejected, match=r"too_large: .*480,000 bytes to decode, more than 479,992"):
        prepare_jpeg(progressive, 32, max_pixels=59_999)
