"""Which rank reads which samples. Plans are pure integers, so tests check orders, ranks, batches and resume points."""

import hashlib
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from orders import plain_order

from kfood_dist.data.plan.plan import EMPTY, Plan, accumulation_for, assign_slots, refit_batch
from kfood_dist.data.plan.sampling import Order, _balanced_draws, _times_drawn, build_order
from kfood_dist.data.plan.shuffle import RUNS_PER_WINDOW, Shuffle
from kfood_dist.errors import CheckpointError, RecipeError

GOLDEN = [9, 6, 5, 7, 8, 11, 0, 4, 10, 1, 2, 3]
GOLDEN_SHA256 = "ea85c22a56b5f33f92ed9e983fd76a4b48b6aeb9219206f92028af3ec5ee8f01"
GOLDEN_WINDOWED_SHA256 = "3a42bd5fb971713e1f97c6d605cc8beb43eaf180c67dbc9f9f7a66cdcbf302b8"
GOLDEN_MIXED = [170, 287, 148, 42, 141, 252, 71, 266, 530, 584]
GOLDEN_MIXED_SHA256 = "7d84c0e58a310137b8ef71a6182de8caf5b3dc2c6ded9c3c2ab624b67722ce23"
GOLDEN_BALANCED_SHA256 = "12e6ba18d2632ed4f14db67d6f2cf32fb90b60d12f73a75654db2c4a458992e8"

windows = st.one_of(st.none(), st.integers(1, 400))


@st.composite
def plain_orders(draw: st.DrawFn) -> Order:
    return plain_order(draw(st.integers(1, 300)), draw(windows))


class Mix(NamedTuple):
    """The arguments of an order: folders with weights and labels, balance and window."""

    sizes: list[int]
    weights: list[float]
    labels: np.ndarray
    balance: float
    window: int | None

    @property
    def order(self) -> Order:
        return build_order(*self, index_hash="hash")

    @property
    def streams(self) -> np.ndarray:
        """The stream that each sample is drawn from: its folder, or its class in its folder if classes are balanced."""
        folder = np.repeat(np.arange(len(self.sizes)), self.sizes)
        return folder * 1000 + self.labels if self.balance else folder


@st.composite
def mixes(draw: st.DrawFn) -> Mix:
    """Draw several folders with weights, and labels that are balanced or not."""
    sizes = draw(st.lists(st.integers(1, 80), min_size=1, max_size=4))
    weights = [1.0, *draw(st.lists(st.floats(0.1, 3), min_size=len(sizes) - 1, max_size=len(sizes) - 1))]
    labels = np.random.default_rng(draw(st.integers(0, 99))).integers(0, draw(st.integers(1, 12)), sum(sizes))
    return Mix(sizes, weights, labels, draw(st.sampled_from([0.0, 0.4, 1.0])), draw(windows))


def plans_of(orders: st.SearchStrategy[Order]) -> st.SearchStrategy[Plan]:
    return st.builds(
        Plan,
        order=orders,
        seed=st.integers(0, 2**32 - 1),
        ranks=st.integers(1, 16),
        micro_batch=st.integers(1, 5),
        accumulation=st.integers(1, 5),
    )


plans = plans_of(st.one_of(plain_orders(), mixes().map(lambda mix: mix.order)))


def read_ids(plan: Plan, start: int, stop: int) -> dict[int, list[int]]:
    """Return the ids that each step reads, gathered from all ranks."""
    seen: dict[int, list[int]] = {step: [] for step in range(start, stop)}
    for rank in range(plan.ranks):
        for micro_batch in plan.micro_batches(rank, start, stop):
            seen[micro_batch.step] += micro_batch.ids
    return seen


def sha256(ids: np.ndarray) -> str:
    return hashlib.sha256(ids.astype("<i8").tobytes()).hexdigest()


