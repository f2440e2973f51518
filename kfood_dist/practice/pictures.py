"""The practice pictures: ten real dishes, drawn, in the folder layout of the AI-Hub set.

    (seed, class id, number) ──► a separate random stream ──► size, format, drawing ──► Img_xxx_yyyy.jpg

Always holds: a picture depends only on those three numbers, so any number of processes draws the same bytes. The
folder gets its final name only when every picture is in it.
"""

import io
import multiprocessing
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

MAX_PER_CLASS = 10_000  # the file name has four digits for the number
DRAWN_SIDE = 448  # most pixels along the longer side while drawing; the picture is then scaled to its final size
_ORIENTATION_TAG = 0x0112
_TURNS = {3: Image.Transpose.ROTATE_180, 6: Image.Transpose.ROTATE_90, 8: Image.Transpose.ROTATE_270}
_ASPECTS = (4 / 3, 4 / 3, 4 / 3, 1.0, 1.0, 3 / 4, 3 / 4, 3 / 2, 16 / 9, 9 / 16)


@dataclass(frozen=True)
class PracticeDish:
    """A dish of the real 150: its class id there, its category and its name."""

    id: int
    category: str
    name: str


DISHES = (
    PracticeDish(17, "국", "미역국"),
    PracticeDish(33, "김치", "배추김치"),
    PracticeDish(48, "떡", "송편"),
    PracticeDish(57, "면", "짜장면"),
    PracticeDish(69, "밥", "김밥"),
    PracticeDish(82, "볶음", "떡볶이"),
    PracticeDish(103, "전", "파전"),
    PracticeDish(122, "찌개", "된장찌개"),
    PracticeDish(136, "탕", "곰탕_설렁탕"),
    PracticeDish(141, "튀김", "새우튀김"),
)


def render(seed: int, dish: PracticeDish, number: int) -> tuple[str, bytes]:
    """Return one picture of a dish: the file name and the file's bytes."""
    from kfood_dist.practice.scene import photograph

    rng = np.random.default_rng([seed, dish.id, number])
    suffix = str(rng.choice([".jpg", ".JPG", ".jpeg", ".png"], p=[0.79, 0.07, 0.07, 0.07]))
    width, height = _choose_size(rng, 640 if suffix == ".png" else 1600)
    shrink = min(1.0, DRAWN_SIDE / max(width, height))
    picture = photograph(rng, dish.id, round(width * shrink), round(height * shrink))
    picture = picture.resize((width, height), Image.Resampling.BICUBIC)
    return f"Img_{dish.id:03d}_{number:04d}{suffix}", _encode(rng, picture, suffix)


def _choose_size(rng: np.random.Generator, max_width: int) -> tuple[int, int]:
    """Return a width of 400 to `max_width` pixels, mostly small, and a height of at most 1600."""
    aspect = float(_ASPECTS[rng.integers(len(_ASPECTS))] * rng.uniform(0.94, 1.06))
    width = 400 * (max_width / 400) ** (rng.random() ** 1.5)
    width = max(400.0, min(width, 1600 * aspect))
    return int(width), int(width / aspect)


def _encode(rng: np.random.Generator, picture: Image.Image, suffix: str) -> bytes:
    """Return the file's bytes. One JPEG in twelve is stored turned, with the EXIF orientation that turns it back."""
    out = io.BytesIO()
    if suffix == ".png":
        picture.save(out, "PNG", compress_level=1)
        return out.getvalue()
    quality = int(rng.integers(68, 96))
    exif = Image.Exif()
    if rng.random() < 1 / 12:
        orientation = (3, 6, 8)[rng.integers(3)]
        picture = picture.transpose(_TURNS[orientation])
        exif[_ORIENTATION_TAG] = orientation
    picture.save(out, "JPEG", quality=quality, exif=exif)
    return out.getvalue()


def _draw_one(job: tuple[Path, int, PracticeDish, int]) -> int:
    folder, seed, dish, number = job
    name, data = render(seed, dish, number)
    (folder / dish.category / dish.category / dish.name / name).write_bytes(data)
    return len(data)


def write_pictures(folder: Path, dishes: tuple[PracticeDish, ...], per_class: int, seed: int) -> Iterator[int]:
    """Draw `per_class` pictures of each dish into `folder`, and yield the size in bytes of each written file.

    Uses at most one process for each core that this process may use, and only this process for few pictures.
    """
    jobs = [(folder, seed, dish, number) for number in range(per_class) for dish in dishes]
    for dish in dishes:
        (folder / dish.category / dish.category / dish.name).mkdir(parents=True, exist_ok=True)
    workers = min(len(os.sched_getaffinity(0)), len(jobs) // 16)
    if workers < 2:
        yield from map(_draw_one, jobs)
        return
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        yield from pool.map(_draw_one, jobs, chunksize=8)
