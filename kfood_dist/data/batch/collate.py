"""The streaming collator: turn a micro-batch of sample ids into one batch of tensors.

    ids ──► sample ──► pictures ──► RGB ──► the model's pixels ─┐
                  └──► columns ──► task ──► template ──► ids, labels ──► pad ──► Batch

Always holds: each picture's pixels and image tokens stay together. A sample that cannot fit is skipped, and
`Batch.refused` names it. It never stalls a rank: if no sample remains, a filler without labels takes its place. In
training, a sample that can no longer be read is replaced by another, which depends only on its id (`Batch.replaced`).
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
import torch
from torch.utils.data import Dataset

from kfood_dist.data.batch.lengths import cut_by_length
from kfood_dist.data.batch.pixel_block import PixelBlock
from kfood_dist.data.batch.template import IGNORED, Encoded, SampleRefused, Template
from kfood_dist.data.picture.images import ImageRejected, decode_rgb
from kfood_dist.data.plan.plan import MicroBatch
from kfood_dist.data.shards.sample import Sample
from kfood_dist.data.storage.base import UnreachableError
from kfood_dist.data.task.base import Task
from kfood_dist.errors import ShardError

# If this many substitutes in a row cannot be read, that is not chance: the shards themselves cannot be read.
_SUBSTITUTES_TRIED = 8


class SkippedSample(NamedTuple):
    """The key of a sample that is not in its batch, and the reason."""

    key: str
    why: str


@dataclass(frozen=True)
class Batch:
    """One padded micro-batch of B samples and length L, with everything that the model needs and the meters count."""

    input_ids: torch.Tensor  # (B, L) int64
    attention_mask: torch.Tensor  # (B, L) int64
    is_image: torch.Tensor  # (B, L) int64, 1 at image tokens
    labels: torch.Tensor  # (B, L) int64, IGNORED outside answers
    pixels: torch.Tensor  # of all pictures, in the format of the model's `Pictures`
    facts: dict[str, torch.Tensor]  # what goes with the pixels to the device, such as grids
    shapes: dict[str, Any]  # what stays on the host, which needs its values: numbers, and tensors of lengths
    predicting: torch.Tensor  # (N,) int64, the places in (B · L) whose hidden states predict a label token
    targets: torch.Tensor  # (N,) int64, these label tokens
    target_rows: torch.Tensor  # (N,) int64, their rows
    ids: tuple[int, ...] = ()  # the requested samples that are in here, or whose substitute is
    columns: tuple[dict[str, Any], ...] = ()  # of these samples, if the batch is for generation
    refused: tuple[SkippedSample, ...] = ()
    replaced: tuple[SkippedSample, ...] = ()

    def without_labels(self) -> "Batch":
        """Return the same rows without labels and without samples: a filler, whose loss and gradients are zero."""
        nothing = torch.zeros(0, dtype=torch.int64)
        labels = torch.full_like(self.labels, IGNORED)
        none: dict[str, Any] = {"predicting": nothing, "targets": nothing, "target_rows": nothing}
        return replace(self, labels=labels, **none, ids=(), columns=(), refused=(), replaced=())

    @property
    def num_label_tokens(self) -> int:
        return int((self.labels != IGNORED).sum())

    @property
    def num_tokens(self) -> int:
        return int(self.attention_mask.sum())

    def to(self, device: torch.device) -> "Batch":
        """Return the same batch on `device`, except `shapes`."""
        return self._each_tensor(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> "Batch":
        """Return the same batch in pinned memory, from which a GPU copies directly."""
        return self._each_tensor(torch.Tensor.pin_memory)

    def __reduce__(self) -> "tuple[Callable[[dict[str, Any]], Batch], tuple[dict[str, Any]]]":
        # As arrays, because pickle passes on their memory without a copy. torch would copy a tensor several times.
        return _from_arrays, (_mapped(vars(self), torch.Tensor, torch.Tensor.numpy),)

    def _each_tensor(self, move: Callable[[torch.Tensor], torch.Tensor]) -> "Batch":
        return Batch(**_mapped(vars(self), torch.Tensor, move) | {"shapes": self.shapes})


def _from_arrays(values: dict[str, Any]) -> Batch:
    return Batch(**_mapped(values, np.ndarray, torch.from_numpy))


def _mapped(values: dict[str, Any], kind: type, change: Callable[[Any], Any]) -> dict[str, Any]:
    """Return the values with all of one kind changed, also inside dictionaries."""

    def mapped(value: Any) -> Any:
        if isinstance(value, dict):
            return _mapped(value, kind, change)
        return change(value) if isinstance(value, kind) else value

    return {name: mapped(value) for name, value in values.items()}


class Readable(Protocol):
    """The source of samples: a split, a mixture, or single pictures."""

    def __len__(self) -> int: ...
    def key(self, i: int) -> str: ...
    def read_many(self, ids: Sequence[int]) -> list[Sample | ShardError]: ...


class StreamingCollator(Dataset[Batch]):
    """A map-style dataset whose index is a MicroBatch: it turns micro-batches of sample ids into batches.

    `for_generation` omits the answers and pads on the left, so that generation can begin at the end of every row.
    A sample that cannot be read raises ShardError. `unreadable` "refuse" skips such a sample instead, and "replace"
    replaces it, as training needs. A shard that is out of reach is not damaged, so it always raises UnreachableError.
    Otherwise the state of the storage would decide which samples are seen.
    """

    def __init__(
        self,
        shards: Readable,
        template: Template,
        task: Task,
        for_generation: bool = False,
        unreadable: Literal["stop", "refuse", "replace"] = "stop",
    ):
        self.shards: Any = shards
        self.template = template
        self.task = task
        self.for_generation = for_generation
        self.unreadable = unreadable
        self.pad_token_id = int(template.tokenizer.pad_token_id)

    def __getitem__(self, micro_batch: MicroBatch) -> Batch:
        block = PixelBlock(len(micro_batch.ids))
        rows, refused, replaced = self._rows(micro_batch, block)
        return self._batch(rows, block.joined(), refused, replaced)

    def cut(self, samples: MicroBatch, num_tokens: int) -> list[Batch]:
        """Return the samples in batches of similar lengths, each with at most `num_tokens` places, padding included.

        A longer sample is a batch of its own. The first batch has the refused and replaced samples of all.
        """
        rows, refused, replaced = self._rows(samples, None)
        rows.sort(key=lambda row: len(row.encoded))
        batches = []
        for start, stop in cut_by_length([len(row.encoded) for row in rows], num_tokens):
            group = rows[start:stop]
            block = PixelBlock(len(group))
            for row in group:
                for pixels in row.pixels:
                    block.keep(pixels)
            batches.append(self._batch(group, block.joined(), refused, replaced))
            refused, replaced = [], []
        return batches

    def _rows(
        self, micro_batch: MicroBatch, block: "PixelBlock | None"
    ) -> "tuple[list[_Row], list[SkippedSample], list[SkippedSample]]":
        """Return the encoded rows, or a filler if none remains, and the refused and the replaced samples."""
        refused: list[SkippedSample] = []
        replaced: list[SkippedSample] = []
        rows: list[_Row] = []
        for i, sample in zip(micro_batch.ids, self._samples(micro_batch.ids), strict=True):
            try:
                if isinstance(sample, ShardError) and self.unreadable == "replace":
                    replaced.append(SkippedSample(self.shards.key(i), sample.what))
                    sample = self._substitute(i, sample)
                if isinstance(sample, ShardError):
                    refused.append(SkippedSample(self.shards.key(i), sample.what))
                    continue
                rows.append(self._row(i, sample, not self.for_generation, block))
            except SampleRefused as error:
                refused.append(SkippedSample(self.shards.key(i), str(error)))
        return rows or [self._filler(micro_batch.filler, block)], refused, replaced

    def _batch(
        self,
        rows: "Sequence[_Row]",
        pixels: np.ndarray,
        refused: Sequence[SkippedSample],
        replaced: Sequence[SkippedSample],
    ) -> Batch:
        used = [row for row in rows if row.id is not None]
        return self._pad(
            rows,
            pixels,
            ids=tuple(row.id for row in used),
            columns=tuple(row.columns for row in used) if self.for_generation else (),
            refused=tuple(refused),
            replaced=tuple(replaced),
        )

    def _samples(self, ids: Sequence[int]) -> Iterator["_Decoded | ShardError"]:
        """Yield each sample with its pictures decoded, or the error of a damaged sample.

        Raises the error instead if a shard is out of reach, or if `unreadable` is "stop". Decodes one sample at a
        time, so that a picture is encoded while it is in the processor's cache.
        """
        for i, read in zip(ids, self.shards.read_many(ids), strict=True):
            sample = read if isinstance(read, ShardError) else self._decode(i, read)
            if isinstance(sample, UnreachableError) or (isinstance(sample, ShardError) and self.unreadable == "stop"):
                raise sample
            yield sample

    def _decode(self, i: int, sample: Sample) -> "_Decoded | ShardError":
        try:
            return _Decoded(sample.columns, [decode_rgb(jpeg) for jpeg in sample.pictures])
        except ImageRejected as error:
            return ShardError(f"{self.shards.key(i)} does not decode ({error.detail})", "run `kfood verify`")

    def _substitute(self, i: int, fault: ShardError) -> "_Decoded":
        """Return another sample, chosen by i and by which samples can be read. Raises `fault` if none is found."""
        for candidate in islice(substitutes(i, len(self.shards)), _SUBSTITUTES_TRIED):
            [sample] = self._samples([candidate])
            if not isinstance(sample, ShardError):
                return sample
        raise fault

    def _filler(self, i: int, block: "PixelBlock | None") -> "_Row":
        """Return a row without an answer for a rank whose samples are all skipped, so that the rank does not stall.

        It is sample i, or a blank picture if that cannot be used.
        """
        [sample] = self._samples([i])
        size = self.shards.manifest.image_size
        blank = _Decoded(dict(self.task.example), [np.zeros((size, size, 3), dtype=np.uint8)])
        try:
            return self._row(None, blank if isinstance(sample, ShardError) else sample, False, block)
        except SampleRefused:
            return self._row(None, blank, False, block)

    def _row(self, i: int | None, sample: "_Decoded", answered: bool, block: "PixelBlock | None") -> "_Row":
        """Encode sample i, or a filler (None), and put its pixels into the block, if one is given.

        If it raises SampleRefused, it puts none there.
        """
        free = block.free_row if block else lambda _: None
        pictures = [self.template.pictures.encode(rgb, free(number)) for number, rgb in enumerate(sample.pictures)]
        messages = self.task.messages(sample.columns, len(pictures))
        answer = self.task.answer(sample.columns) if answered else None
        encoded = self.template.encode(messages, [picture.ids for picture in pictures], answer)
        if block:
            for picture in pictures:
                block.keep(picture.pixels)
        return _Row(i, sample.columns, encoded, [p.facts for p in pictures], [p.pixels for p in pictures])

    def _pad(self, rows: "Sequence[_Row]", pixels: np.ndarray, **left_out: Any) -> Batch:
        encoded = [row.encoded for row in rows]
        facts = [facts for row in rows for facts in row.facts]
        length = max(map(len, encoded))

        def padded(values: Iterable[np.ndarray], value: int) -> np.ndarray:
            out = np.full((len(rows), length), value, dtype=np.int64)
            for line, row in zip(out, values, strict=True):
                line[slice(-len(row), None) if self.for_generation else slice(len(row))] = row
            return out

        joined = {name: np.concatenate([f[name] for f in facts]) for name in facts[0]}
        is_image = padded((e.is_image for e in encoded), 0)
        shapes: dict[str, Any] = {}
        if not self.for_generation:  # generate() computes its own positions, for one more token at each pass
            joined, shapes = self.template.pictures.arrange(joined, is_image, [len(e) for e in encoded])
        labels = padded((e.labels for e in encoded), IGNORED)
        arrays = {
            "input_ids": padded((e.ids for e in encoded), self.pad_token_id),
            "attention_mask": padded((np.ones(len(e)) for e in encoded), 0),
            "is_image": is_image,
            "labels": labels,
            "pixels": pixels,
            "facts": joined,
            "shapes": shapes,
            **targets_of(labels),
        }
        return Batch(**_mapped(arrays, np.ndarray, torch.from_numpy), **left_out)


def targets_of(labels: np.ndarray) -> dict[str, np.ndarray]:
    """Return where labels (B, L) are and what they are: `predicting`, `targets` and `target_rows` of a Batch."""
    rows, before = np.nonzero(labels[:, 1:] != IGNORED)  # position i predicts token i + 1
    return {
        "predicting": rows * labels.shape[1] + before,
        "targets": labels[rows, before + 1],
        "target_rows": rows,
    }


class _Decoded(NamedTuple):
    columns: dict[str, Any]
    pictures: list[np.ndarray]  # RGB (H, W, 3) uint8


class _Row(NamedTuple):
    id: int | None  # None: a filler
    columns: dict[str, Any]
    encoded: Encoded
    facts: list[dict[str, np.ndarray]]  # of each picture
    pixels: list[np.ndarray]  # of each picture


@dataclass(frozen=True)
class StepPart:
    """All micro-batches of one rank in one step."""

    batches: tuple[Batch, ...]

    def pin_memory(self) -> "StepPart":
        """Return the same micro-batches in pinned memory."""
        return StepPart(tuple(batch.pin_memory() for batch in self.batches))


class TokenCollator(Dataset[StepPart]):
    """A collator whose index has all samples of a rank in a step. It fills micro-batches by tokens.

    `num_tokens` is the most places of a micro-batch, padding included.
    """

    def __init__(self, collator: StreamingCollator, num_tokens: int):
        self.collator = collator
        self.num_tokens = num_tokens

    def __getitem__(self, samples: MicroBatch) -> StepPart:
        return StepPart(tuple(self.collator.cut(samples, self.num_tokens)))


def substitutes(i: int, num_samples: int) -> Iterator[int]:
    """Yield substitutes for sample i, in the order to try them.

    Each try jumps far away, by the golden ratio (0.618) of the samples, because damage to one sample often affects its
    neighbours too.
    """
    stride = max(1, round(num_samples * 0.618033988749895))
    for attempt in range(1, num_samples):
        yield (i + attempt * stride) % num_samples
