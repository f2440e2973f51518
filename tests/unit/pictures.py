"""Drawn pictures and sources for the packing tests."""

import io
from pathlib import Path

import numpy as np
from PIL import Image


def picture(seed: int = 0, width: int = 96, height: int = 72) -> Image.Image:
    """A smooth RGB picture, another for each seed."""
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def encoded(image: Image.Image, kind: str = "JPEG", **options) -> bytes:
    """The image as a file of one kind."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def write_folder(root: Path, dishes: dict[str, int], first_seed: int = 0) -> Path:
    """Write `{"category/dish": number of pictures}` as JPEGs under `root`, no two of them alike."""
    seed = first_seed
    for folder, number in dishes.items():
        (root / folder).mkdir(parents=True)
        for i in range(number):
            (root / folder / f"Img_{i:04d}.jpg").write_bytes(encoded(picture(seed)))
            seed += 1
    return root


def folder_bytes(folder: Path) -> dict[str, bytes]:
    """Every file of a folder by name."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}
