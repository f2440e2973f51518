"""The options of `kfood pack`, and the fingerprint that two equal data sets share."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from kfood_dist.data.encoding import require_encoding
from kfood_dist.data.picture.images import RESIZE_POLICIES
from kfood_dist.data.task.dish import DishClass
from kfood_dist.errors import SourceError
from kfood_dist.pack.prepare import PictureSettings
from kfood_dist.pack.sources import Record
from kfood_dist.pack.split import parse_fractions
from kfood_dist.system.processes import available_cores

USUAL_FRACTIONS = parse_fractions("0.8,0.1,0.1")


@dataclass(frozen=True)
class PackOptions:
    """The options of one packing job. All but `workers`, `part`, `parts` and `max_rejected` determine the bytes."""

    image_size: int = 224
    resize: str = "squash"
    quality: int = 90
    min_side: int = 32
    # None: the publisher's split if the source has one, else USUAL_FRACTIONS.
    fractions: Mapping[str, float] | None = None
    seed: int = 0
    # About 35 MB at 224 px. The 150-class set gives about 60 training shards: enough for any reader to distribute to
    # its ranks and workers. One damaged file costs little.
    shard_size: int = 2000
    classes: Path | None = None
    image_root: Path | None = None
    encoding: str | None = None  # of a CSV
    max_rejected: float = 0.05
    workers: int = field(default_factory=available_cores)
    crop_boxes: bool = False
    per_class: int | None = None
    subset: int = 1
    part: int = 1
    parts: int = 1

    def picture_settings(self) -> PictureSettings:
        """Return the options that the workers need."""
        return PictureSettings(self.image_size, self.resize, self.quality, self.min_side, self.crop_boxes)

    def shares(self) -> Mapping[str, float]:
        """Return the shares of train, val and test by which samples are assigned."""
        return USUAL_FRACTIONS if self.fractions is None else self.fractions

    def check(self) -> None:
        """Raise SourceError at the first option with an impossible value."""
        _require(
            0 < self.image_size <= 4096 and self.image_size % 2 == 0,
            f"--image-size {self.image_size}",
            "give an even number of pixels up to 4096",
        )
        _require(self.resize in RESIZE_POLICIES, f"--resize {self.resize}", f"use {', '.join(RESIZE_POLICIES)}")
        _require(1 <= self.quality <= 100, f"--quality {self.quality}", "give a JPEG quality from 1 to 100")
        _require(self.min_side >= 1, f"--min-side {self.min_side}", "give a number of pixels from 1")
        _require(0 <= self.seed < 2**63, f"--seed {self.seed}", "give a whole number from 0, below 2^63")
        _require(self.shard_size >= 1, f"--shard-size {self.shard_size}", "give a number of samples from 1")
        _require(0 <= self.max_rejected <= 1, f"--max-rejected {self.max_rejected}", "give a share from 0 to 1")
        _require(self.per_class is None or self.per_class >= 1, f"--per-class {self.per_class}", "give a number from 1")
        _require(self.subset >= 1, f"--subset {self.subset}", "give a number from 1")
        _require(
            self.subset == 1 or self.per_class is not None,
            f"--subset {self.subset} without --per-class",
            "say how many pictures of each class a subset has, such as --per-class 20",
        )
        _require(1 <= self.part <= self.parts, f"--part {self.part}/{self.parts}", _PART)
        if self.encoding is not None:
            require_encoding(self.encoding)
        _require(self.workers >= 1, f"--workers {self.workers}", "give a number of processes from 1")


_PART = "write it as K/N, K from 1 to N, such as 3/8"


def _require(sound: bool, what: str, remedy: str) -> None:
    if not sound:
        raise SourceError(f"{what} cannot be used", remedy)


def parse_part(text: str) -> tuple[int, int]:
    """Read `3/8` as (3, 8). Raises SourceError for anything else."""
    part, _, parts = text.partition("/")
    _require(part.isdecimal() and parts.isdecimal(), f"--part {text}", _PART)
    return int(part), int(parts)


def fingerprint(kind: str, records: Sequence[Record], classes: Sequence[DishClass] | None, options: PackOptions) -> str:
    """Return a SHA-256, in hex, over every option that affects the data set and every input's name, size and label.

    A picture that was changed without a change of its size in bytes is not noticed, unless it is in a zip.
    """
    settled = {
        "kind": kind,
        "picture": vars(options.picture_settings()),
        "fractions": dict(options.shares()),
        "seed": options.seed,
        "shard_size": options.shard_size,
        "chosen": [options.per_class, options.subset],
        "classes": None if classes is None else [[c.name, c.category, list(c.aliases)] for c in classes],
        "inputs": [
            [record.columns]
            + [
                [r.source, r.num_bytes, r.crc32, r.label, r.category, r.problem, r.box if options.crop_boxes else None]
                for r in record.pictures
            ]
            for record in records
        ],
    }
    if any(r.split for r in records if r.problem is None):
        settled["publisher_split"] = [r.split for r in records]
    return hashlib.sha256(json.dumps(settled, sort_keys=True).encode("ascii")).hexdigest()