def test_the_order_is_golden() -> None:
    """The order may never change: with another order, old checkpoints would resume on other data."""
    assert plain_order(12).ids(0, 0, 0, 12).tolist() == GOLDEN
    assert sha256(plain_order(10_000).ids(7, 3, 0, 10_000)) == GOLDEN_SHA256
    assert sha256(plain_order(10_000, window=900).ids(7, 3, 0, 10_000)) == GOLDEN_WINDOWED_SHA256
    mixed = build_order([500, 200], [1.0, 0.7], window=256)
    assert mixed.ids(7, 3, 0, 10).tolist() == GOLDEN_MIXED
    assert sha256(mixed.ids(7, 3, 0, mixed.epoch_length)) == GOLDEN_MIXED_SHA256
    labels = np.arange(20_000) ** 2 % 11
    labels[::100] = 6  # a class of few pictures
    balanced = build_order([15_000, 5_000], [1.0, 0.7], labels, 0.5, 4096)
    assert sha256(balanced.ids(7, 3, 0, balanced.epoch_length)) == GOLDEN_BALANCED_SHA256


# One epoch


@given(plans_of(plain_orders()), st.integers(0, 3))
def test_every_sample_is_read_once_per_epoch(plan: Plan, epoch: int) -> None:
    start = epoch * plan.steps_per_epoch
    seen = read_ids(plan, start, start + plan.steps_per_epoch)
    assert sorted(i for ids in seen.values() for i in ids) == list(range(plan.order.num_samples))


@given(plans, st.data())
def test_a_step_reads_its_slice_of_the_order_on_any_ranks_and_batches(plan: Plan, data: st.DataObject) -> None:
    step = data.draw(st.integers(0, 3 * plan.steps_per_epoch))
    ids = plan.order.ids(plan.seed, plan.epoch_of(step), 0, plan.samples_per_epoch)
    begin = step % plan.steps_per_epoch * plan.global_batch
    assert sorted(read_ids(plan, step, step + 1)[step]) == sorted(ids[begin : begin + plan.global_batch])


@given(plans, st.data())
def test_every_rank_takes_the_same_number_of_micro_steps(plan: Plan, data: st.DataObject) -> None:
    step = data.draw(st.integers(0, 2 * plan.steps_per_epoch))
    counts = {len(list(plan.micro_batches(rank, step, step + 1))) for rank in range(plan.ranks)}
    assert counts == {plan.num_micro_steps(step)}
    assert 1 <= plan.num_micro_steps(step) <= plan.accumulation


@given(st.integers(0, 200), st.integers(1, 16), st.integers(1, 8))
def test_deal_keeps_the_ids_and_pads_with_empty(num_ids: int, ranks: int, micro_batch: int) -> None:
    slots = assign_slots(np.arange(num_ids), ranks, micro_batch)
    assert slots.shape[1:] == (ranks, micro_batch)
    assert slots[slots != EMPTY].tolist() == list(range(num_ids))


@given(plans, st.data())
def test_samples_before_counts_the_samples_of_short_steps(plan: Plan, data: st.DataObject) -> None:
    step = data.draw(st.integers(0, 2 * plan.steps_per_epoch))
    assert plan.samples_before(step) == sum(len(ids) for ids in read_ids(plan, 0, step).values())


# Resuming


@given(plans, st.integers(0, 3), st.data())
def test_a_resume_at_any_step_of_any_epoch_on_any_ranks_reads_the_remaining_samples(
    plan: Plan, epoch: int, data: st.DataObject
) -> None:
    """Any number of ranks that divides the global batch works, with any micro-batch."""
    start = epoch * plan.steps_per_epoch
    step = data.draw(st.integers(start, start + plan.steps_per_epoch))
    stop = start + 2 * plan.steps_per_epoch
    cuts = [n for n in range(1, 17) if plan.global_batch % n == 0]
    ranks = data.draw(st.sampled_from(cuts))
    asked = data.draw(st.integers(1, 25))
    micro_batch, accumulation = refit_batch(plan.global_batch, asked, ranks)
    assert micro_batch <= asked and micro_batch * accumulation * ranks == plan.global_batch
    other = Plan(plan.order, plan.seed, ranks, micro_batch, accumulation)
    resumed = other.resume(plan.state(step))
    assert resumed == step
    expected = {s: sorted(ids) for s, ids in read_ids(plan, start, stop).items() if s >= step}
    assert {s: sorted(ids) for s, ids in read_ids(other, resumed, stop).items()} == expected


