"""Assigns groups of samples to train, val and test.

    a group and a label per sample, fractions, a seed ──► assign_splits ──► a split per sample

The samples of a group must stay in one split, for example the copies of one file.

Always holds: a group is in one split; a class with at least as many groups as there are wanted splits is in each of
them; the result depends on the set of groups, never on their order.
"""

import hashlib
import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence

from kfood_dist.data.shards.manifest import SPLITS
from kfood_dist.errors import SourceError

# For a class with fewer groups than splits: without train it is not learnt, without test it is not evaluated.
_SCARCE_ORDER = ("train", "test", "val")


def parse_fractions(text: str) -> dict[str, float]:
    """Read `0.8,0.1,0.1` as the fractions of train, val and test.

    Raises SourceError if they are not three non-negative numbers with the sum 1.
    """
    try:
        values = [float(part) for part in text.split(",")]
    except ValueError:
        values = []
    if len(values) != len(SPLITS) or not all(0 <= v <= 1 for v in values) or not math.isclose(sum(values), 1):
        raise SourceError(
            f"--split {text} is not three non-negative numbers with the sum 1",
            "give the shares of train, val and test, such as --split 0.8,0.1,0.1",
        )
    return dict(zip(SPLITS, values, strict=True))


def keyed_digest(seed: int, purpose: str, item: str) -> bytes:
    """Return 16 bytes that look random but depend only on the three arguments. Sorting by them is a shuffle."""
    return hashlib.blake2b(item.encode("utf-8"), key=f"{purpose}:{seed}".encode(), digest_size=16).digest()


def assign_splits(groups: Sequence[int], labels: Sequence[str], fractions: Mapping[str, float], seed: int) -> list[str]:
    """Return the split of each sample. Each class is split by `fractions`, counted in groups.

    A group whose samples have several labels counts for the most frequent label.
    """
    votes: dict[int, Counter[str]] = defaultdict(Counter)
    for group, label in zip(groups, labels, strict=True):
        votes[group][label] += 1
    by_label: dict[str, list[int]] = defaultdict(list)
    for group, counts in votes.items():
        by_label[min(counts, key=lambda name: (-counts[name], name))].append(group)
    split_of: dict[int, str] = {}
    for members in by_label.values():
        members.sort(key=lambda group: (keyed_digest(seed, "split", str(group)), group))
        dealt = iter(members)
        for split, count in _apportion(len(members), fractions).items():
            split_of.update((next(dealt), split) for _ in range(count))
    return [split_of[group] for group in groups]


def _apportion(num_groups: int, fractions: Mapping[str, float]) -> dict[str, int]:
    """Divide the groups of a class by largest remainder. Every wanted split gets at least one if there are enough."""
    wanted = [split for split in _SCARCE_ORDER if fractions.get(split, 0) > 0]
    if num_groups <= len(wanted):
        return {split: 1 for split in wanted[:num_groups]}
    quota = {split: num_groups * fractions[split] for split in wanted}
    counts = {split: max(1, math.floor(quota[split])) for split in wanted}
    while (left := num_groups - sum(counts.values())) != 0:
        if left > 0:
            counts[max(wanted, key=lambda split: quota[split] - counts[split])] += 1
        else:
            counts[max(wanted, key=lambda split: (counts[split] > 1, counts[split] - quota[split]))] -= 1
    return counts
