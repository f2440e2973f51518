"""Placed samples and their spool to the files of a packed folder.

samples of each split ──► cut into shards ──► tar + index each ──► the manifest's entries ──► manifest.json
"""

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from kfood_dist.data.labels import DishClass
from kfood_dist.data.packing.place import Sample
from kfood_dist.data.tars import Entry, file_sha256, save_index, write_tar
from kfood_dist.data.verify import count_samples


class ShardWriter:
    """Writes shards into one folder and remembers what the manifest will say of them.

    `spool` is a descriptor of the file that the samples' pictures lie in, squares of `image_size` pixels.
    """

    def __init__(self, folder: Path, spool: int, classes: Sequence[DishClass], image_size: int, shard_size: int):
        self._folder = folder
        self._spool = spool
        self._classes = classes
        self._image_size = image_size
        self._shard_size = shard_size
        self.splits: dict[str, dict[str, Any]] = {}
        self.shards: list[dict[str, Any]] = []

    def write(self, split: str, samples: Sequence[Sample]) -> None:
        """Write all shards of one split; keys count through them."""
        indexes = []
        for number, start in enumerate(range(0, len(samples), self._shard_size)):
            entries = self._entries(split, start, samples[start : start + self._shard_size])
            indexes.append(self._write_shard(split, f"{split}-{number:06d}", entries))
        self.splits[split] = count_samples(self._classes, indexes)

    def _write_shard(self, split: str, name: str, entries: Iterator[Entry]) -> np.ndarray:
        tar, index_file = self._folder / f"{name}.tar", self._folder / f"{name}.index.npy"
        index = write_tar(tar, entries)
        save_index(index_file, index)
        self.shards.append(
            {
                "split": split,
                **_described(tar),
                "samples": len(index),
                "index": _described(index_file),
            }
        )
        return index

    def _entries(self, split: str, start: int, samples: Sequence[Sample]) -> Iterator[Entry]:
        for number, sample in enumerate(samples, start=start):
            dish = self._classes[sample.label]
            yield Entry(
                key=f"{split}-{number:08d}",
                jpeg=os.pread(self._spool, sample.picture.num_bytes, sample.picture.offset),
                json=self._metadata(sample, dish),
                label=sample.label,
                group=sample.group,
                width=self._image_size,
                height=self._image_size,
                # No byte-level tokenizer makes more tokens than bytes; one more ends the answer.
                tokens=len(dish.name.encode("utf-8")) + 1,
            )

    def _metadata(self, sample: Sample, dish: DishClass) -> bytes:
        fields = {
            "label": dish.name,
            "category": dish.category,
            "source": sample.picture.record.source,
            "width": self._image_size,
            "height": self._image_size,
            "group": sample.group,
        }
        return json.dumps(fields, ensure_ascii=False, sort_keys=True).encode("utf-8")


def _described(path: Path) -> dict[str, Any]:
    return {"path": path.name, "bytes": path.stat().st_size, "sha256": file_sha256(path)}