@given(plans, st.integers(0, 10**6))
def test_the_state_is_one_small_record(plan: Plan, step: int) -> None:
    state = plan.state(step)
    assert set(state) == {"version", "seed", "epoch", "samples", "global_batch", "index_hash"}
    assert all(isinstance(value, int | str) for value in state.values())
    assert plan.resume(state) == step


def test_a_position_in_other_data_is_refused_with_the_difference() -> None:
    plan = Plan(plain_order(100, index_hash="one"), seed=1, ranks=2, micro_batch=2, accumulation=2)
    other = Plan(plain_order(100, index_hash="two"), seed=2, ranks=2, micro_batch=2, accumulation=4)
    with pytest.raises(CheckpointError) as raised:
        other.resume(plan.state(3))
    message = str(raised.value)
    for part in ("seed was 1 and is now 2", "global_batch was 8 and is now 16", "index_hash was "):
        assert part in message
    assert plan.order.fingerprint in message and other.order.fingerprint in message


@pytest.mark.parametrize(
    "state",
    [
        {"epoch": 0},
        Plan(plain_order(10), 0, 1, 4, 1).state(1) | {"samples": "4"},
        Plan(plain_order(10), 0, 1, 4, 1).state(1) | {"epoch": -1},
        Plan(plain_order(10), 0, 1, 4, 1).state(1) | {"samples": 3},
        Plan(plain_order(10), 0, 1, 4, 1).state(1) | {"samples": 10**9},
        "nonsense",
    ],
)
def test_a_malformed_position_is_refused(state) -> None:
    with pytest.raises(CheckpointError, match="malformed"):
        Plan(plain_order(10), 0, 1, 4, 1).resume(state)


def test_a_world_size_that_does_not_divide_the_global_batch_is_refused_with_those_that_do() -> None:
    with pytest.raises(RecipeError, match=r"use one of \[1, 2, 4, 8\] ranks"):
        accumulation_for(32, 4, 3)
    with pytest.raises(RecipeError, match=r"set train\.micro_batch_size to a divisor of 32"):
        accumulation_for(32, 5, 1)
    with pytest.raises(RecipeError, match=r"use one of \[1, 2, 4, 8, 16, 32\] ranks"):
        refit_batch(32, 4, 3)


# The shuffle and its window


@given(st.integers(1, 2000), st.integers(1, 700), st.integers(0, 5), st.data())
def test_a_shuffle_read_in_pieces_is_one_permutation(size: int, window: int, epoch: int, data: st.DataObject) -> None:
    whole = Shuffle(size, window, 3, epoch).take(0, size)
    assert sorted(whole.tolist()) == list(range(size))
    start = data.draw(st.integers(0, size))
    stop = data.draw(st.integers(start, size))
    assert Shuffle(size, window, 3, epoch).take(start, stop).tolist() == whole[start:stop].tolist()


@given(st.integers(0, 20))
def test_a_window_reads_only_long_runs(epoch: int) -> None:
    size, window = 100_003, 6400
    shuffle = Shuffle(size, window, 1, epoch)
    for start in range(0, size - window, window):
        ids = np.sort(shuffle.take(start, start + window))
        stretches = 1 + int((np.diff(ids) > 1).sum())
        assert len(ids) == window
        assert stretches <= RUNS_PER_WINDOW + 1  # one run may wrap around the end of the set
    assert shuffle.take(0, window).tolist() != sorted(shuffle.take(0, window).tolist())


def test_every_sample_of_a_small_set_is_equally_likely_at_every_place() -> None:
    """Check a chi-squared bound over 4,000 epochs of 8 samples, in windows of 4, 64 and the default size."""
    for window in (4, 64, None):
        counts = np.zeros((8, 8))
        for epoch in range(4000):
            counts[np.arange(8), plain_order(8, window).ids(0, epoch, 0, 8)] += 1
        chi_squared = ((counts - 500) ** 2 / 500).sum()
        assert chi_squared < 100  # 49 degrees of freedom: the mean is 49; a sound shuffle exceeds 100 once in 50,000


def test_epochs_seeds_and_windows_differ() -> None:
    plain = plain_order(1000)
    orders = [
        plain.ids(0, 0, 0, 1000),
        plain.ids(0, 1, 0, 1000),
        plain.ids(1, 0, 0, 1000),
        plain_order(1000, 128).ids(0, 0, 0, 1000),
        plain_order(1000, 128).ids(0, 1, 0, 1000),
    ]
    assert len({tuple(ids.tolist()) for ids in orders}) == len(orders)


