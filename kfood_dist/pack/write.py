"""Writes placed samples and their prepared pictures to the files of a packed folder.

samples of each split ──► cut into shards ──► tar + index each ──► the manifest's entries ──► manifest.json
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from kfood_dist.data.shards.reader import NO_LABEL
from kfood_dist.data.shards.sample import sample_key
from kfood_dist.data.shards.tars import Entry, save_index, write_tar
from kfood_dist.data.shards.verify import count_samples
from kfood_dist.data.storage.base import Storage
from kfood_dist.data.task.dish import DishClass
from kfood_dist.errors import ShardError
from kfood_dist.pack.place import Sample
from kfood_dist.pack.prepare import Prepared
from kfood_dist.system.files import file_sha256


class ShardWriter:
    """A writer of shards into one folder, which also collects their entries for the manifest.

    `pictures` holds the JPEGs of the samples, squares with a side of `image_size` pixels. A shard that an earlier
    packing of the same samples finished is kept as it is.
    """

    def __init__(self, folder: Path, pictures: Storage, classes: Sequence[DishClass], image_size: int, shard_size: int):
        self._folder = folder
        self._pictures = pictures
        self._classes = classes
        self._image_size = image_size
        self._shard_size = shard_size
        self.splits: dict[str, dict[str, Any]] = {}
        self.shards: list[dict[str, Any]] = []

    def write(self, split: str, samples: Sequence[Sample]) -> None:
        """Write all shards of one split. The numbers of the keys continue from shard to shard."""
        indexes = []
        for number, start in enumerate(range(0, len(samples), self._shard_size)):
            indexes.append(self._shard(split, number, start, samples[start : start + self._shard_size]))
        self.splits[split] = count_samples(self._classes, indexes)

    def _shard(self, split: str, number: int, start: int, samples: Sequence[Sample]) -> np.ndarray:
        name = f"{split}-{number:06d}"
        tar, index_file = self._folder / f"{name}.tar", self._folder / f"{name}.index.npy"
        if not index_file.exists():  # the index is written last: if it exists, the tar is complete
            tar.unlink(missing_ok=True)
            partial = self._folder / ".index.partial"
            partial.unlink(missing_ok=True)
            save_index(partial, write_tar(tar, self._entries(split, start, samples)))
            partial.rename(index_file)
        index = np.load(index_file, allow_pickle=False)
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
            columns = self._columns(sample)
            answers = [columns[name].encode("utf-8") for name in ("answer", "label") if name in columns]
            yield Entry(
                key=sample_key(split, number),
                pictures=self._jpegs(sample.picture),
                json=self._json(sample, columns),
                label=sample.label,
                group=sample.group,
                # No byte-level tokenizer makes more tokens than bytes. One more token ends the answer.
                tokens=max(map(len, answers)) + 1,
            )

    def _jpegs(self, picture: Prepared) -> tuple[bytes, ...]:
        ranges = [(picture.file, place.offset, place.num_bytes) for place in picture.places]
        found = []
        for data in self._pictures.read_ranges(ranges):
            if isinstance(data, ShardError):
                raise data
            found.append(data)
        return tuple(found)

    def _columns(self, sample: Sample) -> dict[str, str]:
        """Return the columns that a list gives for a sample, and its class and category if it has a class."""
        columns = dict(sample.picture.record.columns)
        if sample.label != NO_LABEL:
            dish = self._classes[sample.label]
            columns |= {"label": dish.name, "category": dish.category}
        return columns

    def _json(self, sample: Sample, columns: dict[str, str]) -> bytes:
        fields = {
            **columns,
            "sources": [record.source for record in sample.picture.record.pictures],
            "width": self._image_size,
            "height": self._image_size,
            "group": sample.group,
        }
        return json.dumps(fields, ensure_ascii=False, sort_keys=True).encode("utf-8")


def _described(path: Path) -> dict[str, Any]:
    return {"path": path.name, "bytes": path.stat().st_size, "sha256": file_sha256(path)}
