"""The refused inputs of a packing: their list, their counts, and the error if they are too many.

refusals ──► require_enough ──► too many: OUT.rejected.csv and SourceError, with the remedy of the main reason
        └──► rejected_csv   ──► OUT/rejected.csv
"""

import csv
import io
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from kfood_dist.data.picture.decoding import HEIC_REMEDY, NEEDS_HEIC
from kfood_dist.data.shards.manifest import REJECTED_NAME
from kfood_dist.errors import SourceError
from kfood_dist.pack.options import PackOptions
from kfood_dist.pack.prepare import Refusal

# The remedy to print if this is the most frequent reason of the refusals.
_REMEDIES = {
    "missing": "name the folder where the paths start with --image-root",
    "no_split": "put them into the source's splits, or split everything again with --split 0.8,0.1,0.1",
    NEEDS_HEIC: HEIC_REMEDY,
}
_LABELS_SHOWN = 10


def require_enough(out: Path, num_inputs: int, refused: Sequence[Refusal], options: PackOptions) -> None:
    """Raise SourceError if too many inputs are refused or none remains. Leaves the list of refusals beside OUT then."""
    limit, share = options.max_rejected, len(refused) / num_inputs
    if len(refused) < num_inputs and share <= limit:
        return
    reasons = by_reason(refused)
    kept = kept_list(out)
    kept.parent.mkdir(parents=True, exist_ok=True)
    kept.write_bytes(rejected_csv(refused))
    above = "" if len(refused) == num_inputs else f", more than --max-rejected {limit}"
    cause, remedy = _main_reason(next(iter(reasons)), refused, options)
    raise SourceError(
        f"{len(refused):,} of {num_inputs:,} inputs ({share:.1%}) cannot be used{above}: {counted(reasons)}{cause}",
        f"each is named in {kept}; {remedy}",
    )


def _main_reason(reason: str, refused: Sequence[Refusal], options: PackOptions) -> tuple[str, str]:
    """Return what else to say of the most frequent reason, and the remedy."""
    if reason != "unknown_label":
        return "", "; ".join(filter(None, [_REMEDIES.get(reason), "repair the source, or raise --max-rejected"]))
    labels = Counter(refusal.label for refusal in refused if refusal.reason == reason)
    some = counted(dict(labels.most_common(_LABELS_SHOWN))) + (", …" if len(labels) > _LABELS_SHOWN else "")
    return (
        f"; {len(labels):,} labels are not in the class list {options.classes}: {some}",
        "leave --classes out to take the labels found as the classes, or add them to the list",
    )


def kept_list(out: Path) -> Path:
    """Return the path of the list that is written beside OUT if the packing fails."""
    return out.with_name(f"{out.name}.{REJECTED_NAME}")


def by_reason(refused: Sequence[Refusal]) -> dict[str, int]:
    """Return the number of refusals of each reason, the most frequent first."""
    counts = Counter(refusal.reason for refusal in refused)
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))


def counted(counts: Mapping[str, int]) -> str:
    """Return counts as text, such as `unreadable 12, too_small 3`."""
    return ", ".join(f"{reason} {count:,}" for reason, count in counts.items())


def rejected_csv(refused: Sequence[Refusal]) -> bytes:
    """Return the list of refusals as a CSV, in a fixed order."""
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(["source", "label", "reason", "detail"])
    rows.writerows([r.source, r.label, r.reason, r.detail] for r in sorted(refused))
    return text.getvalue().encode("utf-8")
