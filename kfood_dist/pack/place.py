"""Decides where each sample goes: its class, its group, its split and its position in the split. Pure and fast.

    prepared pictures ──► refuse_ambiguous ──► those whose bytes have only one label
                      ──► classes_of     ──► class list (unless one was given)
    and their splits  ──► place          ──► the samples of each split, in a seeded shuffled order

Always holds: the result does not depend on the order of the input pictures.
"""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from kfood_dist.data.shards.manifest import SPLITS
from kfood_dist.data.shards.reader import NO_LABEL
from kfood_dist.data.task.dish import DishClass
from kfood_dist.pack.prepare import Prepared, Refusal
from kfood_dist.pack.split import assign_splits, keyed_digest


@dataclass(frozen=True)
class Sample:
    """A prepared sample with its place. `label` is its class id or NO_LABEL. Samples of one `group` stay together."""

    picture: Prepared
    label: int
    group: int


def refuse_ambiguous(pictures: Sequence[Prepared]) -> tuple[list[Prepared], list[Refusal]]:
    """Refuse every copy of a file that occurs under two labels, because nothing tells which label is right."""
    labels_of: dict[tuple[str, ...], set[str]] = defaultdict(set)
    for picture in pictures:
        labels_of[_bytes_of(picture)].add(picture.record.label)
    clear, refused = [], []
    for picture in pictures:
        labels = labels_of[_bytes_of(picture)]
        if len(labels) == 1:
            clear.append(picture)
        else:
            detail = f"the same bytes are labelled {' and '.join(sorted(labels))}"
            refused.append(Refusal(picture.record.source, picture.record.label, "ambiguous", detail))
    return clear, refused


def _bytes_of(picture: Prepared) -> tuple[str, ...]:
    return tuple(place.sha256 for place in picture.places)


def classes_of(pictures: Sequence[Prepared]) -> list[DishClass]:
    """Return the classes that occur, sorted by name, each with the most frequent category of its pictures."""
    categories: dict[str, Counter[str]] = defaultdict(Counter)
    for picture in pictures:
        if picture.record.label:
            categories[picture.record.label][picture.record.category] += 1
    return [
        DishClass(name, min(counts, key=lambda category: (-counts[category], category)), listed=False)
        for name, counts in sorted(categories.items())
    ]


def columns_of(pictures: Sequence[Prepared]) -> list[str]:
    """Return the columns that every sample has, sorted: those of a list, and the label and category of a class."""
    found = [
        {name for name, _ in p.record.columns} | ({"label", "category"} if p.record.label else set()) for p in pictures
    ]
    return sorted(set.intersection(*found))


def place(
    pictures: Sequence[Prepared],
    groups: Sequence[int],
    splits: Sequence[str],
    classes: Sequence[DishClass],
    seed: int,
) -> dict[str, list[Sample]]:
    """Return the samples of train, val and test, each split in its shuffled order.

    `groups` and `splits` hold one value for each picture.
    """
    ids = {dish.name: i for i, dish in enumerate(classes)}
    placed: dict[str, list[Sample]] = {split: [] for split in SPLITS}
    for picture, group, split in zip(pictures, groups, splits, strict=True):
        placed[split].append(Sample(picture, ids.get(picture.record.label, NO_LABEL), group))
    for samples in placed.values():
        samples.sort(key=lambda sample: keyed_digest(seed, "order", sample.picture.record.identity))
    return placed


def count_random_split_leaks(
    pictures: Sequence[Prepared], groups: Sequence[int], fractions: Mapping[str, float], seed: int
) -> dict[str, int]:
    """Count the pictures of val and of test that would have a near-duplicate in train if groups were ignored.

    For this count, each picture is assigned to a split separately.
    """
    alone = [int.from_bytes(keyed_digest(seed, "alone", p.record.identity)[:8], "big") for p in pictures]
    splits = assign_splits(alone, [picture.record.label for picture in pictures], fractions, seed)
    learnt = {group for group, split in zip(groups, splits, strict=True) if split == "train"}
    counts = Counter(split for group, split in zip(groups, splits, strict=True) if group in learnt)
    return {split: counts[split] for split in SPLITS if split != "train"}
