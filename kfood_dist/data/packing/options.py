"""What `kfood pack` can be told, and what makes two packed data sets the same."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from kfood_dist.data.images import RESIZE_POLICIES
from kfood_dist.data.labels import DishClass
from kfood_dist.data.packing.prepare import PictureSettings, available_cores
from kfood_dist.data.packing.sources import Record
from kfood_dist.data.packing.split import parse_fractions
from kfood_dist.errors import SourceError


@dataclass(frozen=True)
class PackOptions:
    """What to make of a source. All but `workers` and `max_rejected` decide about the bytes."""

    image_size: int = 224
    resize: str = "squash"
    quality: int = 90
    min_side: int = 32
    fractions: Mapping[str, float] = field(default_factory=lambda: parse_fractions("0.8,0.1,0.1"))
    seed: int = 0
    # At 224 px some 35 MB: the 150-class set gives about 60 training shards, enough for any reader to deal to
    # its ranks and workers, and a damaged file costs little.
    shard_size: int = 2000
    classes: Path | None = None
    image_root: Path | None = None
    max_rejected: float = 0.05
    workers: int = field(default_factory=available_cores)

    def picture_settings(self) -> PictureSettings:
        """The part that the workers need."""
        return PictureSettings(self.image_size, self.resize, self.quality, self.min_side)

    def check(self) -> None:
        """Raise SourceError at the first option that cannot be meant."""
        _require(
            0 < self.image_size <= 4096 and self.image_size % 2 == 0,
            f"--image-size {self.image_size}",
            "give an even number of pixels up to 4096",
        )
        _require(self.resize in RESIZE_POLICIES, f"--resize {self.resize}", f"use {', '.join(RESIZE_POLICIES)}")
        _require(1 <= self.quality <= 100, f"--quality {self.quality}", "give a JPEG quality from 1 to 100")
        _require(self.min_side >= 1, f"--min-side {self.min_side}", "give a number of pixels from 1")
        _require(0 <= self.seed < 2**63, f"--seed {self.seed}", "give a whole number from 0")
        _require(self.shard_size >= 1, f"--shard-size {self.shard_size}", "give a number of samples from 1")
        _require(0 <= self.max_rejected <= 1, f"--max-rejected {self.max_rejected}", "give a share from 0 to 1")
        _require(self.workers >= 1, f"--workers {self.workers}", "give a number of processes from 1")


def _require(sound: bool, what: str, remedy: str) -> None:
    if not sound:
        raise SourceError(f"{what} cannot be used", remedy)


def fingerprint(kind: str, records: Sequence[Record], classes: Sequence[DishClass] | None, options: PackOptions) -> str:
    """SHA-256, in hex, over every option that shapes the data set and every input's name, size and label.

    A picture that was altered without changing its size in bytes is not noticed.
    """
    settled = {
        "kind": kind,
        "picture": vars(options.picture_settings()),
        "fractions": dict(options.fractions),
        "seed": options.seed,
        "shard_size": options.shard_size,
        "classes": None if classes is None else [[c.name, c.category, list(c.aliases)] for c in classes],
        "inputs": [[r.source, r.num_bytes, r.label, r.category, r.problem] for r in records],
    }
    return hashlib.sha256(json.dumps(settled, sort_keys=True).encode("ascii")).hexdigest()
