"""The streaming collator: a micro-batch of sample ids in, one batch of tensors out.

    ids ──► shard bytes ──► RGB ──► uint8 patches ─┐
    label ──► template ──► ids, labels ────────────┴──► pad ──► Batch

Always holds: each picture's patches and image tokens travel together; a sample that cannot fit is left out by name
(`Batch.refused`) and never stalls a rank: if nothing remains, a filler without labels is put in its place.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from kfood_dist.data.images import decode_rgb
from kfood_dist.data.patches import patchify
from kfood_dist.data.plan import MicroBatch
from kfood_dist.data.shards import ShardSplit
from kfood_dist.data.template import IGNORED, Encoded, SampleTooLong, Template
from kfood_dist.errors import KfoodError


@dataclass(frozen=True)
class Batch:
    """One padded micro-batch of B samples and length L; everything the model needs and the meters count."""

    input_ids: torch.Tensor  # (B, L) int64
    attention_mask: torch.Tensor  # (B, L) int64
    mm_token_type_ids: torch.Tensor  # (B, L) int64, 1 at image tokens: mRoPE needs it
    labels: torch.Tensor  # (B, L) int64, IGNORED outside answers
    patches: torch.Tensor  # (total patches, 3·p·p) uint8
    image_grid_thw: torch.Tensor  # (B, 3) int64
    ids: tuple[int, ...] = ()
    refused: tuple[str, ...] = ()

    @property
    def num_label_tokens(self) -> int:
        return int((self.labels != IGNORED).sum())

    @property
    def num_tokens(self) -> int:
        return int(self.attention_mask.sum())

    def to(self, device: torch.device) -> "Batch":
        """The same batch on `device`."""
        return self._each_tensor(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> "Batch":
        """Called by DataLoader for its pinning thread."""
        return self._each_tensor(torch.Tensor.pin_memory)

    def _each_tensor(self, move: Callable[[torch.Tensor], torch.Tensor]) -> "Batch":
        values: dict[str, Any] = {field.name: getattr(self, field.name) for field in fields(self)}
        values.update({name: move(value) for name, value in values.items() if torch.is_tensor(value)})
        return Batch(**values)


class StreamingCollator(Dataset[Batch]):
    """Turns a MicroBatch into a Batch; a map-style dataset whose index is the micro-batch itself.

    With `for_generation` the answers are left off and padding goes to the left, where generation wants it.
    """

    def __init__(self, shards: ShardSplit, template: Template, for_generation: bool = False):
        self.shards = shards
        self.template = template
        self.for_generation = for_generation
        self.pad_token_id = int(template.tokenizer.pad_token_id)

    def __getitem__(self, micro_batch: MicroBatch) -> Batch:
        used, refused, samples = [], [], []
        for i in micro_batch.ids:
            try:
                samples.append(self._sample(i, answered=not self.for_generation))
                used.append(i)
            except SampleTooLong:
                refused.append(self.shards.key(i))
        if not samples:
            samples = [self._sample(micro_batch.filler, answered=False)]
        return self._pad(samples, tuple(used), tuple(refused))

    def _sample(self, i: int, answered: bool) -> tuple[Encoded, np.ndarray, tuple[int, int, int]]:
        patches, grid = patchify(decode_rgb(self.shards.read(i)), self.template.vision)
        return self.template.encode(grid, self.shards.label(i).name if answered else None), patches, grid

    def _pad(self, samples: list, used: tuple[int, ...], refused: tuple[str, ...]) -> Batch:
        encoded = [sample[0] for sample in samples]
        length = max(map(len, encoded))

        def padded(rows: Iterable[np.ndarray], value: int) -> torch.Tensor:
            out = np.full((len(samples), length), value, dtype=np.int64)
            for line, row in zip(out, rows, strict=True):
                line[slice(-len(row), None) if self.for_generation else slice(len(row))] = row
            return torch.from_numpy(out)

        return Batch(
            input_ids=padded((e.ids for e in encoded), self.pad_token_id),
            attention_mask=padded((np.ones(len(e)) for e in encoded), 0),
            mm_token_type_ids=padded((e.is_image for e in encoded), 0),
            labels=padded((e.labels for e in encoded), IGNORED),
            patches=torch.from_numpy(np.concatenate([sample[1] for sample in samples])),
            image_grid_thw=torch.tensor([sample[2] for sample in samples]),
            ids=used,
            refused=refused,
        )


def stream(
    collator: StreamingCollator,
    micro_batches: Iterator[MicroBatch],
    num_workers: int,
    pin_memory: bool = False,
    ahead: int = 2,
) -> Iterator[Batch]:
    """The batches of `micro_batches`, in order, collated by `num_workers` processes (0: in this one).

    At least `ahead` of them are under way at any time, so that a step that takes several at once need not wait.
    DataLoader keeps the order of its sampler whatever the number of workers, and ends its workers with the parent.
    """
    loader: DataLoader[Batch | KfoodError] = DataLoader(
        _FaultsAsValues(collator),
        batch_size=None,
        sampler=micro_batches,
        num_workers=num_workers,
        collate_fn=_as_it_is,
        pin_memory=pin_memory,
        prefetch_factor=max(2, -(-ahead // num_workers)) if num_workers else None,
    )
    for batch in loader:
        if isinstance(batch, KfoodError):
            raise batch
        yield batch


class _FaultsAsValues(Dataset["Batch | KfoodError"]):
    """Hands a user's mistake over as a value: raised in a loader process, it would arrive as a RuntimeError."""

    def __init__(self, collator: StreamingCollator):
        self.collator = collator

    def __getitem__(self, micro_batch: MicroBatch) -> Batch | KfoodError:
        try:
            return self.collator[micro_batch]
        except KfoodError as error:
            return error


def _as_it_is(batch: Any) -> Any:
    return batch
