"""Drawn pictures and sources for the packing tests."""

import io
import re
from pathlib import Path

import numpy as np
from PIL import Image


def picture(seed: int = 0, width: int = 96, height: int = 72) -> Image.Image:
    """Return a smooth RGB picture, a different one for each seed."""
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def encoded(image: Image.Image, kind: str = "JPEG", **options) -> bytes:
    """Return the image as the bytes of a file of one format."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def tall_jpeg(width: int, height: int, progressive: bool = False) -> bytes:
    """Return a JPEG of any height that repeats 128 rows, so making it takes little memory. `width` is a multiple of 16.

    Each row of blocks is coded independently (restart markers), so it can be repeated.
    """
    strip = encoded(picture(1, width, 128), restart_marker_rows=1, subsampling="4:2:0", progressive=progressive)
    parts, at = [strip[:2]], 2
    while strip[at + 1] != 0xD9:
        marker, end = strip[at + 1], at + 2 + int.from_bytes(strip[at + 2 : at + 4], "big")
        segment = strip[at:end]
        if marker in (0xC0, 0xC2):
            segment = segment[:5] + height.to_bytes(2, "big") + segment[7:]
        at = end
        if marker == 0xDA:
            at = re.compile(rb"\xff[^\x00\xd0-\xd7]").search(strip, end).start()
            rows = re.split(rb"\xff[\xd0-\xd7]", strip[end:at])
            number = -(-height * len(rows) // 128)
            coded = (rows[i % len(rows)] + bytes([0xFF, 0xD0 + i % 8]) for i in range(number))
            segment += b"".join(coded)[:-2]
        parts.append(segment)
    return b"".join([*parts, strip[at:]])


def write_folder(root: Path, dishes: dict[str, int], first_seed: int = 0) -> Path:
    """Write `{"category/dish": number of pictures}` as JPEGs under `root`. All pictures are different."""
    seed = first_seed
    for folder, number in dishes.items():
        (root / folder).mkdir(parents=True)
        for i in range(number):
            (root / folder / f"Img_{i:04d}.jpg").write_bytes(encoded(picture(seed)))
            seed += 1
    return root


def folder_bytes(folder: Path) -> dict[str, bytes]:
    """Return the bytes of every file of a folder by name."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}
