"""Evaluation in TensorBoard: the accuracy, and a panel of pictures with the expected and the predicted name.

    records, pictures ──► grid of captioned cells ──► one event file, moved into the log folder by a rename

Pillow's own font has no Hangul. If fontconfig finds a font that has it, the names are written under the pictures. If
not, the cells are numbered. In both cases, the tab TEXT has a table of number, expected and predicted name. The browser
draws the letters there.

Always holds: there is one event file per split and step, and its name contains both. A new one replaces the old one.
"""

import io
import os
import subprocess
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from kfood_dist.evaluate.metrics import Prediction

NUM_PICTURES = 16
_COLUMNS = 4
_CELL_PX, _CAPTION_PX, _EDGE_PX, _FONT_PX = 200, 44, 4, 14  # a name of 12 syllables fits, a longer one is cut
_GOOD, _BAD, _INK, _PAPER = (26, 127, 55), (196, 48, 43), (20, 20, 20), (255, 255, 255)

Sample = tuple[Prediction, bytes]


def spread(count: int, total: int) -> list[int]:
    """Return `count` positions spread evenly over `total`, or all if there are fewer. Every model gets the same."""
    return [i * total // min(count, total) for i in range(min(count, total))]


def is_logged(folder: Path, split: str, step: int) -> bool:
    """Return whether `log` has written this split and step into `folder`."""
    return any(folder.glob(f"events.out.tfevents.*{_suffix(split, step)}"))


def log(folder: Path, split: str, step: int, accuracy: float, samples: Sequence[Sample]) -> None:
    """Write `SPLIT/accuracy`, the panel `SPLIT/predictions` and its table into a TensorBoard folder."""
    from torch.utils.tensorboard import SummaryWriter

    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".unfinished-") as unfinished:
        writer = SummaryWriter(unfinished, filename_suffix=_suffix(split, step))
        writer.add_scalar(f"{split}/accuracy", accuracy, step)
        writer.add_image(f"{split}/predictions", draw(samples, hangul_font()), step, dataformats="HWC")
        writer.add_text(f"{split}/predictions", caption_table(record for record, _ in samples), step)
        writer.close()
        for earlier in folder.glob(f"events.out.tfevents.*{_suffix(split, step)}"):
            earlier.unlink()
        for file in Path(unfinished).iterdir():
            os.replace(file, folder / file.name)


def _suffix(split: str, step: int) -> str:
    return f".{split}-{step:08d}"


def caption_table(records: Iterable[Prediction]) -> str:
    """Return the panel's captions as a Markdown table, numbered like the pictures: row by row from 1."""
    rows = [
        f"| {i} | {_plain(r.label)} | {_plain(r.prediction) or '(nothing)'} | {'✓' if r.correct else '✗'} |"
        for i, r in enumerate(records, start=1)
    ]
    return "\n".join(["| # | expected | predicted | |", "|---|---|---|---|", *rows])


def _plain(name: str) -> str:
    # Replaces characters with a meaning in Markdown or HTML, because a model may write anything.
    return "".join("·" if c in "|<>&`*[]\\" else c for c in name)


def draw(samples: Sequence[Sample], font_path: str | None) -> np.ndarray:
    """Return the panel, RGB uint8 (height, width, 3): rows of captioned pictures, edged green (right) or red."""
    font = ImageFont.truetype(font_path, _FONT_PX) if font_path else ImageFont.load_default(_FONT_PX)
    rows = -(-len(samples) // _COLUMNS)
    panel = Image.new("RGB", (_COLUMNS * _CELL_PX, rows * (_CELL_PX + _CAPTION_PX)), _PAPER)
    for i, (record, jpeg) in enumerate(samples):
        tone = _GOOD if record.correct else _BAD
        if font_path:
            lines = ((f"{i + 1}  {record.label}", _INK), (f"→ {record.prediction}", tone))
        else:
            lines = ((f"#{i + 1}  {'right' if record.correct else 'wrong'}", tone), ("names: see TEXT", _INK))
        caption = Image.new("RGB", (_CELL_PX, _CAPTION_PX), _PAPER)
        for number, (text, ink) in enumerate(lines):
            ImageDraw.Draw(caption).text((_EDGE_PX, 20 * number), text, fill=ink, font=font)
        left, top = i % _COLUMNS * _CELL_PX, i // _COLUMNS * (_CELL_PX + _CAPTION_PX)
        panel.paste(_picture(record, jpeg), (left, top))
        panel.paste(caption, (left, top + _CELL_PX))
    return np.asarray(panel)


def _picture(record: Prediction, jpeg: bytes) -> Image.Image:
    edged = Image.new("RGB", (_CELL_PX, _CELL_PX), _GOOD if record.correct else _BAD)
    side = _CELL_PX - 2 * _EDGE_PX
    with Image.open(io.BytesIO(jpeg), formats=("JPEG",)) as picture:
        edged.paste(picture.convert("RGB").resize((side, side)), (_EDGE_PX, _EDGE_PX))
    return edged


def hangul_font() -> str | None:
    """Return the path of the font that fontconfig has for Korean, or None."""
    command = ["fc-match", "--format=%{file}", ":lang=ko"]
    try:
        found = subprocess.run(command, capture_output=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):  # not installed, or still building its cache on a slow disk
        return None
    path = os.fsdecode(found.stdout)
    return path if has_hangul(path) else None  # fontconfig always names the nearest font


def has_hangul(path: str) -> bool:
    """Return whether a font file draws 가 and 힣 differently, and neither as its sign for a missing letter."""
    try:
        font = ImageFont.truetype(path, _FONT_PX)
    except OSError:
        return False
    drawn = {bytes(font.getmask(letter)) for letter in ("가", "힣", "\U0010fffe")}
    return len(drawn) == 3
