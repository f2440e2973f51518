"""`kfood mini DIR`: a practice set and a tiny model, to try every other verb within minutes and without real data.

    options ──► DIR/.mini-unfinished.json ──► images ──► model ──► DIR/mini.json

Always holds: `images` and `model` get their names only when they are complete, and `mini.json` is written last. So the
next run with the same options finishes an interrupted one, and uses a finished folder again as it is.
"""

import argparse
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tqdm import tqdm

from kfood_dist.errors import KfoodError, SourceError
from kfood_dist.practice.pictures import DISHES, MAX_PER_CLASS, write_pictures
from kfood_dist.system.processes import quiet_libraries

FORMAT, VERSION = "kfood-mini", 1  # raise the version when the same options give other bytes
DONE, UNFINISHED = "mini.json", ".mini-unfinished.json"
_PARTS = ("images", "model")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `kfood mini`."""
    parser.description = (
        "Draw a practice set of Korean dishes in the folder layout of the AI-Hub set (DIR/images) and write a tiny, "
        "untrained Qwen2.5-VL (DIR/model). With them you can try every other verb in minutes, without real pictures "
        "or a download."
    )
    parser.add_argument(
        "folder", metavar="DIR", type=Path, help="folder to write; made if missing, used again if complete"
    )
    parser.add_argument(
        "--per-class", type=int, default=100, metavar="N", help="pictures of each of the ten dishes (default: 100)"
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="another number gives other pictures and other weights (default: 0)"
    )


def run(args: argparse.Namespace) -> int:
    """Write, finish or reuse the practice set.

    Raises SourceError if DIR holds something else, KfoodError if it cannot be written.
    """
    wanted = describe(args.per_class, args.seed)
    try:
        return _run(args.folder, wanted)
    except OSError as error:
        raise KfoodError(
            f"the practice set cannot be written to {args.folder} ({error.strerror or error})",
            "name a folder of your own as DIR, on a disk with room",
        ) from None


def _run(folder: Path, wanted: dict[str, Any]) -> int:
    if _check(folder, wanted):
        print(f"reused {folder}: {wanted['images']} pictures and the tiny model are there already")
        return 0
    folder.mkdir(parents=True, exist_ok=True)
    _write_json(folder / UNFINISHED, wanted)
    _finish(folder, "images", lambda part: _draw(part, wanted["per_class"], wanted["seed"]))
    _finish(folder, "model", lambda part: _model(part, wanted["seed"]))
    os.replace(folder / UNFINISHED, folder / DONE)
    print(
        f"wrote {folder}: {wanted['images']} pictures of {len(DISHES)} dishes in images/, a tiny Qwen2.5-VL in model/"
    )
    return 0


def describe(per_class: int, seed: int) -> dict[str, Any]:
    """Return the contents of a practice set with these options, as mini.json records them.

    Raises SourceError if an option is out of range.
    """
    if not 1 <= per_class <= MAX_PER_CLASS:
        raise SourceError(f"--per-class {per_class} is not between 1 and {MAX_PER_CLASS}", "omit it to draw 100")
    if not 0 <= seed < 2**63:
        raise SourceError(f"--seed {seed} cannot be used", "give a whole number from 0, below 2^63")
    return {
        "format": FORMAT,
        "version": VERSION,
        "seed": seed,
        "per_class": per_class,
        "images": per_class * len(DISHES),
        "dishes": [f"{dish.id:03d} {dish.category} {dish.name}" for dish in DISHES],
    }


def _check(folder: Path, wanted: dict[str, Any]) -> bool:
    """Return whether `folder` already holds the complete set `wanted`.

    Raises SourceError if it holds anything other than this set or an unfinished part of it.
    """
    if folder.exists() and not folder.is_dir():
        raise SourceError(f"{folder} is a file", "name a folder to write the practice set into")
    if not folder.exists() or not any(folder.iterdir()):
        return False
    found = _read_json(folder / DONE) or _read_json(folder / UNFINISHED)
    if found is None:
        raise SourceError(f"{folder} holds something other than a practice set", "name a new or empty folder")
    if found != wanted:
        drawn_with = f"--per-class {found.get('per_class')} --seed {found.get('seed')}, version {found.get('version')}"
        raise SourceError(
            f"{folder} holds another practice set ({drawn_with})",
            "name a new folder, repeat those options, or delete this folder",
        )
    if not (folder / DONE).exists():
        return False
    num_pictures = sum(1 for _ in (folder / "images").glob("*/*/*/Img_*"))
    if num_pictures != wanted["images"] or not all((folder / part).is_dir() for part in _PARTS):
        raise SourceError(
            f"{folder} is a finished practice set, but has parts missing now", "delete this folder and repeat"
        )
    return True


def _finish(folder: Path, part: str, write: Callable[[Path], None]) -> None:
    """Write DIR/part with `write`, under another name until it is complete. Leaves nothing behind if that fails."""
    if (folder / part).exists():
        return
    unfinished = folder / f".{part}-unfinished"
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        write(unfinished)
        os.replace(unfinished, folder / part)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _draw(folder: Path, per_class: int, seed: int) -> None:
    total = per_class * len(DISHES)
    for _ in tqdm(write_pictures(folder, DISHES, per_class, seed), "drawing", total, unit=" pictures", disable=None):
        pass


def _model(folder: Path, seed: int) -> None:
    from kfood_dist.practice.tiny_model import write_model

    quiet_libraries()
    write_model(folder, seed)


def _read_json(path: Path) -> dict[str, Any] | None:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
