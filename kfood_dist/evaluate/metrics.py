"""The quality of a set of answers: shares with their uncertainty, results by dish, and confusions.

    records ──► accuracy, Wilson interval, by dish, confusions
    records of two models ──► McNemar's exact test

Nothing here depends on a model or a file.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Prediction:
    """One picture's answer.

    `prediction` is the clean form of `raw`. `confidence` is the probability of `raw`, 0 to 1.
    """

    key: str
    source: str
    label: str
    prediction: str
    raw: str
    correct: bool
    confidence: float


def wilson_95(correct: int, total: int) -> tuple[float, float]:
    """Return the 95% score interval of the share `correct / total` (E. B. Wilson, JASA 22, 1927, p. 209).

    Unlike the textbook interval, it stays within 0 and 1, and it is not a single point if all or none are correct.
    Raises ValueError if `correct / total` is not a share.
    """
    if not 0 <= correct <= total or total == 0:
        raise ValueError(f"{correct} of {total} is not a share")
    from scipy.stats import binomtest  # this import takes most of a second

    interval = binomtest(correct, total).proportion_ci(0.95, method="wilson")
    # At the ends the bound is exactly 0 or 1, but rounding could give another number.
    return 0.0 if correct == 0 else interval.low, 1.0 if correct == total else interval.high


def mcnemar_exact(only_first: int, only_second: int) -> float:
    """Return the two-sided exact p-value of two models being equally often right (Q. McNemar, Psychometrika 12, 1947).

    `only_first` and `only_second` count the pictures that only one of the models names correctly. If both are equally
    good, each of these pictures goes to either model with probability 1/2. Raises ValueError for a negative count.
    """
    if min(only_first, only_second) < 0:
        raise ValueError(f"{min(only_first, only_second)} is not a count")
    if only_first == only_second == 0:
        return 1.0
    from scipy.stats import binomtest

    return float(binomtest(only_first, only_first + only_second).pvalue)


def summarise(records: Sequence[Prediction]) -> dict[str, Any]:
    """Return `accuracy, correct, images, wilson_95` of one or more records."""
    correct = sum(r.correct for r in records)
    return {
        "accuracy": correct / len(records),
        "correct": correct,
        "images": len(records),
        "wilson_95": list(wilson_95(correct, len(records))),
    }


def by_class(records: Iterable[Prediction]) -> dict[str, dict[str, Any]]:
    """Return {label: {images, correct, accuracy}}, sorted by label."""
    groups: dict[str, list[bool]] = defaultdict(list)
    for record in records:
        groups[record.label].append(record.correct)
    return {
        label: {"images": len(hits), "correct": sum(hits), "accuracy": sum(hits) / len(hits)}
        for label, hits in sorted(groups.items())
    }


def confusions(records: Iterable[Prediction], top: int = 20) -> list[dict[str, Any]]:
    """Return the `top` most frequent wrong answers, [{label, prediction, count}], most frequent first."""
    wrong = Counter((r.label, r.prediction) for r in records if not r.correct)
    ranked = sorted(wrong.items(), key=lambda item: (-item[1], item[0]))
    return [{"label": label, "prediction": answer, "count": n} for (label, answer), n in ranked[:top]]
