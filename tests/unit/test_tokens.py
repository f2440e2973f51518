"""Micro-batches filled by tokens: the same rows, similar lengths, no more places than asked, little padding."""

import json
from collections.abc import Iterator
from itertools import combinations, pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from asking import pictures_of
from hypothesis import given
from hypothesis import strategies as st

from kfood_dist.cli import main
from kfood_dist.config.sections import Train
from kfood_dist.data.batch.collate import Batch, StreamingCollator
from kfood_dist.data.batch.lengths import MOST_PADDING, cut_by_length
from kfood_dist.data.batch.template import Template
from kfood_dist.data.plan.plan import MicroBatch
from kfood_dist.data.shards.reader import open_split
from kfood_dist.data.task.question import QuestionTask
from kfood_dist.model.processor import load_tokenizer
from kfood_dist.system.world import World
from kfood_dist.train.loop import Trainer
from kfood_dist.train.run.monitor import StepMeter

NUM, WHOLE = 48, MicroBatch(0, 0, tuple(range(48)), 0)


@pytest.fixture(scope="module")
def collator(tmp_path_factory: pytest.TempPathFactory, pictures: Path, tiny_model: Path) -> StreamingCollator:
    """Questions of one to three pictures, whose texts have from a few words to two hundred."""
    folder = tmp_path_factory.mktemp("mixed")
    paths = [path.relative_to(pictures).as_posix() for path in sorted(pictures.rglob("Img_*"))]
    random = np.random.default_rng(0)
    rows = []
    for i in range(NUM):
        words = int(random.lognormal(3.0, 1.0)) % 200
        shown = [paths[(i + n) % len(paths)] for n in range(1 + i % 3)]
        rows.append({"images": shown, "question": f"{i} " + "무엇 " * words, "answer": "답 " * (1 + i % 9)})
    (folder / "list.jsonl").write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows))
    words = ["--image-root", str(pictures), "--split", "1,0,0"]
    assert main(["pack", str(folder / "list.jsonl"), str(folder / "out"), *words]) == 0
    samples = open_split(folder / "out", "train")
    template = Template(load_tokenizer(str(tiny_model)), pictures_of(tiny_model), 1000)
    return StreamingCollator(samples, template, QuestionTask("", "{question}"), unreadable="refuse")


def padding(batches: list[Batch]) -> float:
    return 1 - sum(batch.num_tokens for batch in batches) / sum(batch.input_ids.numel() for batch in batches)


def test_every_sample_is_in_one_batch_and_is_the_row_that_it_is_alone(collator: StreamingCollator) -> None:
    batches = collator.cut(WHOLE, 4000)
    assert sorted(i for batch in batches for i in batch.ids) == list(range(NUM))
    for batch in batches:
        first_picture = 0
        for row, i in enumerate(batch.ids):
            alone = collator[MicroBatch(0, 0, (i,), 0)]
            length, num_pictures = alone.input_ids.shape[1], len(alone.shapes["image_grid_thw"])
            for name in ("input_ids", "labels", "is_image", "attention_mask"):
                assert torch.equal(getattr(batch, name)[row, :length], getattr(alone, name)[0]), (i, name)
            assert not batch.attention_mask[row, length:].any()
            patches = slice(256 * first_picture, 256 * (first_picture + num_pictures))
            assert torch.equal(batch.pixels[patches], alone.pixels)
            assert torch.equal(batch.facts["position_ids"][:, row, :length], alone.facts["position_ids"][:, 0])
            first_picture += num_pictures


@pytest.mark.parametrize("num_tokens", [1500, 4000, 10**6])
def test_batches_have_at_most_so_many_places_and_little_padding(collator: StreamingCollator, num_tokens: int) -> None:
    batches = collator.cut(WHOLE, num_tokens)
    assert all(batch.input_ids.numel() <= num_tokens for batch in batches)
    in_order = [collator[MicroBatch(0, 0, tuple(range(i, i + 6)), 0)] for i in range(0, NUM, 6)]
    assert padding(batches) < 0.08 < 0.25 < padding(in_order)


