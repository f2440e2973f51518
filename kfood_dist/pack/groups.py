"""Which pictures are so alike that they must not be torn apart: a group lies in one split.

    source bytes equal ───────────────────────────────────────┐
    perceptual hashes within NEAR bits, anywhere in the set ──┼─► connected components ──► a group per picture
    next file number in the folder, within ALIKE bits ────────┘

Pure; the order of the pictures decides nothing.
"""

import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from itertools import pairwise
from posixpath import dirname, splitext

import numpy as np

from kfood_dist.pack.prepare import Prepared

# Bits of 64 by which two perceptual hashes may differ. Measured on 120 real photographs and 400, five classes:
# recompressed or a fifth brighter, 99% stay within 6; turned by 10°, shifted by 10% or enlarged by 15%, 70 to 85%
# within 20, seen from the side 99%, turned by 20° only 14%. Of unrelated pictures of one class 0.01% lie within 6
# (of drawn ones none), and 4% within 20: too many for any two of a class, few enough for neighbours, which seldom
# are unrelated.
NEAR = 6
ALIKE = 20

# Photographs of one dish are numbered as they were taken; one between may have been left out.
_NEIGHBOURS = 2

# 13 hex digits, 52 bits: exact as a JSON number in every reader. Two groups that meet by chance are one, and wider.
_GROUP_DIGITS = 13

_BANDS = 8  # of 8 bits: hashes that differ in fewer bits than there are bands agree in one of them
_PAIRS_AT_ONCE = 2**21


def group_pictures(pictures: Sequence[Prepared]) -> list[int]:
    """The group of each sample, a number of 52 bits made from the SHA-256 of its members' pictures.

    Samples are in one group if any two of their pictures are alike.
    """
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import connected_components

    places = [place for picture in pictures for place in picture.places]
    sources = [record.source for picture in pictures for record in picture.record.pictures]
    owner = np.repeat(np.arange(len(pictures)), [len(picture.places) for picture in pictures])
    hashes = np.array([place.perceptual_hash for place in places], dtype=np.uint64)
    unique, place_of = np.unique(hashes, return_inverse=True)
    same_bytes = owner[_same([place.sha256 for place in places])]
    neighbours = owner[_alike(hashes, _neighbours(sources))]
    # One node per sample and one per different hash: a thousand equal pictures are a thousand edges, not a million.
    count = len(pictures)
    near = near_pairs(unique, NEAR) + count
    own_hash = np.stack([owner, place_of + count], axis=1)
    edges = np.concatenate([same_bytes, neighbours, near, own_hash])
    nodes = count + len(unique)
    graph = coo_matrix((np.ones(len(edges), dtype=bool), (edges[:, 0], edges[:, 1])), shape=(nodes, nodes))
    _, component = connected_components(graph, directed=False)
    first: dict[int, str] = {}
    for picture, number in zip(pictures, component[:count].tolist(), strict=True):
        lowest = min(place.sha256 for place in picture.places)
        first[number] = min(first.get(number, lowest), lowest)
    return [int(first[number][:_GROUP_DIGITS], 16) for number in component[:count].tolist()]


def near_pairs(hashes: np.ndarray, distance: int) -> np.ndarray:
    """All pairs of places whose hashes, uint64 (n,), differ in at most `distance` bits; int64 (pairs, 2), each once.

    Exact. By the pigeonhole principle two such hashes agree in one of `distance + 1` or more bands of bits (Norouzi,
    Punjani and Fleet 2012, "Fast search in Hamming space with multi-index hashing"); only those are compared.
    """
    assert distance < _BANDS
    width = 64 // _BANDS
    found = [np.empty((0, 2), dtype=np.int64)]
    for band in range(_BANDS):
        bits = (hashes >> np.uint64(band * width)) & np.uint64(2**width - 1)
        by_bits = np.argsort(bits, kind="stable")
        for bucket in np.split(by_bits, np.flatnonzero(np.diff(bits[by_bits])) + 1):
            found += _near_in(hashes, np.sort(bucket), distance)
    return np.unique(np.concatenate(found), axis=0)


def _near_in(hashes: np.ndarray, bucket: np.ndarray, distance: int) -> Iterator[np.ndarray]:
    members = hashes[bucket]
    rows = max(1, _PAIRS_AT_ONCE // max(1, len(bucket)))
    for start in range(0, len(bucket), rows):
        differing = np.bitwise_count(members[start : start + rows, None] ^ members[None, start:])
        left, right = np.nonzero(differing <= distance)
        later = right > left
        yield np.stack([bucket[start + left[later]], bucket[start + right[later]]], axis=1)


def _same(keys: Sequence[str]) -> np.ndarray:
    """Each place with the first of the same key, int64 (n, 2)."""
    first: dict[str, int] = {}
    return np.array([(i, first.setdefault(key, i)) for i, key in enumerate(keys)], dtype=np.int64).reshape(-1, 2)


def _neighbours(sources: Sequence[str]) -> np.ndarray:
    """Pairs of pictures whose files stand next to each other by number in a folder, int64 (pairs, 2)."""
    series: dict[tuple[str, str], list[tuple[int, int]]] = defaultdict(list)
    for i, source in enumerate(sources):
        stem = splitext(source)[0]
        if numbered := re.search(r"[0-9]{1,18}$", stem):
            series[dirname(source), stem[: numbered.start()]].append((int(numbered[0]), i))
    pairs = [
        (i, j)
        for members in map(sorted, series.values())
        for (number, i), (following, j) in pairwise(members)
        if following - number <= _NEIGHBOURS
    ]
    return np.array(pairs, dtype=np.int64).reshape(-1, 2)


def _alike(hashes: np.ndarray, pairs: np.ndarray) -> np.ndarray:
    return pairs[np.bitwise_count(hashes[pairs[:, 0]] ^ hashes[pairs[:, 1]]) <= ALIKE]
