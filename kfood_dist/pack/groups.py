"""Puts near-duplicates into one group, because they must not be in different splits.

    source bytes equal ───────────────────────────────────────┐
    perceptual hashes within NEAR bits, anywhere in the set ──┼─► connected components ──► a group per picture
    next file number in the folder, within ALIKE bits ────────┘

Pure. The result does not depend on the order of the pictures.
"""

import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from itertools import pairwise
from posixpath import dirname, splitext

import numpy as np

from kfood_dist.pack.prepare import Prepared

# The number of bits, of 64, by which two perceptual hashes may differ. Measured on 120 real photographs and 400, five
# classes. Within 6 bits: 99% of the pictures that are recompressed or a fifth brighter. Within 20 bits: 99% of those
# seen from the side, 70 to 85% of those turned by 10°, shifted by 10% or enlarged by 15%, only 14% of those turned by
# 20°. Of unrelated pictures of one class 0.01% are within 6 bits (of drawn pictures none) and 4% within 20 bits. 4% is
# too much for any two pictures of a class, but acceptable for neighbours, which are seldom unrelated.
NEAR = 6
ALIKE = 20

# Photographs of one dish are numbered in the order they were taken. One number in between may be missing.
_NEIGHBOURS = 2

# 13 hex digits are 52 bits, which every reader of JSON reads exactly. If two groups get the same number by chance, they
# become one larger group.
_GROUP_DIGITS = 13

_BANDS = 8  # of 8 bits: hashes that differ in fewer bits than there are bands agree in at least one
_PAIRS_AT_ONCE = 2**21


def group_pictures(pictures: Sequence[Prepared]) -> list[int]:
    """Return the group of each sample, a number of 52 bits made from the SHA-256 of its members' pictures.

    Two samples are in one group if some of their pictures are near-duplicates, directly or through other samples.
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
    # One node per sample and one per distinct hash: a thousand equal pictures make a thousand edges, not a million.
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
    """Return all pairs of positions whose hashes differ in at most `distance` bits, each pair once.

    `hashes` is uint64 of shape (n,), the result is int64 of shape (pairs, 2). The search is exact. By the pigeonhole
    principle, two such hashes agree in at least one of `distance + 1` or more bands of bits (Norouzi, Punjani and Fleet
    2012, "Fast search in Hamming space with multi-index hashing"). Only hashes that agree in a band are compared.
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
    """Return each position with the first position of the same key, int64 of shape (n, 2)."""
    first: dict[str, int] = {}
    return np.array([(i, first.setdefault(key, i)) for i, key in enumerate(keys)], dtype=np.int64).reshape(-1, 2)


def _neighbours(sources: Sequence[str]) -> np.ndarray:
    """Return pairs of pictures whose files have neighbouring numbers in one folder, int64 of shape (pairs, 2)."""
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
