"""The streaming collator: a micro-batch of sample ids in, one batch of tensors out.

    ids ──► shard bytes ──► RGB ──► uint8 patches ─┐
    label ──► template ──► ids, labels ────────────┴──► pad ──► Batch

Always holds: each picture's patches and image tokens travel together; a sample that cannot fit is left out by name
(`Batch.refused`) and never stalls a rank: if nothing remains, a filler without labels is put in its place. A sample
that cannot be read any more is, while training, replaced by another that depends on its id alone (`Batch.replaced`).
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from itertools import islice
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset

from kfood_dist.data.batch.template import IGNORED, Encoded, SampleTooLong, Template
from kfood_dist.data.mix import Mixture
from kfood_dist.data.picture.images import ImageRejected, decode_rgb
from kfood_dist.data.picture.patches import encode_picture
from kfood_dist.data.plan.plan import MicroBatch
from kfood_dist.data.shards.reader import ShardSplit
from kfood_dist.data.storage.base import OutOfReachError
from kfood_dist.errors import ShardError

# So many samples in a row do not rot by chance: then the shards themselves are out of reach.
_SUBSTITUTES_TRIED = 8


class LeftOut(NamedTuple):
    """A sample that is not in its batch, by its key, and why."""

    key: str
    why: str


@dataclass(frozen=True)
class Batch:
    """One padded micro-batch of B samples and length L; everything the model needs and the meters count."""

    input_ids: torch.Tensor  # (B, L) int64
    attention_mask: torch.Tensor  # (B, L) int64
    mm_token_type_ids: torch.Tensor  # (B, L) int64, 1 at image tokens: mRoPE needs it
    labels: torch.Tensor  # (B, L) int64, IGNORED outside answers
    patches: torch.Tensor  # (total patches, p·p·3) uint8; of a model's own processor (…, 3·T·p·p) float32
    image_grid_thw: torch.Tensor  # (B, 3) int64
    ids: tuple[int, ...] = ()  # the samples asked for and in here, themselves or by a substitute
    refused: tuple[LeftOut, ...] = ()
    replaced: tuple[LeftOut, ...] = ()

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
        """The same batch in memory from which a GPU copies at once."""
        return self._each_tensor(torch.Tensor.pin_memory)

    def __reduce__(self) -> "tuple[Callable[[dict[str, Any]], Batch], tuple[dict[str, Any]]]":
        # As arrays, which pickle passes on as they lie in memory: torch would copy a tensor several times.
        return _from_arrays, ({name: v.numpy() if torch.is_tensor(v) else v for name, v in vars(self).items()},)

    def _each_tensor(self, move: Callable[[torch.Tensor], torch.Tensor]) -> "Batch":
        values: dict[str, Any] = {field.name: getattr(self, field.name) for field in fields(self)}
        values.update({name: move(value) for name, value in values.items() if torch.is_tensor(value)})
        return Batch(**values)


def _from_arrays(values: dict[str, Any]) -> Batch:
    tensors = {name: torch.from_numpy(v) for name, v in values.items() if isinstance(v, np.ndarray)}
    return Batch(**values | tensors)


class _Sample(NamedTuple):
    encoded: Encoded
    patches: np.ndarray
    grid: tuple[int, int, int]


class _Block:
    """The patches of a micro-batch, one picture after the other: each is written where it will stay.

    Pictures of a packed set are of one size; should one differ, all are joined at the end instead.
    """

    def __init__(self, num_pictures: int):
        self._num_pictures = num_pictures
        self._rows: np.ndarray | None = None  # (pictures, patches, bytes of a patch), made when the first is known
        self._parts: list[np.ndarray] = []

    def next_row(self) -> np.ndarray | None:
        """Where the next picture's patches may be written."""
        return None if self._rows is None else self._rows[len(self._parts)]

    def keep(self, patches: np.ndarray) -> None:
        """Count a picture's patches in, whether or not they were written to `next_row`."""
        if self._rows is None and self._num_pictures > 1:
            self._rows = np.empty((self._num_pictures, *patches.shape), patches.dtype)
            self._rows[0] = patches
            patches = self._rows[0]
        self._parts.append(patches)

    def joined(self) -> np.ndarray:
        """All patches, (total patches, bytes of a patch)."""
        if self._rows is not None and all(part.base is self._rows for part in self._parts):
            return self._rows[: len(self._parts)].reshape(-1, self._rows.shape[2])
        return np.concatenate(self._parts)


