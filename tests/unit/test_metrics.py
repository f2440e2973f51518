"""Shares and their uncertainty, compared with published values and with exact arithmetic."""

from fractions import Fraction
from math import comb

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kfood_dist.evaluate.metrics import Prediction, by_class, confusions, mcnemar_exact, summarise, wilson_95

counts = st.integers(1, 5000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n)))


@pytest.mark.parametrize(
    ("correct", "total", "low", "high"),
    [  # R. G. Newcombe, Statistics in Medicine 17 (1998), table I, method 3
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0000, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_gives_newcombes_values(correct, total, low, high):
    assert wilson_95(correct, total) == pytest.approx((low, high), abs=5e-5)


@given(counts)
def test_wilson_interval_contains_the_share_and_is_symmetric(count):
    correct, total = count
    low, high = wilson_95(correct, total)
    assert 0.0 <= low <= correct / total <= high <= 1.0
    assert low < high
    assert wilson_95(total - correct, total) == pytest.approx((1 - high, 1 - low), abs=1e-12)


@given(counts)
def test_wilson_interval_narrows_with_more_pictures(count):
    correct, total = count
    low, high = wilson_95(correct, total)
    low10, high10 = wilson_95(10 * correct, 10 * total)
    assert high10 - low10 < high - low


@pytest.mark.parametrize(("correct", "total"), [(0, 0), (3, 2), (-1, 5)])
def test_wilson_refuses_impossible_counts(correct, total):
    with pytest.raises(ValueError, match="is not a share"):
        wilson_95(correct, total)


@pytest.mark.parametrize(
    ("first", "second", "p"),
    [
        (0, 0, 1.0),
        (5, 5, 1.0),
        (1, 9, 0.021484375),  # 2 (1 + 10) / 2^10
        (8, 1, 0.0390625),  # 2 (1 + 9) / 2^9
        (10, 2, 0.03857421875),  # 2 (1 + 12 + 66) / 2^12
    ],
)
def test_mcnemar_known_values(first, second, p):
    assert mcnemar_exact(first, second) == pytest.approx(p, rel=1e-9)
    assert mcnemar_exact(second, first) == mcnemar_exact(first, second)


@given(st.integers(0, 300), st.integers(0, 300))
def test_mcnemar_is_the_binomial_tail(first, second):
    total, fewer = first + second, min(first, second)
    exact = 2 * sum(Fraction(comb(total, k), 2**total) for k in range(fewer + 1))
    assert mcnemar_exact(first, second) == pytest.approx(float(min(exact, Fraction(1))), rel=1e-12)


def test_mcnemar_of_many_pictures_is_a_finite_number():
    assert mcnemar_exact(0, 3000) == 0.0  # 2^-2999 is smaller than any float
    assert 0.0 < mcnemar_exact(9700, 10300) < 1e-4


def record(label: str, prediction: str, correct: bool = False) -> Prediction:
    return Prediction("k", "s", label, prediction, prediction, correct, 0.5)


def test_by_class_counts_each_dish():
    records = [record("김밥", "김밥", True), record("김밥", "파전"), record("파전", "파전", True)]
    assert by_class(records) == {
        "김밥": {"images": 2, "correct": 1, "accuracy": 0.5},
        "파전": {"images": 1, "correct": 1, "accuracy": 1.0},
    }
    assert summarise(records)["accuracy"] == pytest.approx(2 / 3)


def test_confusions_are_wrong_answers_most_frequent_first():
    records = [record("김밥", "파전"), record("파전", "김밥"), record("파전", "김밥"), record("김밥", "김밥", True)]
    assert confusions(records) == [
        {"label": "파전", "prediction": "김밥", "count": 2},
        {"label": "김밥", "prediction": "파전", "count": 1},
    ]
    assert len(confusions(records, top=1)) == 1