@given(st.integers(1, 3000), windows, st.data())
def test_all_places_of_a_window_name_the_same_window(size: int, window: int | None, data: st.DataObject) -> None:
    order = plain_order(size, window)
    place = data.draw(st.integers(0, size - 1))
    start, stop = found = order.window_at(place)
    assert 0 <= start <= place < stop <= size
    assert order.window_at(start) == order.window_at(stop - 1) == found
    assert order.num_windows == len({order.window_at(p) for p in range(size)})
    if window is None or size <= window:
        assert order.num_windows == 1


# Mixing and balance


@given(mixes(), st.integers(0, 5), st.integers(1, 5), st.integers(0, 2**32 - 1))
def test_draws_of_two_samples_of_a_stream_differ_by_at_most_one(mix: Mix, first: int, epochs: int, seed: int) -> None:
    order, streams = mix.order, mix.streams
    drawn = np.zeros((epochs, order.num_samples), dtype=int)
    for epoch in range(epochs):
        ids = order.ids(seed, first + epoch, 0, order.epoch_length)
        drawn[epoch] = np.bincount(ids, minlength=order.num_samples)
    assert drawn.sum() == epochs * order.epoch_length
    for stream in np.unique(streams):
        of_stream = drawn[:, streams == stream]
        assert len(set(of_stream.sum(1))) == 1, "every epoch draws the same number from a stream"
        assert of_stream.sum() > 0, "every stream is drawn from"
        assert np.ptp(of_stream.sum(0)) <= 1


@given(st.integers(1, 400), st.integers(1, 900), st.integers(0, 30))
def test_the_draws_of_a_class_are_spread_over_the_index(size: int, draws: int, epoch: int) -> None:
    counts = _times_drawn(size, draws, epoch)
    assert counts.sum() == draws
    cut = size // 2
    assert abs(counts[:cut].sum() - draws * cut / size) <= 6


