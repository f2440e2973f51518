"""Which samples an epoch draws, and in what order: array operations on the index, no state.

    folders by weight, classes by balance ──► parts: how many draws per epoch, and which samples in turn
    the parts' draws, spread evenly       ──► turns of an epoch, each part's in the order of its index
    (seed, epoch)                         ──► windowed shuffle of the turns (`shuffle.py`) ──► turn ──► id

Neighbouring turns are neighbours in their folder's index, so a window reads long runs of every folder. Each window
holds every folder, and every class, in its share. Always holds: over any number of epochs, all samples of a folder or
class are drawn equally often, give or take one draw. If an epoch has fewer draws than samples, the next epochs
continue with the other samples. (Packing stores samples in random order, so any part of a folder is a random one.)
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from decimal import Decimal, localcontext
from math import gcd
from typing import Protocol

import numpy as np

from kfood_dist.data.plan.shuffle import DEFAULT_WINDOW, Shuffle

# Number of turns in which every part has its share: not more than a run in a window of 4,096.
_BLOCK = 64
# At most this many blocks, whose start positions take 16 MiB. In an epoch of over 134 million draws blocks are longer.
_MAX_BLOCKS = 2**21

# A class with fewer pictures per window than this is a separate part. Otherwise its pictures would be read in the order
# of the index, each as often in a row as it is drawn, and complete windows would have none of them.
_FEW_PER_WINDOW = 64


class Part(Protocol):
    """Samples that share `draws` draws of an epoch."""

    draws: int

    def ids(self, epoch: int, turns: np.ndarray) -> np.ndarray:
        """Return the sample ids of some of the turns 0 to draws - 1 of an epoch, int64."""
        ...


class Order:
    """The global order of sample ids, epoch after epoch. See the docstring of the module.

    `fingerprint` is a SHA-256 of everything that determines the order, except seed and epoch.
    """

    def __init__(self, parts: Sequence[Part], num_samples: int, window: int, fingerprint: str):
        self.num_samples = num_samples
        self.epoch_length = sum(part.draws for part in parts)
        self.window = window
        self.fingerprint = fingerprint
        self._parts = parts
        self._num_blocks = min(-(-self.epoch_length // _BLOCK), _MAX_BLOCKS)
        # Block b begins at turn _starts[b]. In each part, it begins at turn b·draws // blocks.
        blocks = np.arange(self._num_blocks + 1)
        self._starts = sum((blocks * part.draws // self._num_blocks for part in parts), np.zeros_like(blocks))
        self._shuffles: dict[tuple[int, int], Shuffle] = {}

    def ids(self, seed: int, epoch: int, start: int, stop: int) -> np.ndarray:
        """Return the sample ids at the places `start` to `stop` - 1 of an epoch, int64."""
        turns = self._shuffle(seed, epoch).take(start, stop)
        if len(self._parts) == 1:
            return self._parts[0].ids(epoch, turns)
        block = np.searchsorted(self._starts, turns, side="right") - 1
        within = turns - self._starts[block]
        ids = np.empty_like(turns)
        for part in self._parts:
            begin, end = (b * part.draws // self._num_blocks for b in (block, block + 1))
            mine = (within >= 0) & (within < end - begin)
            ids[mine] = part.ids(epoch, (begin + within)[mine])
            within -= end - begin
        return ids

    @property
    def num_windows(self) -> int:
        return -(-self.epoch_length // self._shuffle(0, 0).window)

    def window_at(self, place: int) -> tuple[int, int]:
        """Return the places, start and stop, of the window that contains `place`. They are the same in every epoch."""
        window = self._shuffle(0, 0).window
        start = place // window * window
        return start, min(start + window, self.epoch_length)

    def _shuffle(self, seed: int, epoch: int) -> Shuffle:
        """Return an epoch's shuffle. Keeps the latest ones, because reading ahead may already be in the next epoch."""
        if (seed, epoch) not in self._shuffles:
            kept = list(self._shuffles.items())[-2:]
            self._shuffles = dict([*kept, ((seed, epoch), Shuffle(self.epoch_length, self.window, seed, epoch))])
        return self._shuffles[seed, epoch]


class _Cycling:
    """Samples drawn one after the other, in a circle: a range of ids, or those listed.

    Each epoch starts where the one before it stopped.
    """

    def __init__(self, first: int, size: int, draws: int, listed: np.ndarray | None = None):
        self.draws = draws
        self._first = first
        self._size = size
        self._listed = listed

    def ids(self, epoch: int, turns: np.ndarray) -> np.ndarray:
        place = (epoch * self.draws % self._size + turns) % self._size
        return self._first + (place if self._listed is None else self._listed[place].astype(np.int64))


class _ByClass:
    """A folder's samples in the order of its index, each repeated as often as its class requires in this epoch.

    `by_class` has places in the folder, grouped by class. `classes` has the (size, draws) of each group.
    """

    def __init__(self, first: int, num_samples: int, by_class: np.ndarray, classes: Sequence[tuple[int, int]]):
        self.draws = sum(draws for _, draws in classes)
        self._first = first
        self._num_samples = num_samples
        self._by_class = by_class
        self._classes = classes
        self._latest: dict[int, np.ndarray] = {}

    def ids(self, epoch: int, turns: np.ndarray) -> np.ndarray:
        if epoch not in self._latest:
            self._latest = {e: drawn for e, drawn in self._latest.items() if e == epoch - 1}
            self._latest[epoch] = self._drawn(epoch)
        return self._first + self._latest[epoch][turns].astype(np.int64)

    def _drawn(self, epoch: int) -> np.ndarray:
        """Return the places in the folder that the epoch draws, in ascending order."""
        counts = np.zeros(self._num_samples, dtype=np.int64)
        start = 0
        for size, draws in self._classes:
            counts[self._by_class[start : start + size]] = _times_drawn(size, draws, epoch)
            start += size
        return np.repeat(np.arange(self._num_samples, dtype=self._by_class.dtype), counts)