@given(st.lists(st.integers(1, 300), min_size=1, max_size=9), st.integers(1, 1500))
def test_no_other_cut_has_as_few_batches_and_less_padding(lengths: list[int], num_tokens: int) -> None:
    lengths = sorted(lengths)

    def places(cut: list[tuple[int, int]]) -> int:
        return sum((stop - start) * lengths[stop - 1] for start, stop in cut)

    def is_allowed(cut: list[tuple[int, int]]) -> bool:
        return all(stop - start == 1 or (stop - start) * lengths[stop - 1] <= num_tokens for start, stop in cut)

    def cuts(number: int) -> Iterator[list[tuple[int, int]]]:
        for inner in combinations(range(1, len(lengths)), number - 1):
            yield list(pairwise([0, *inner, len(lengths)]))

    mine = list(cut_by_length(lengths, num_tokens))
    assert is_allowed(mine) and 1 - sum(lengths) / places(mine) < MOST_PADDING + 1e-9
    assert places(mine) == min(places(cut) for cut in cuts(len(mine)) if is_allowed(cut))
    fewer = [cut for number in range(1, len(mine)) for cut in cuts(number) if is_allowed(cut)]
    assert all(1 - sum(lengths) / places(cut) > MOST_PADDING - 1e-9 for cut in fewer)


def test_many_samples_are_cut_in_runs() -> None:
    lengths = sorted(np.random.default_rng(0).integers(50, 500, 5000).tolist())
    cut = list(cut_by_length(lengths, 8000))
    assert [start for start, _ in cut[1:]] == [stop for _, stop in cut[:-1]]
    assert (cut[0][0], cut[-1][1]) == (0, 5000)
    assert all((stop - start) * lengths[stop - 1] <= 8000 for start, stop in cut)


def test_a_sample_longer_than_the_limit_is_a_batch_of_its_own(collator: StreamingCollator) -> None:
    assert [len(batch.ids) for batch in collator.cut(WHOLE, 1)] == [1] * NUM


def test_skipped_samples_are_named_once_and_a_filler_takes_the_place_of_all(collator: StreamingCollator) -> None:
    def cut(max_length: int) -> list[Batch]:
        template = Template(collator.template.tokenizer, collator.template.pictures, max_length)
        return StreamingCollator(collator.shards, template, collator.task, unreadable="refuse").cut(WHOLE, 500)

    batches = cut(150)  # three pictures do not fit
    assert len(batches) > 1
    assert [len(batch.refused) for batch in batches] == [NUM // 3] + [0] * (len(batches) - 1)
    [filler] = cut(66)  # 64 image tokens, and their start and end tokens
    assert (filler.ids, filler.num_label_tokens, len(filler.refused)) == ((), 0, NUM)


def test_a_filler_of_a_batch_has_no_labels_and_no_samples(collator: StreamingCollator) -> None:
    batch = collator[MicroBatch(0, 0, (0, 1), 0)]
    filler = batch.without_labels()
    assert (filler.num_label_tokens, filler.targets.numel(), filler.ids, filler.refused) == (0, 0, (), ())
    assert torch.equal(filler.input_ids, batch.input_ids) and batch.num_label_tokens > 0


def test_a_rank_with_fewer_micro_batches_than_another_gets_fillers(collator: StreamingCollator) -> None:
    class OtherHasFive(World):
        def all_max(self, values: torch.Tensor) -> torch.Tensor:
            return values.clamp(min=5)

    mine = collator.cut(MicroBatch(0, 0, (0, 1, 2, 3), 0), 400)
    run: Any = SimpleNamespace(
        recipe=SimpleNamespace(train=Train(tokens_per_micro_batch=400)),
        world=OtherHasFive(),
        device=torch.device("cpu"),
    )
    read = Trainer._read(run, iter([mine]), StepMeter())
    assert len(mine) < 5 == len(read)
    assert read[: len(mine)] == mine
    smallest = min(batch.input_ids.numel() for batch in mine)
    assert all(b.num_label_tokens == 0 and b.input_ids.numel() == smallest for b in read[len(mine) :])
