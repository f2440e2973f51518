from collections import Counter, defaultdict

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kfood_dist.errors import SourceError
from kfood_dist.pack.split import assign_splits, keyed_digest, parse_fractions

FRACTIONS = st.sampled_from(["0.8,0.1,0.1", "0.5,0.25,0.25", "1,0,0", "0,0,1", "0.7,0,0.3", "0.98,0.01,0.01"])
SAMPLES = st.lists(st.tuples(st.integers(0, 60), st.sampled_from("가나다")), min_size=1, max_size=120)


def deal(samples, fractions, seed):
    return assign_splits([g for g, _ in samples], [label for _, label in samples], fractions, seed)


@given(SAMPLES, FRACTIONS, st.integers(0, 9), st.randoms(use_true_random=False))
def test_groups_stay_together_and_the_input_order_has_no_effect(samples, text, seed, random):
    fractions = parse_fractions(text)
    splits = deal(samples, fractions, seed)
    assert all(fractions[split] > 0 for split in splits)
    of_group = defaultdict(set)
    for (group, _), split in zip(samples, splits, strict=True):
        of_group[group].add(split)
    assert all(len(found) == 1 for found in of_group.values())
    order = list(range(len(samples)))
    random.shuffle(order)
    assert deal([samples[i] for i in order], fractions, seed) == [splits[i] for i in order]


@given(st.dictionaries(st.sampled_from("가나다라"), st.integers(1, 80), min_size=1), FRACTIONS, st.integers(0, 9))
def test_each_class_is_in_every_wanted_split_and_near_its_share(sizes, text, seed):
    fractions = parse_fractions(text)
    samples = [(1000 * i + n, label) for i, (label, size) in enumerate(sizes.items()) for n in range(size)]
    splits = deal(samples, fractions, seed)
    for label, size in sizes.items():
        counts = Counter(s for (_, own), s in zip(samples, splits, strict=True) if own == label)
        wanted = [split for split, share in fractions.items() if share > 0]
        assert counts.total() == size
        if size >= len(wanted):
            assert set(counts) == set(wanted)
            # Largest remainder is off by less than one. The rule of at least one sample per split may add two more.
            assert all(abs(counts[s] - fractions[s] * size) < 3 for s in wanted)
        elif "train" in wanted:
            assert "train" in counts


def test_shares_are_exact_if_possible():
    samples = [(i, "약과") for i in range(200)]
    assert Counter(deal(samples, parse_fractions("0.8,0.1,0.1"), 0)) == {"train": 160, "val": 20, "test": 20}
    assert Counter(deal(samples[:2], parse_fractions("0.8,0.1,0.1"), 0)) == {"train": 1, "test": 1}


def test_another_seed_gives_other_splits():
    samples = [(i, "약과") for i in range(100)]
    fractions = parse_fractions("0.5,0.25,0.25")
    assert deal(samples, fractions, 0) == deal(samples, fractions, 0) != deal(samples, fractions, 1)


def test_a_group_with_two_labels_counts_for_its_more_common_label():
    """As the only group of its class, it goes to train. As one of eleven of the other class, it could go anywhere."""
    samples = [(7, "나"), (7, "가"), (7, "가"), *[(100 + i, "나") for i in range(10)]]
    for seed in range(10):
        assert deal(samples, parse_fractions("0.5,0,0.5"), seed)[:3] == ["train"] * 3


def test_digests_differ_between_purposes_and_seeds():
    digests = {keyed_digest(seed, purpose, "a") for seed in (0, 1) for purpose in ("split", "order")}
    assert len(digests) == 4


@pytest.mark.parametrize("text", ["0.8,0.1", "0.8,0.1,0.2", "1.2,-0.1,-0.1", "a,b,c", "", "nan,0.5,0.5", "0.8 0.1 0.1"])
def test_impossible_fractions_are_refused(text):
    with pytest.raises(SourceError, match="is not three non-negative numbers"):
        parse_fractions(text)


def test_fractions_are_train_val_and_test():
    assert parse_fractions("0.7, 0.1, 0.2") == {"train": 0.7, "val": 0.1, "test": 0.2}
