"""The split that a source already has. It is kept, unless `--split` is given.

    records, --split ──► settle ──► records; without --split, a record in no split of the source has a problem
    pictures, groups ──► assign ──► a split per picture ──► count_across: near-duplicates that the publisher separated

Always holds: if the source's split is kept, no picture of its val or test goes to another split. A split that the
source does not have is taken from its train.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from kfood_dist.data.shards.manifest import SPLITS
from kfood_dist.pack.sources import Record
from kfood_dist.pack.split import assign_splits


@dataclass(frozen=True)
class SourceSplit:
    """The splits that a source names.

    `given` has them in the order train, val, test. `is_kept` says whether they are kept. `num_outside` is the number of
    records that are in none of them.
    """

    given: tuple[str, ...]
    is_kept: bool
    num_outside: int

    @property
    def from_train(self) -> tuple[str, ...]:
        """The splits that are taken from the source's train, because the source does not have them."""
        if not self.is_kept or "train" not in self.given:
            return ()
        return tuple(split for split in SPLITS if split not in self.given)


def settle(records: Sequence[Record], is_dealt: bool) -> tuple[list[Record], SourceSplit | None]:
    """Return the records as they will be split, and the source's own split, or None if it has none.

    If `is_dealt`, all splits are assigned again, so no record keeps a split.
    """
    named = {record.split for record in records if record.problem is None}
    if not any(named):
        return list(records), None
    given = tuple(split for split in SPLITS if split in named)
    num_outside = sum(record.problem is None and record.split not in given for record in records)
    own = SourceSplit(given, not is_dealt, num_outside)
    if is_dealt:
        return [replace(record, split="") for record in records], own
    return [_in_a_split(record, given) for record in records], own


def _in_a_split(record: Record, given: Sequence[str]) -> Record:
    if record.problem is not None or record.split in given:
        return record
    in_none = f"is in none of the source's splits ({', '.join(given)})"
    called = f"its split is called {record.split}" if record.split else in_none
    return replace(record, problem="no_split", detail=called, split="")


def assign(
    groups: Sequence[int],
    records: Sequence[Record],
    own: SourceSplit | None,
    fractions: Mapping[str, float],
    seed: int,
) -> list[str]:
    """Return the split of each picture: the source's split if that is kept, else a split assigned by `fractions`."""
    labels = [record.label for record in records]
    if own is None or not own.is_kept:
        return assign_splits(groups, labels, fractions, seed)
    splits = [record.split for record in records]
    if own.from_train:
        at = [i for i, split in enumerate(splits) if split == "train"]
        shares = {split: fractions[split] for split in ("train", *own.from_train)}
        shares = {split: share / sum(shares.values()) for split, share in shares.items()}
        dealt = assign_splits([groups[i] for i in at], [labels[i] for i in at], shares, seed)
        for i, split in zip(at, dealt, strict=True):
            splits[i] = split
    return splits


def count_across(groups: Sequence[int], splits: Sequence[str]) -> tuple[int, dict[str, int]]:
    """Count the groups in several splits, and the pictures of val and of test with a near-duplicate in train."""
    found: dict[int, set[str]] = defaultdict(set)
    for group, split in zip(groups, splits, strict=True):
        found[group].add(split)
    in_train = {
        name: sum(split == name and "train" in found[group] for group, split in zip(groups, splits, strict=True))
        for name in SPLITS
        if name != "train"
    }
    return sum(len(names) > 1 for names in found.values()), in_train