class StreamingCollator(Dataset[Batch]):
    """Turns a MicroBatch into a Batch; a map-style dataset whose index is the micro-batch itself.

    With `for_generation` the answers are left off and padding goes to the left, where generation wants it. `unreadable`
    says what becomes of a sample whose bytes are damaged: `stop` raises ShardError, as a measurement must; `refuse`
    leaves it out by name; `replace` puts a substitute in its place, as training wants it. What is out of reach is no
    damage: OutOfReachError is raised, or which samples are seen would depend on the weather.
    """

    def __init__(
        self,
        shards: ShardSplit | Mixture,
        template: Template,
        for_generation: bool = False,
        unreadable: Literal["stop", "refuse", "replace"] = "stop",
    ):
        self.shards = shards
        self.template = template
        self.for_generation = for_generation
        self.unreadable = unreadable
        self.pad_token_id = int(template.tokenizer.pad_token_id)

    def __getitem__(self, micro_batch: MicroBatch) -> Batch:
        used: list[int] = []
        refused: list[LeftOut] = []
        replaced: list[LeftOut] = []
        samples: list[_Sample] = []
        block = _Block(len(micro_batch.ids))
        for i, picture in zip(micro_batch.ids, self._pictures(micro_batch.ids), strict=True):
            shown = i
            if isinstance(picture, ShardError) and self.unreadable == "replace":
                replaced.append(LeftOut(self.shards.key(i), picture.what))
                shown, picture = self._substitute(i, picture)
            if isinstance(picture, ShardError):
                refused.append(LeftOut(self.shards.key(i), picture.what))
                continue
            try:
                samples.append(self._sample(shown, picture, answered=not self.for_generation, out=block.next_row()))
                block.keep(samples[-1].patches)
                used.append(i)
            except SampleTooLong:
                refused.append(LeftOut(self.shards.key(i), "answer and image alone exceed data.max_length"))
        if not samples:
            samples = [self._filler(micro_batch.filler)]
            block.keep(samples[0].patches)
        return self._pad(samples, block.joined(), ids=tuple(used), refused=tuple(refused), replaced=tuple(replaced))

    def _pictures(self, ids: Sequence[int]) -> Iterator[np.ndarray | ShardError]:
        """RGB (H, W, 3) uint8 of each sample, or what is wrong with it, unless that is to be raised.

        One at a time, so that a picture is cut into patches while it lies in the processor's cache.
        """
        for i, data in zip(ids, self.shards.read_many(ids), strict=True):
            picture = data if isinstance(data, ShardError) else self._decode(i, data)
            if isinstance(picture, OutOfReachError) or (isinstance(picture, ShardError) and self.unreadable == "stop"):
                raise picture
            yield picture

    def _decode(self, i: int, jpeg: bytes) -> np.ndarray | ShardError:
        try:
            return decode_rgb(jpeg)
        except ImageRejected as error:
            return ShardError(f"{self.shards.key(i)} does not decode ({error.detail})", "see `kfood verify`")

    def _substitute(self, i: int, fault: ShardError) -> tuple[int, np.ndarray]:
        """Another sample and its picture, a function of i and of what can be read; raises `fault` if none is found."""
        for candidate in islice(substitutes(i, len(self.shards)), _SUBSTITUTES_TRIED):
            [picture] = self._pictures([candidate])
            if not isinstance(picture, ShardError):
                return candidate, picture
        raise fault

    def _filler(self, i: int) -> _Sample:
        """What keeps a rank going whose samples are all left out: a picture without an answer, if need be a blank."""
        [picture] = self._pictures([i])
        if isinstance(picture, ShardError):
            size = self.shards.manifest.image_size
            picture = np.zeros((size, size, 3), dtype=np.uint8)
        return self._sample(i, picture, answered=False)

    def _sample(self, i: int, rgb: np.ndarray, answered: bool, out: np.ndarray | None = None) -> _Sample:
        patches, grid = encode_picture(rgb, self.template.vision, out)
        return _Sample(self.template.encode(grid, self.shards.label(i).name if answered else None), patches, grid)

    def _pad(self, samples: list[_Sample], patches: np.ndarray, **left_out: Any) -> Batch:
        encoded = [sample.encoded for sample in samples]
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
            patches=torch.from_numpy(patches),
            image_grid_thw=torch.tensor([sample.grid for sample in samples]),
            **left_out,
        )


def substitutes(i: int, num_samples: int) -> Iterator[int]:
    """Stand-ins for sample i, in the order to try them.

    The golden section leads far away at each try: what spoils one sample often spoils its neighbours too.
    """
    stride = max(1, round(num_samples * 0.618033988749895))
    for attempt in range(1, num_samples):
        yield (i + attempt * stride) % num_samples
