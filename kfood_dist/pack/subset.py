"""Chooses a part of a large source: N pictures of each class, in numbered subsets that share no picture.

records ──► each class in a fixed pseudo-random order ──► subset K: the K-th N records of each class
labels of the packed pictures ──► count_short ──► the classes with fewer than N

The choice is made by name before any picture is read: packing 3,000 of 150,000 pictures reads 3,000. An unusable
picture is not replaced, because the next subset would shift. So the classes with too few pictures are known only after
reading.
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
    """Return the records of subset number `subset`, in their order, and the classes that were chosen from.

    Subsets count from 1 and have up to `per_class` records of each class, none with a problem. If `per_class` is None,
    returns all records and no classes. Raises SourceError if the subset is empty or the source has no labels.
    """
    if per_class is None:
        return list(records), frozenset()
    by_label: dict[str, list[Record]] = defaultdict(list)
    for record in records:
        if record.problem is None:
            by_label[record.label].append(record)
    if set(by_label) == {""}:
        raise SourceError("the source has no labels, but --per-class needs them", "leave --per-class out")
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
    """Return the number of pictures of each class that has fewer than `per_class`.

    `labels` holds the label of each packed picture.
    """
    counts = Counter(labels)
    return {name: counts[name] for name in sorted(set(classes)) if counts[name] < per_class}
