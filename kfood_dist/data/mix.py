"""One or several packed folders with one range of sample ids: first the ids of the first folder, then of the next one.

    recipe's data section ──► open_mixture ──► Mixture: read like a ShardSplit ──► build_data_order ──► Order of draws

Classes with the same name are one class, whatever their number in each folder. All folders must have pictures of one
size, resized in one way, because the prompt and the picture are the same in training, evaluation and prediction.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property

import numpy as np

from kfood_dist.config.sections import Data
from kfood_dist.data.plan.plan import MicroBatch, Plan
from kfood_dist.data.plan.sampling import Order, build_order
from kfood_dist.data.shards.manifest import Manifest
from kfood_dist.data.shards.reader import ShardSplit, open_split
from kfood_dist.data.shards.sample import Sample
from kfood_dist.data.task.dish import DishClass
from kfood_dist.errors import RecipeError, ShardError


def open_mixture(data: Data, split: str) -> "Mixture":
    """Open one split of `data.shards` and of every folder in `data.mix`.

    Raises ShardError as `open_split` does, if the folders' pictures differ in size or resizing, or if two folders have
    the same samples.
    """
    parts = [open_split(where, split) for where in (data.shards, *(source.shards for source in data.mix))]
    _require_compatible(parts)
    return Mixture(parts, [1.0, *(source.weight for source in data.mix)])


def build_data_order(mixture: "Mixture", data: Data) -> Order:
    """Return the order in which a recipe draws samples from its folders.

    Raises RecipeError if classes are to be balanced and a folder has none.
    """
    if data.class_balance and not all(part.classes for part in mixture.parts):
        raise RecipeError("data.class_balance is set, and the samples have no classes", "leave it out")
    return build_order(
        [len(part) for part in mixture.parts],
        mixture.weights,
        mixture.labels() if data.class_balance else None,
        data.class_balance,
        data.shuffle_window,
        mixture.index_hash,
    )


def read_ahead(
    micro_batches: Iterator[MicroBatch], plan: Plan, start: int, stop: int, will_need: Callable[[np.ndarray], None]
) -> Iterator[MicroBatch]:
    """Yield the micro-batches of the steps `start` to `stop` - 1, and have the windows ahead of them read in long runs.

    The kernel reads them into its page cache, which all processes of a node share, so one rank of each node asks. If
    an epoch is a single window, asks for nothing.
    """
    coarse = plan.windows_to_prefetch(start, stop)
    step, ids = next(coarse, (stop, np.empty(0, np.int64)))
    for micro_batch in micro_batches:
        while step <= micro_batch.step:
            will_need(ids)
            step, ids = next(coarse, (stop, ids))
        yield micro_batch


class Mixture:
    """Random access to the samples of several ShardSplits. See ShardSplit for what each method does and raises."""

    def __init__(self, parts: Sequence[ShardSplit], weights: Sequence[float]):
        self.parts = list(parts)
        self.weights = list(weights)
        self.split = parts[0].split
        self.manifest = parts[0].manifest
        self.index_hash = "+".join(part.index_hash for part in parts)
        self._before = _prefixes([part.manifest for part in parts])
        self._first = np.cumsum([0, *(len(part) for part in parts)])

    def __len__(self) -> int:
        return int(self._first[-1])

    @cached_property
    def classes(self) -> tuple[DishClass, ...]:
        """The classes of all folders. If several folders have a class, the first folder's entry counts."""
        by_name: dict[str, DishClass] = {}
        for part in self.parts:
            for dish in part.classes:
                by_name.setdefault(dish.name, dish)
        return tuple(by_name.values())

    def labels(self) -> np.ndarray:
        """Return the class id of every sample, a place in `classes`, unsigned (samples,)."""
        place = {dish.name: i for i, dish in enumerate(self.classes)}
        smallest = np.min_scalar_type(len(place))
        tables = [np.array([place[dish.name] for dish in part.classes], dtype=smallest) for part in self.parts]
        return np.concatenate([table[part.labels()] for table, part in zip(tables, self.parts, strict=True)])

    def key(self, i: int) -> str:
        """Return the sample's key. If there are several folders, its folder's name is before it."""
        number, local = self._locate(i)
        return self._before[number] + self.parts[number].key(local)

    def read(self, i: int) -> Sample:
        number, local = self._locate(i)
        return self.parts[number].read(local)

    def read_many(self, ids: Sequence[int]) -> list[Sample | ShardError]:
        found: dict[int, Sample | ShardError] = {}
        for part, places, local in self._by_part(np.asarray(ids, dtype=np.int64)):
            for place, data in zip(places, part.read_many(local.tolist()), strict=True):
                found[place] = data
        return [found[place] for place in range(len(ids))]

    def will_need(self, ids: np.ndarray) -> None:
        for part, _, local in self._by_part(ids):
            part.will_need(local)

    def require_files(self) -> None:
        for part in self.parts:
            part.require_files()

    def close(self) -> None:
        for part in self.parts:
            part.close()

    def _locate(self, i: int) -> tuple[int, int]:
        """Return the number of the folder that contains sample i, and the sample's id there."""
        number = int(np.searchsorted(self._first, i, side="right")) - 1
        return number, i - int(self._first[number])

    def _by_part(self, ids: np.ndarray) -> list[tuple[ShardSplit, np.ndarray, np.ndarray]]:
        """Return, for each folder that contains some of `ids`: the folder, their places in `ids`, their ids there."""
        numbers = np.searchsorted(self._first, ids, side="right") - 1
        places = [(n, np.flatnonzero(numbers == n)) for n in np.unique(numbers)]
        return [(self.parts[n], here, ids[here] - self._first[n]) for n, here in places]


def _prefixes(manifests: Sequence[Manifest]) -> list[str]:
    """Return the text before each folder's keys: the folder's name, or all of its path if two have the same name."""
    if len(manifests) == 1:
        return [""]
    called = Counter(m.name for m in manifests)
    return [f"{m.name if called[m.name] == 1 else m.where}/" for m in manifests]


def _require_compatible(parts: Sequence[ShardSplit]) -> None:
    main = parts[0].manifest
    for other in (part.manifest for part in parts[1:]):
        for name in ("image_size", "resize"):
            ours, theirs = getattr(main, name), getattr(other, name)
            if ours != theirs:
                raise ShardError(
                    f"{other.where} was packed with {name} {theirs}, {main.where} with {ours}",
                    f"pack it again with --{name.replace('_', '-')} {ours}",
                )
    same = Counter(part.index_hash for part in parts)
    twice = [part.manifest.where for part in parts if same[part.index_hash] > 1]
    if twice:
        raise ShardError(
            f"{' and '.join(twice)} hold the same samples", "name them once; to draw them more often, raise the weight"
        )