@pytest.mark.parametrize("window", [2**13, 2**15])
def test_every_window_holds_folders_and_classes_in_their_share_and_reads_long_runs(window: int) -> None:
    """With runs of one class or one folder, a window would lack entire classes. 15 pictures of one class are no run."""
    sizes = [150_000, 30_000, 20_000]
    labels = np.random.default_rng(0).choice(40, sum(sizes), p=np.arange(1, 41) ** 2 / sum(np.arange(1, 41) ** 2))
    for balance in (0.0, 1.0):
        order = build_order(sizes, [1.0, 0.5, 2.0], labels, balance, window)
        whole = order.ids(0, 1, 0, order.epoch_length)
        share = np.bincount(labels[whole], minlength=40) / len(whole)
        folders = np.bincount(np.searchsorted(np.cumsum(sizes), whole, side="right")) / len(whole)
        times, streams = np.bincount(whole, minlength=sum(sizes)), Mix(sizes, [], labels, balance, None).streams
        assert all(np.ptp(times[streams == stream]) <= 1 for stream in np.unique(streams))
        for place in range(0, order.epoch_length - window, order.epoch_length // 5):
            ids = whole[slice(*order.window_at(place))]
            spread = np.sqrt(share * len(ids))  # the spread of independent draws
            assert (np.abs(np.bincount(labels[ids], minlength=40) - share * len(ids)) < 6 * spread).all()
            of_folder = np.bincount(np.searchsorted(np.cumsum(sizes), ids, side="right")) / len(ids)
            assert np.abs(of_folder - folders).max() < 0.01
            stretches = 1 + int((np.diff(np.unique(ids)) > 300).sum())
            assert stretches <= (RUNS_PER_WINDOW + 1) * len(sizes)


@given(st.integers(1, 3), st.integers(1, 6), st.floats(0.01, 1), st.data())
def test_balanced_draws_are_within_one_of_their_share(
    folders: int, classes: int, balance: float, data: st.DataObject
) -> None:
    count = st.integers(0, 50)
    counts = [[data.draw(count) for _ in range(classes)] for _ in range(folders)]
    counts[0][0] += 1
    weights = [1.0, *(data.draw(st.sampled_from([0.25, 0.5, 3.0])) for _ in range(folders - 1))]
    total = 1000
    draws = np.array(_balanced_draws(counts, weights, balance, total))
    natural = np.array(counts) * np.array(weights)[:, None]
    of_class = natural.sum(0)
    share = natural * np.where(of_class > 0, of_class, 1) ** -balance
    quota = total * share / share.sum()
    assert ((draws > 0) == (np.array(counts) > 0)).all()
    assert (np.abs(draws - quota) < 1 + 1e-9).all()
    assert draws.sum() == total or (draws == 1).any()


def test_a_folder_is_drawn_by_its_weight() -> None:
    order = build_order([600, 300, 10], [1.0, 0.5, 7.0])
    ids = order.ids(0, 0, 0, order.epoch_length)
    assert np.bincount(np.searchsorted([600, 900], ids, side="right")).tolist() == [600, 150, 70]
    assert np.bincount(np.bincount(ids, minlength=910)[:600]).tolist() == [0, 600]
    halves = [set(order.ids(0, e, 0, order.epoch_length).tolist()) & set(range(600, 900)) for e in (0, 1)]
    assert not halves[0] & halves[1]


def test_folders_are_mixed_from_the_first_step_on() -> None:
    ids = build_order([600, 300], [1.0, 1.0]).ids(0, 0, 0, 90)
    assert 15 <= (ids >= 600).sum() <= 45


@pytest.mark.parametrize(("balance", "expected"), [(0.0, [800, 180, 20]), (1.0, [334, 333, 333]), (0.5, None)])
def test_classes_are_balanced(balance: float, expected: list[int] | None) -> None:
    labels = np.repeat([0, 1, 2], [800, 180, 20])
    order = build_order([1000], [1.0], labels, balance)
    counts = np.bincount(labels[order.ids(0, 0, 0, order.epoch_length)])
    share = np.array([800, 180, 20]) ** (1 - balance)
    assert counts.sum() == 1000
    assert np.abs(counts - 1000 * share / share.sum()).max() < 1
    assert expected in (None, counts.tolist())


def test_balance_over_several_folders_counts_a_class_once() -> None:
    labels = np.array([0] * 90 + [1] * 10 + [1] * 50 + [2] * 50)
    order = build_order([100, 100], [1.0, 2.0], labels, 1.0)
    ids = order.ids(0, 0, 0, order.epoch_length)
    assert np.bincount(labels[ids]).tolist() == [100, 100, 100]
    of_class_1 = ids[labels[ids] == 1]
    assert ((of_class_1 >= 100).sum(), len(of_class_1)) == (91, 100)  # 50 · 2 of 50 · 2 + 10


def test_a_class_without_samples_is_no_stream() -> None:
    order = build_order([4], [1.0], np.array([0, 5, 5, 9]), 1.0)
    assert order.epoch_length == 4
    assert set(order.ids(0, 0, 0, 4)) <= {0, 1, 2, 3}


def test_the_fingerprint_depends_on_everything_that_decides_the_order() -> None:
    labels = np.zeros(10, dtype=int)
    different = [
        build_order([10], [1.0], index_hash="a"),
        build_order([10], [1.0], index_hash="b"),
        build_order([5, 5], [1.0, 1.0], index_hash="a"),
        build_order([5, 5], [1.0, 2.0], index_hash="a"),
        build_order([10], [1.0], labels, 0.5, index_hash="a"),
        build_order([10], [1.0], window=5, index_hash="a"),
    ]
    assert len({order.fingerprint for order in different}) == len(different)


# A hundred million


def test_a_hundred_million_samples_are_planned_in_pieces() -> None:
    """Planning the last step does not sort the entire epoch, which would take 800 MB only for the random words."""
    import tracemalloc

    plan = Plan(plain_order(10**8), seed=0, ranks=8, micro_batch=16, accumulation=8)
    step = 4 * plan.steps_per_epoch - 2
    tracemalloc.start()
    ids = plan.ids(plan.resume(plan.state(step)))
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(set(ids.tolist())) == plan.global_batch
    assert peak_bytes < 100 * 2**20
