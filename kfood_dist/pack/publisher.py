"""The split that a source came with: kept, unless `--split` says otherwise.

    records, --split ──► settle ──► records; without --split those in no split of the source have a problem
    pictures, groups ──► assign ──► a split per picture ──► count_across: look-alikes that the publisher tore apart

Always holds: where the source's split is kept, no picture of its val or test goes elsewhere. What it lacks is taken
from its train.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from kfood_dist.data.shards.manifest import SPLITS
from kfood_dist.pack.sources import Record
from kfood_dist.pack.split import assign_splits


@dataclass(frozen=True)
class SourceSplit:
    """The splits that a source names, in the order train, val, test; whether they are kept; what lies in none."""

    given: tuple[str, ...]
    is_kept: bool
    num_outside: int

    @property
    def from_train(self) -> tuple[str, ...]:
        """The splits that are taken from the source's train, as it has none of its own."""
        if not self.is_kept or "train" not in self.given:
            return ()
        return tuple(split for split in SPLITS if split not in self.given)


def settle(records: Sequence[Record], is_dealt: bool) -> tuple[list[Record], SourceSplit | None]:
    """The records as they will be split, and the source's own split, None if it has none.

    `is_dealt` deals all anew: then no record has a split.
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
    in_none = f"lies in none of the source's splits ({', '.join(given)})"
    called = f"its split is called {record.split}" if record.split else in_none
    return replace(record, problem="no_split", detail=called, split="")


def assign(
    groups: Sequence[int],
    records: Sequence[Record],
    own: SourceSplit | None,
    fractions: Mapping[str, float],
    seed: int,
) -> list[str]:
    """The split of each picture: the source's where that is kept, else dealt by `fractions`."""
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
    """How many groups lie in several splits, and how many pictures of val and test have a look-alike in train."""
    found: dict[int, set[str]] = defaultdict(set)
    for group, split in zip(groups, splits, strict=True):
        found[group].add(split)
    in_train = {
        name: sum(split == name and "train" in found[group] for group, split in zip(groups, splits, strict=True))
        for name in SPLITS
        if name != "train"
    }
    return sum(len(names) > 1 for names in found.values()), in_train
