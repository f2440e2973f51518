"""Which samples an epoch draws, and in what order: array operations on the index, no state.

    index ──► streams: ranges of ids (folders, by weight) or lists of them (classes, balanced) with draws per epoch
    (seed, epoch) ──► shuffle of all draws ──► draw ──► its stream's next sample ──► id

A stream goes round: epoch e takes its turns e·draws … (e+1)·draws - 1, each modulo its size. So a data set as it is
gives every sample once per epoch; a stream drawn less than its size gives another part each epoch, and no sample is
drawn twice before all others of its stream were drawn once. (Samples lie in random order since they were packed, so
any part is a random one.)
"""

import hashlib
import json
from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from kfood_dist.data.shuffle import DEFAULT_WINDOW, Shuffle


class Order:
    """The global order of sample ids, epoch after epoch; see the module.

    `sizes` and `draws` are those of the streams, int64 (streams,); stream s holds the ids
    `members[first[s] : first[s] + sizes[s]]`, or that range itself where `members` is None. `fingerprint` is a
    SHA-256 of all that decides about the order but seed and epoch.
    """

    def __init__(
        self, sizes: np.ndarray, draws: np.ndarray, window: int, fingerprint: str, members: np.ndarray | None = None
    ):
        self.window = window
        self.fingerprint = fingerprint
        self.epoch_length = int(draws.sum())
        self._sizes = sizes
        self._draws = draws
        self._members = members
        self._first = np.cumsum(sizes) - sizes
        self._first_draw = np.cumsum(draws) - draws

    @property
    def num_samples(self) -> int:
        """Samples there are; an epoch draws `epoch_length` of them, some perhaps more than once."""
        return int(self._sizes.sum())

    def ids(self, seed: int, epoch: int, start: int, stop: int) -> np.ndarray:
        """The sample ids at the places start … stop - 1 of an epoch, int64."""
        drawn = self._shuffle(seed, epoch).take(start, stop)
        stream = np.searchsorted(self._first_draw, drawn, side="right") - 1
        turn = epoch * self._draws[stream] + drawn - self._first_draw[stream]
        place = self._first[stream] + turn % self._sizes[stream]
        return place if self._members is None else self._members[place]

    @property
    def num_windows(self) -> int:
        return -(-self.epoch_length // self._shuffle(0, 0).window)

    def window_at(self, place: int) -> tuple[int, int]:
        """The places, start and stop, of the window that `place` lies in."""
        window = self._shuffle(0, 0).window
        start = place // window * window
        return start, min(start + window, self.epoch_length)

    def _shuffle(self, seed: int, epoch: int) -> Shuffle:
        return _shuffle(self.epoch_length, self.window, seed, epoch)


@lru_cache(maxsize=2)
def _shuffle(size: int, window: int, seed: int, epoch: int) -> Shuffle:
    return Shuffle(size, window, seed, epoch)


def plain_order(num_samples: int, window: int | None = None, index_hash: str = "") -> Order:
    """Every one of `num_samples` samples once per epoch."""
    return build_order([num_samples], [1.0], window=window, index_hash=index_hash)


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
    `labels`, int (all samples,). Samples of a class count by their folder's weight.
    """
    window = window or DEFAULT_WINDOW
    settled = [list(map(int, sizes)), list(map(float, weights)), float(class_balance), window, index_hash]
    fingerprint = hashlib.sha256(json.dumps(settled).encode("ascii")).hexdigest()
    num_samples = np.array(sizes, dtype=np.int64)
    wanted = num_samples * np.array(weights, dtype=np.float64)
    if not class_balance:
        draws = np.maximum(1, np.round(wanted)).astype(np.int64)
        return Order(num_samples, draws, window, fingerprint)
    assert labels is not None, "class balance needs labels"
    num_classes = int(labels.max()) + 1
    folder = np.repeat(np.arange(len(sizes), dtype=np.int64), num_samples)
    pair = folder * num_classes + labels
    of_pair = np.bincount(pair, minlength=len(sizes) * num_classes)
    natural = of_pair * np.repeat(np.array(weights, dtype=np.float64), num_classes)
    of_class = natural.reshape(len(sizes), num_classes).sum(0)
    scale = np.where(of_class > 0, of_class, 1.0) ** -class_balance
    draws = _apportion(natural * np.tile(scale, len(sizes)), round(wanted.sum()))
    drawn = draws > 0
    members = np.argsort(pair, kind="stable")[np.repeat(drawn, of_pair)]
    return Order(of_pair[drawn], draws[drawn], window, fingerprint, members)


def _apportion(shares: np.ndarray, total: int) -> np.ndarray:
    """Whole numbers in proportion to `shares` with the sum `total`, by largest remainder; int64."""
    quota = shares / shares.sum() * total
    counts = np.floor(quota).astype(np.int64)
    left = total - int(counts.sum())
    counts[np.argsort(counts - quota, kind="stable")[:left]] += 1
    return counts