def _times_drawn(size: int, draws: int, epoch: int) -> np.ndarray:
    """Return how often an epoch draws each of the `size` samples of a class, int64 with the sum `draws`.

    Every sample has an account. It grows by draws / size per epoch, and the sample is drawn when it passes an integer.
    Each account starts at a different level, a multiple of the golden ratio (0.618). The levels of neighbours in the
    index are far apart, so that the samples drawn in an epoch are evenly spread over the index.
    """
    stride = size * 618_034 // 1_000_000
    while gcd(stride, size) != 1:
        stride += 1
    account = epoch * draws % size + np.arange(size) * stride % size
    return (account + draws) // size - account // size


def _by_class(first: int, labels: np.ndarray, draws: Sequence[int], few: int) -> Iterator[Part]:
    """Yield the parts of one folder, for these `draws` of each class.

    A class with fewer than `few` samples is a separate part. All other classes together are one part.
    """
    place = np.argsort(labels, kind="stable").astype(np.min_scalar_type(len(labels)))
    sizes = np.bincount(labels, minlength=len(draws)).tolist()
    groups = np.split(place, np.cumsum(sizes)[:-1])
    rare = [0 < size < few for size in sizes]
    common = [k for k, size in enumerate(sizes) if size >= few]
    if common:
        together = np.concatenate([groups[k] for k in common])
        yield _ByClass(first, len(labels), together, [(sizes[k], draws[k]) for k in common])
    for group, number, is_rare in zip(groups, draws, rare, strict=True):
        if is_rare:
            yield _Cycling(first, len(group), number, group)


def build_order(
    sizes: Sequence[int],
    weights: Sequence[float],
    labels: np.ndarray | None = None,
    class_balance: float = 0.0,
    window: int | None = None,
    index_hash: str = "",
) -> Order:
    """Build the order of several folders of `sizes` samples. The ids of a folder follow those of the folder before it.

    A sample of a folder is drawn as often per epoch, on average, as its entry in `weights`. `class_balance` 0 leaves
    the classes as they are, and 1 draws all classes equally often. Between them, a class of n samples is drawn in
    proportion to n^(1 - class_balance), the exponential smoothing of multilingual training (Conneau and Lample 2019,
    arXiv 1901.07291, section 3.1). It needs `labels`, integers from 0 (all samples,). Samples of a class count with
    their folder's weight. Every folder, and every class in a folder, has at least one draw.
    """
    window = window or DEFAULT_WINDOW
    first = [sum(sizes[:n]) for n in range(len(sizes))]
    draws = [max(1, round(size * weight)) for size, weight in zip(sizes, weights, strict=True)]
    parts: list[Part]
    if class_balance:
        assert labels is not None, "class balance needs labels"
        of_folder = np.split(labels, first[1:])
        num_classes = int(labels.max()) + 1
        counts = [np.bincount(folder, minlength=num_classes).tolist() for folder in of_folder]
        drawn = _balanced_draws(counts, weights, class_balance, sum(draws))
        num_windows = -(-sum(map(sum, drawn)) // window)
        few = _FEW_PER_WINDOW * num_windows if num_windows > 1 else 1
        folders = zip(first, of_folder, drawn, strict=True)
        parts = [part for folder in folders for part in _by_class(*folder, few)]
    else:
        drawn = [[number] for number in draws]
        parts = [_Cycling(*folder) for folder in zip(first, sizes, draws, strict=True)]
    settled = [list(map(int, sizes)), list(map(float, weights)), drawn, float(class_balance), window, index_hash]
    fingerprint = hashlib.sha256(json.dumps(settled).encode("ascii")).hexdigest()
    return Order(parts, sum(sizes), window, fingerprint)


def _balanced_draws(
    counts: Sequence[Sequence[int]], weights: Sequence[float], balance: float, total: int
) -> list[list[int]]:
    """Return the draws of each class in each folder: `total` in all, by largest remainder.

    A class that has samples in a folder gets at least one draw there. Computed in decimals, because the last digit of
    a floating-point power may differ between machines, and change which remainder is the largest.
    """
    with localcontext(prec=28):
        natural = [[Decimal(repr(float(w))) * n for n in row] for w, row in zip(weights, counts, strict=True)]
        of_class = [sum(column, Decimal(0)) for column in zip(*natural, strict=True)]
        scale = [n ** -Decimal(repr(float(balance))) if n else Decimal(0) for n in of_class]
        shares = [share * scale[k] for row in natural for k, share in enumerate(row)]
        whole = sum(shares)
        quotas = [share * total / whole for share in shares]
    draws = [int(quota) for quota in quotas]
    left = total - sum(draws)
    for i in sorted(range(len(quotas)), key=lambda i: draws[i] - quotas[i])[:left]:
        draws[i] += 1
    drawn = [max(1, n) if share else 0 for n, share in zip(draws, shares, strict=True)]
    num_classes = len(counts[0])
    return [drawn[start : start + num_classes] for start in range(0, len(drawn), num_classes)]
