"""Which samples an epoch draws, and in what order: array operations on the index, no state.

    folders by weight, classes by balance ──► parts: how many draws per epoch, and which samples in turn
    the parts' draws, dealt evenly        ──► turns of an epoch, each part's in the order of its index
    (seed, epoch)                         ──► windowed shuffle of the turns (`shuffle.py`) ──► turn ──► id

Neighbouring turns are neighbours in their folder's index, so a window reads long runs of every folder; and each window
holds every folder, and every class, in its share. Always holds: over any epochs, a folder's or class's samples are
drawn equally often, but for one draw: where an epoch has fewer draws than samples, the next ones go on with others.
(Samples lie in random order since they were packed, so any part of a folder is a random one.)
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from decimal import Decimal, localcontext
from math import gcd
from typing import Protocol

import numpy as np

from kfood_dist.data.plan.shuffle import DEFAULT_WINDOW, Shuffle

# Turns in which every part has its share: no more than a run of a window of 4,096.
_BLOCK = 64
# But no more blocks than this, whose begins take 16 MiB: of an epoch over 134 million draws they are longer.
_MAX_BLOCKS = 2**21

# A class with fewer pictures than this for each window is a part of its own. Read in the order of the index, each of
# its pictures as often in a row as it is drawn, whole windows would be without it.
_FEW_PER_WINDOW = 64


class Part(Protocol):
    """Samples that share out `draws` draws of an epoch."""

    draws: int

    def ids(self, epoch: int, turns: np.ndarray) -> np.ndarray:
        """The sample ids of some of the turns 0 … draws - 1 of an epoch, int64."""
        ...


class Order:
    """The global order of sample ids, epoch after epoch; see the module.

    `fingerprint` is a SHA-256 of all that decides about the order but seed and epoch.
    """

    def __init__(self, parts: Sequence[Part], num_samples: int, window: int, fingerprint: str):
        self.num_samples = num_samples
        self.epoch_length = sum(part.draws for part in parts)
        self.window = window
        self.fingerprint = fingerprint
        self._parts = parts
        self._num_blocks = min(-(-self.epoch_length // _BLOCK), _MAX_BLOCKS)
        # Block b begins at turn _starts[b], and holds the turns b·draws // blocks … of each part.
        blocks = np.arange(self._num_blocks + 1)
        self._starts = sum((blocks * part.draws // self._num_blocks for part in parts), np.zeros_like(blocks))
        self._shuffles: dict[tuple[int, int], Shuffle] = {}

    def ids(self, seed: int, epoch: int, start: int, stop: int) -> np.ndarray:
        """The sample ids at the places start … stop - 1 of an epoch, int64."""
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
        """The places, start and stop, of the window that `place` lies in; the same in every epoch."""
        window = self._shuffle(0, 0).window
        start = place // window * window
        return start, min(start + window, self.epoch_length)

    def _shuffle(self, seed: int, epoch: int) -> Shuffle:
        """An epoch's shuffle. The latest are kept: reading ahead looks into the next epoch while this one goes on."""
        if (seed, epoch) not in self._shuffles:
            kept = list(self._shuffles.items())[-2:]
            self._shuffles = dict([*kept, ((seed, epoch), Shuffle(self.epoch_length, self.window, seed, epoch))])
        return self._shuffles[seed, epoch]


class _RoundAndRound:
    """Samples one after the other, the next epoch where this one stopped: a range of ids, or those listed."""

    def __init__(self, first: int, size: int, draws: int, listed: np.ndarray | None = None):
        self.draws = draws
        self._first = first
        self._size = size
        self._listed = listed

    def ids(self, epoch: int, turns: np.ndarray) -> np.ndarray:
        place = (epoch * self.draws % self._size + turns) % self._size
        return self._first + (place if self._listed is None else self._listed[place].astype(np.int64))


class _ByClass:
    """A folder's samples in the order of its index, each as often in a row as its class wants it in this epoch.

    `by_class` are places in the folder, grouped by class; `classes` the (size, draws) of each group.
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
        """The places in the folder that the epoch draws, ascending."""
        counts = np.zeros(self._num_samples, dtype=np.int64)
        start = 0
        for size, draws in self._classes:
            counts[self._by_class[start : start + size]] = _times_drawn(size, draws, epoch)
            start += size
        return np.repeat(np.arange(self._num_samples, dtype=self._by_class.dtype), counts)


def _times_drawn(size: int, draws: int, epoch: int) -> np.ndarray:
    """How often an epoch draws each of the `size` samples of a class, int64 with the sum `draws`.

    Every sample earns draws / size per epoch, and is drawn when its account passes a whole number. The accounts begin
    at different levels, one for each sample, that lie far apart for neighbours in the index: multiples of the golden
    section, so that those drawn in an epoch are evenly spread over the index.
    """
    stride = size * 618_034 // 1_000_000
    while gcd(stride, size) != 1:
        stride += 1
    account = epoch * draws % size + np.arange(size) * stride % size
    return (account + draws) // size - account // size


def _by_class(first: int, labels: np.ndarray, draws: Sequence[int], few: int) -> Iterator[Part]:
    """The parts of one folder with so many draws of each class; a class with less than `few` samples is one of them."""
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
            yield _RoundAndRound(first, len(group), number, group)


def build_order(
    sizes: Sequence[int],
    weights: Sequence[float],
    labels: np.ndarray | None = None,
    class_balance: float = 0.0,
    window: int | None = None,
    index_hash: str = "",
) -> Order:
    """The order of several folders of `sizes` samples, their ids one folder's after the other's.

    A sample of a folder is drawn `weights` times per epoch on average. `class_balance` 0 leaves the classes as they
    are, 1 draws all alike, and between them a class of n samples is drawn in proportion to n^(1 - class_balance), the
    exponential smoothing of multilingual training (Conneau and Lample 2019, arXiv 1901.07291, section 3.1); it needs
    `labels`, whole numbers from 0 (all samples,). Samples of a class count by their folder's weight. No folder, and
    no class in a folder, is left without a draw.
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
        parts = [_RoundAndRound(*folder) for folder in zip(first, sizes, draws, strict=True)]
    settled = [list(map(int, sizes)), list(map(float, weights)), drawn, float(class_balance), window, index_hash]
    fingerprint = hashlib.sha256(json.dumps(settled).encode("ascii")).hexdigest()
    return Order(parts, sum(sizes), window, fingerprint)


def _balanced_draws(
    counts: Sequence[Sequence[int]], weights: Sequence[float], balance: float, total: int
) -> list[list[int]]:
    """Draws of each class in each folder: `total` in all, by largest remainder, but at least one where there are some.

    Computed in decimals: a power in floating point may differ in its last digit between machines, and tip a remainder.
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
