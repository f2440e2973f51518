"""A part of a large source: so many pictures of each class, in numbered subsets that share none.

records ──► each class in a fixed pseudo-random order ──► subset K: the K-th so many ──► those
what came of them ──► count_short ──► the classes that have fewer

Chosen by name, before any picture is read: packing 3,000 of 150,000 reads 3,000. What turns out unusable is not
replaced, or the next subset would shift; so only what was read tells which classes are short.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence

from kfood_dist.errors import SourceError
from kfood_dist.pack.sources import Record
from kfood_dist.pack.split import keyed_digest
from kfood_dist.system.words import plural


def choose_subset(
    records: Sequence[Record], per_class: int | None, subset: int, seed: int
) -> tuple[list[Record], frozenset[str]]:
    """The records of subset `subset` (from 1) of `per_class` each, in their order; and the classes chosen from.

    All records where `per_class` is None; otherwise none with a problem. Raises SourceError when nothing is left, or
    there are no labels to choose by.
    """
    if per_class is None:
        return list(records), frozenset()
    by_label: dict[str, list[Record]] = defaultdict(list)
    for record in records:
        if record.problem is None:
            by_label[record.label].append(record)
    if set(by_label) == {""}:
        raise SourceError("the source has no labels, which --per-class is about", "leave --per-class out")
    chosen: set[int] = set()
    for members in by_label.values():
        members.sort(key=lambda record: keyed_digest(seed, "subset", record.identity))
        chosen.update(id(record) for record in members[(subset - 1) * per_class : subset * per_class])
    if not chosen:
        most = max(map(len, by_label.values()), default=0)
        raise SourceError(
            f"subset {subset} of {plural(per_class, 'picture')} per class is empty: no class has more than {most:,}",
            f"--subset goes up to {max(1, -(-most // per_class))} here",
        )
    return [record for record in records if id(record) in chosen], frozenset(by_label)


def count_short(per_class: int, classes: Iterable[str], labels: Iterable[str]) -> dict[str, int]:
    """How many pictures each class has that has fewer than `per_class`; `labels` is one for each picture packed."""
    counts = Counter(labels)
    return {name: counts[name] for name in sorted(set(classes)) if counts[name] < per_class}
