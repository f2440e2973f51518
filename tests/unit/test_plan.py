"""The order of samples: pure integers, so every property is checked over ranks, batches and resume points."""

import hashlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kfood_dist.data.plan import EMPTY, Plan, accumulation_for, deal, order
from kfood_dist.errors import CheckpointError, RecipeError

GOLDEN = [0, 2, 11, 9, 1, 8, 5, 4, 3, 10, 6, 7]
GOLDEN_SHA256 = "26b0fe0729d6daad947ffacf6e68fbd8631ae03ba14badfd46895fb865fe4d56"

plans = st.builds(
    Plan,
    num_samples=st.integers(1, 300),
    seed=st.integers(0, 2**32 - 1),
    ranks=st.integers(1, 16),
    micro_batch=st.integers(1, 5),
    accumulation=st.integers(1, 5),
)


def read_ids(plan: Plan, start: int, stop: int) -> dict[int, list[int]]:
    """The ids every step reads, gathered from all ranks."""
    seen: dict[int, list[int]] = {step: [] for step in range(start, stop)}
    for rank in range(plan.ranks):
        for micro_batch in plan.micro_batches(rank, start, stop):
            seen[micro_batch.step] += micro_batch.ids
    return seen


def test_the_order_is_golden() -> None:
    """Another order would resume old checkpoints onto other data: it may never change."""
    assert order(0, 0, 12).tolist() == GOLDEN
    digest = hashlib.sha256(order(7, 3, 10_000).astype("<i8").tobytes()).hexdigest()
    assert digest == GOLDEN_SHA256


@given(plans, st.integers(0, 2))
def test_every_sample_once_per_epoch(plan: Plan, epoch: int) -> None:
    start = epoch * plan.steps_per_epoch
    seen = read_ids(plan, start, start + plan.steps_per_epoch)
    assert sorted(i for ids in seen.values() for i in ids) == list(range(plan.num_samples))


@given(plans, st.data())
def test_a_step_sees_its_slice_of_the_order_whatever_the_cut(plan: Plan, data: st.DataObject) -> None:
    step = data.draw(st.integers(0, 2 * plan.steps_per_epoch))
    ids = order(plan.seed, plan.epoch_of(step), plan.num_samples)
    begin = step % plan.steps_per_epoch * plan.global_batch
    assert sorted(read_ids(plan, step, step + 1)[step]) == sorted(ids[begin : begin + plan.global_batch])


@given(plans, st.data())
def test_every_rank_takes_the_same_number_of_micro_steps(plan: Plan, data: st.DataObject) -> None:
    step = data.draw(st.integers(0, 2 * plan.steps_per_epoch))
    counts = {len(list(plan.micro_batches(rank, step, step + 1))) for rank in range(plan.ranks)}
    assert counts == {plan.num_micro_steps(step)}
    assert 1 <= plan.num_micro_steps(step) <= plan.accumulation


@given(plans, st.data())
def test_resuming_at_any_step_reads_what_was_left(plan: Plan, data: st.DataObject) -> None:
    stop = 2 * plan.steps_per_epoch
    step = data.draw(st.integers(0, stop))
    resumed = plan.resume(plan.state(step, "hash"), "hash")
    assert resumed == step
    whole = read_ids(plan, 0, stop)
    assert read_ids(plan, resumed, stop) == {s: ids for s, ids in whole.items() if s >= step}


@given(plans, st.integers(1, 16))
def test_another_number_of_ranks_sees_the_same_global_batches(plan: Plan, ranks: int) -> None:
    if plan.global_batch % (ranks * plan.micro_batch):
        return
    accumulation = accumulation_for(plan.global_batch, plan.micro_batch, ranks)
    other = Plan(plan.num_samples, plan.seed, ranks, plan.micro_batch, accumulation)
    mine, theirs = (read_ids(p, 0, p.steps_per_epoch) for p in (plan, other))
    assert {s: sorted(ids) for s, ids in mine.items()} == {s: sorted(ids) for s, ids in theirs.items()}


@given(st.integers(0, 200), st.integers(1, 16), st.integers(1, 8))
def test_deal_keeps_the_ids_and_pads_with_empty(num_ids: int, ranks: int, micro_batch: int) -> None:
    slots = deal(np.arange(num_ids), ranks, micro_batch)
    assert slots.shape[1:] == (ranks, micro_batch)
    assert slots[slots != EMPTY].tolist() == list(range(num_ids))


@given(plans, st.data())
def test_samples_before_counts_short_steps_as_they_are(plan: Plan, data: st.DataObject) -> None:
    step = data.draw(st.integers(0, 2 * plan.steps_per_epoch))
    assert plan.samples_before(step) == sum(len(ids) for ids in read_ids(plan, 0, step).values())


def test_epochs_and_seeds_differ() -> None:
    assert order(0, 0, 100).tolist() != order(0, 1, 100).tolist()
    assert order(0, 0, 100).tolist() != order(1, 0, 100).tolist()


def test_a_position_in_other_data_is_refused_with_the_difference() -> None:
    plan = Plan(num_samples=100, seed=1, ranks=2, micro_batch=2, accumulation=2)
    other = Plan(num_samples=100, seed=2, ranks=2, micro_batch=2, accumulation=4)
    with pytest.raises(CheckpointError) as raised:
        other.resume(plan.state(3, "one"), "two")
    for part in ("seed was 1 and is now 2", "global_batch was 8 and is now 16", "index_hash was one and is now two"):
        assert part in str(raised.value)


def test_a_malformed_position_is_refused() -> None:
    with pytest.raises(CheckpointError, match="malformed"):
        Plan(10, 0, 1, 1, 1).resume({"epoch": 0}, "hash")


def test_a_world_that_does_not_divide_the_global_batch_is_refused_with_those_that_do() -> None:
    with pytest.raises(RecipeError, match=r"use one of \[1, 2, 4, 8\] ranks"):
        accumulation_for(32, 4, 3)
    with pytest.raises(RecipeError, match=r"let train\.micro_batch_size divide 32"):
        accumulation_for(32, 5, 1)
