"""A part of a large source: so many pictures of each class, in numbered subsets that share none.

records ──► each class in a fixed pseudo-random order ──► subset K: the K-th so many ──► those, and what is short

Chosen by name, before any picture is read: packing 3,000 of 150,000 reads 3,000.
"""

from collections import defaultdict
from collections.abc import Sequence

from kfood_dist.data.packing.sources import Record
from kfood_dist.data.packing.split import keyed_digest
from kfood_dist.errors import SourceError


def choose(
    records: Sequence[Record], per_class: int | None, subset: int, seed: int
) -> tuple[list[Record], dict[str, int]]:
    """The records of subset `subset` (from 1) of `per_class` each, in their order; and the classes that have fewer.

    All records where `per_class` is None; otherwise none with a problem. Raises SourceError when nothing is left.
    """
    if per_class is None:
        return list(records), {}
    by_label: dict[str, list[Record]] = defaultdict(list)
    for record in records:
        if record.problem is None:
            by_label[record.label].append(record)
    chosen: set[int] = set()
    short = {}
    for label, members in sorted(by_label.items()):
        members.sort(key=lambda record: keyed_digest(seed, "subset", record.source))
        mine = members[(subset - 1) * per_class : subset * per_class]
        chosen.update(id(record) for record in mine)
        if len(mine) < per_class:
            short[label] = len(mine)
    if not chosen:
        most = max(map(len, by_label.values()), default=0)
        raise SourceError(
            f"subset {subset} of {per_class} pictures per class is empty: no class has more than {most:,}",
            f"--subset goes up to {max(1, -(-most // per_class))} here",
        )
    return [record for record in records if id(record) in chosen], short
