"""Several packed folders read as one, and `kfood order`, which prints the samples that training reads."""

import pickle
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from orders import plain_order
from page_cache import drop_pages, resident_share, settled

from kfood_dist.cli import main
from kfood_dist.config.recipe import build_data
from kfood_dist.config.sections import Data, Train
from kfood_dist.data.mix import Mixture, build_data_order, open_mixture, read_ahead
from kfood_dist.data.plan.plan import Plan
from kfood_dist.data.shards.reader import open_split
from kfood_dist.errors import RecipeError, ShardError
from kfood_dist.practice.pictures import DISHES, write_pictures
from kfood_dist.system.world import World
from kfood_dist.train.loop import Trainer


@pytest.fixture(scope="module")
def others(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """18 pictures of three dishes; two of the dishes are also in `tiny_shards`."""
    folder = tmp_path_factory.mktemp("others")
    list(write_pictures(folder / "pictures", DISHES[-5:-2], 6, seed=9))
    assert main(["pack", str(folder / "pictures"), str(folder / "more"), "--split", "0.7,0.15,0.15"]) == 0
    return folder / "more"


@pytest.fixture
def mixture(tiny_shards: Path, others: Path) -> Mixture:
    return open_mixture(build_data({"shards": str(tiny_shards), "mix": [{"shards": str(others)}]}, "data"), "train")


def test_a_mixture_reads_the_same_samples_as_its_parts(mixture: Mixture, tiny_shards: Path, others: Path) -> None:
    first, second = open_split(tiny_shards, "train"), open_split(others, "train")
    assert len(mixture) == len(first) + len(second)
    ids = [len(first) + 1, 0, len(mixture) - 1, 3, len(first) - 1, len(first)]
    parts = [(second, 1), (first, 0), (second, len(second) - 1), (first, 3), (first, len(first) - 1), (second, 0)]
    assert mixture.read_many(ids) == [part.read(i) for part, i in parts]
    for i, (part, local) in zip(ids, parts, strict=True):
        assert mixture.read(i) == part.read(local)
        assert part.read(local).columns["label"] == mixture.classes[mixture.labels()[i]].name
        assert mixture.key(i) == f"{part.manifest.name}/{part.key(local)}"
    copy = pickle.loads(pickle.dumps(mixture))
    assert copy.read_many(ids) == mixture.read_many(ids)


def test_classes_of_the_same_name_are_merged(mixture: Mixture, tiny_shards: Path, others: Path) -> None:
    names = [dish.name for dish in mixture.classes]
    ours = [dish.name for dish in open_split(tiny_shards, "train").classes]
    theirs = [dish.name for dish in open_split(others, "train").classes]
    assert set(ours) & set(theirs)
    assert len(names) == len(set(names)) == len({*ours, *theirs})
    assert names[: len(ours)] == ours


def test_folders_of_another_size_or_resizing_are_refused(tmp_path: Path, pictures: Path, tiny_shards: Path) -> None:
    for option, value, fault in (("--image-size", "56", "image_size 56, "), ("--resize", "crop", "resize crop, ")):
        other = tmp_path / value
        assert main(["pack", str(pictures), str(other), option, value]) == 0
        data = build_data({"shards": str(tiny_shards), "mix": [{"shards": str(other)}]}, "data")
        with pytest.raises(ShardError, match=rf"was packed with {fault}.* → pack it again with {option} "):
            open_mixture(data, "train")


def test_the_same_samples_twice_are_refused(tmp_path: Path, tiny_shards: Path, others: Path) -> None:
    copy = shutil.copytree(tiny_shards, tmp_path / "copy")
    mix = [{"shards": str(others)}, {"shards": str(copy)}]
    with pytest.raises(ShardError, match=r"copy hold the same samples → name them once.* raise the weight"):
        open_mixture(build_data({"shards": str(tiny_shards), "mix": mix}, "data"), "train")


def test_folders_of_the_same_name_have_different_keys(tmp_path: Path, tiny_shards: Path, others: Path) -> None:
    alike = shutil.copytree(others, tmp_path / tiny_shards.name)
    mixture = open_mixture(build_data({"shards": str(tiny_shards), "mix": [{"shards": str(alike)}]}, "data"), "train")
    first = len(mixture.parts[0])
    assert [mixture.key(i) for i in (first, 0)] == [f"{alike}/train-00000000", f"{tiny_shards}/train-00000000"]


def test_a_sample_has_the_same_key_in_all_processes(
    tmp_path: Path, tiny_shards: Path, others: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A copy for a loader process knows its folders by absolute paths, even if a path of the mixture is relative."""
    monkeypatch.chdir(tiny_shards.parent)
    alike = shutil.copytree(others, tmp_path / tiny_shards.name)
    for other in (others, alike):
        mixture = open_mixture(
            build_data({"shards": tiny_shards.name, "mix": [{"shards": str(other)}]}, "data"), "train"
        )
        unasked = pickle.loads(pickle.dumps(mixture))
        assert unasked.key(0) == mixture.key(0) == pickle.loads(pickle.dumps(mixture)).key(0)


def test_a_mixture_of_one_folder_equals_that_folder(tiny_shards: Path) -> None:
    mixture = open_mixture(build_data({"shards": str(tiny_shards)}, "data"), "train")
    assert mixture.key(3) == open_split(tiny_shards, "train").key(3)
    assert mixture.index_hash == open_split(tiny_shards, "train").index_hash


@pytest.mark.parametrize("global_batch", [8, 24, 64, 200, 1500])
@pytest.mark.parametrize("epochs", [(0, 1), (1, 3)])
def test_each_window_is_read_ahead_once_and_in_long_runs(global_batch: int, epochs: tuple[int, int]) -> None:
    order = plain_order(1000, window=128)  # eight windows; the last one is short
    plan = Plan(order, seed=0, ranks=1, micro_batch=global_batch // 2, accumulation=2)
    start, stop = (epoch * plan.steps_per_epoch for epoch in epochs)
    start += plan.steps_per_epoch // 2
    asked: list[int] = []
    used = 0
    asking = read_ahead(plan.micro_batches(0, start, stop), plan, start, stop, lambda ids: asked.extend(ids.tolist()))
    first_window = order.window_at(plan.samples_before(start) % 1000)[0]
    for micro_batch in asking:
        used += len(micro_batch.ids)
        assert set(micro_batch.ids) <= set(asked)
        assert len(asked) <= used + global_batch + 3 * 128, "at most this window and the next are read ahead"
    whole = [
        sorted(order.ids(0, epoch, *order.window_at(place)).tolist())
        for epoch in range(start // plan.steps_per_epoch, epochs[1])
        for place in range(0, 1000, 128)
    ]
    expected = [i for window in whole for i in window][first_window:]
    assert asked == expected  # every window to the end, each in the order of the index, and no sample twice


@pytest.mark.parametrize(("local_rank", "window", "asks"), [(0, 128, True), (1, 128, False), (0, 1024, False)])
def test_one_rank_per_node_reads_ahead_if_an_epoch_has_several_windows(
    monkeypatch: pytest.MonkeyPatch, local_rank: int, window: int, asks: bool
) -> None:
    asked: list[int] = []
    monkeypatch.setattr("kfood_dist.data.plan.sampling.DEFAULT_WINDOW", window)
    monkeypatch.setattr("kfood_dist.train.loop.stream", lambda _, requests, *__, **___: (asked for asked in requests))
    run = SimpleNamespace(
        recipe=SimpleNamespace(data=Data(shards="here"), train=Train()),
        world=World(local_rank, 2, local_rank),
        plan=Plan(plain_order(1000), seed=0, ranks=2, micro_batch=4, accumulation=2),
        max_steps=3,
        collator=SimpleNamespace(shards=SimpleNamespace(will_need=asked.extend)),
        device=torch.device("cpu"),
    )
    assert sum(map(len, Trainer._steps(run, 0))) == 6
    assert (len(asked) >= 128) is asks


def test_nothing_is_read_ahead_if_an_epoch_is_one_window() -> None:
    assert list(Plan(plain_order(1000), 0, 1, 4, 2).windows_to_prefetch(0, 300)) == []


def test_will_need_brings_the_files_into_the_page_cache(mixture: Mixture) -> None:
    tars = [part.manifest.folder / shard.path for part in mixture.parts for shard in part.manifest.shards_of("train")]
    for tar in tars:
        drop_pages(tar)
    mixture.will_need(np.arange(len(mixture)))
    for tar in tars:
        assert settled(lambda tar=tar: resident_share(tar, 0, tar.stat().st_size), 0.9) >= 0.9  # type: ignore[misc]


# kfood order


def printed(capsys: pytest.CaptureFixture[str], *words: str) -> list[list[str]]:
    assert main(["order", *words]) == 0
    header, *lines = capsys.readouterr().out.splitlines()
    assert header == "step, micro_step, rank, key"
    return [line.split(", ") for line in lines]


def test_order_prints_every_sample_once_on_any_number_of_ranks(
    capsys: pytest.CaptureFixture[str], tiny_shards: Path
) -> None:
    num_samples = len(open_split(tiny_shards, "train"))
    cuts = ((1, 8, 1), (2, 2, 2), (4, 1, 2), (8, 1, 1), (1, 1, 8))
    by_step = []
    for ranks, micro_batch, accumulation in cuts:
        lines = printed(
            capsys, str(tiny_shards), "--seed", "3", "--epoch", "2", "--ranks", str(ranks),
            "--micro-batch", str(micro_batch), "--accumulation", str(accumulation),
        )  # fmt: skip
        assert len({key for *_, key in lines}) == len(lines) == num_samples
        by_step.append({step: sorted(key for s, _, _, key in lines if s == step) for step, *_ in lines})
    assert all(steps == by_step[0] for steps in by_step)


def test_order_prints_what_training_and_a_resumed_run_read(
    capsys: pytest.CaptureFixture[str], tiny_shards: Path
) -> None:
    options = [str(tiny_shards), "--seed", "5", "--epoch", "1", "--ranks", "2", "--micro-batch", "3"]
    lines = printed(capsys, *options)
    mixture = open_mixture(build_data({"shards": str(tiny_shards)}, "data"), "train")
    plan = Plan(build_data_order(mixture, build_data({"shards": str(tiny_shards)}, "data")), 5, 2, 3, 1)
    first = plan.steps_per_epoch
    expected = {
        (step - first, rank): [mixture.key(int(i)) for i in slots[0, rank] if i >= 0]
        for step, slots in plan.slots(first, 2 * first)
        for rank in range(2)
    }
    for (step, rank), keys in expected.items():
        assert [key for s, _, r, key in lines if (int(s), int(r)) == (step, rank)] == keys
    assert printed(capsys, *options, "--start", "2") == [line for line in lines if int(line[0]) >= 2]
    assert printed(capsys, *options, "--start", "1", "--steps", "2") == [line for line in lines if line[0] in "12"]


def test_order_mixes_and_balances_as_a_recipe_does(
    capsys: pytest.CaptureFixture[str], tiny_shards: Path, others: Path
) -> None:
    words = [str(tiny_shards), "--mix", f"{others}=2", "--class-balance", "1", "--window", "70"]
    keys = [key for *_, key in printed(capsys, *words)]
    source = {"shards": str(tiny_shards), "mix": [{"shards": str(others), "weight": 2}]}
    data = build_data(source | {"class_balance": 1, "shuffle_window": 70}, "data")
    mixture = open_mixture(data, "train")
    order = build_data_order(mixture, data)
    assert keys == [mixture.key(int(i)) for i in order.ids(0, 0, 0, order.epoch_length)]
    assert {key.split("/")[0] for key in keys} == {tiny_shards.name, others.name}


@pytest.mark.parametrize(
    ("words", "fault"),
    [
        (["--ranks", "0"], "must be at least 1"),
        (["--steps", "-1"], "at least 0"),
        (["--seed", str(2**32)], "--seed and --epoch must be 0 to 4,294,967,295"),
        (["--seed", "-1"], "--seed and --epoch must be 0 to 4,294,967,295"),
        (["--epoch", str(2**64)], "--epoch"),
        (["--start", "48"], "--start 48 is beyond the epoch, which has"),
        (["--ranks", str(10**12)], "at most 16,777,216"),
        (["--micro-batch", str(10**12)], "at most 16,777,216"),
        (["--mix", "more=1e18"], "mix.0.weight: input should be less than or equal to 1000"),
        (["--class-balance", "2"], "class_balance: input should be less than or equal to 1"),
        (["--window", "0"], "shuffle_window: input should be greater than or equal to 1"),
        (["--mix", "more"], "--mix more has no weight → write it as --mix DIR=WEIGHT"),
        (["--mix", "more=much"], "mix.0.weight: input should be a valid number"),
        (["--mix", "more=0"], "mix.0.weight: input should be greater than 0"),
        (["--mix", "more=1e300"], "mix.0.weight: input should be less than or equal to 1000"),
        (["--mix", "nowhere=1"], "shard folder nowhere does not exist"),
        (["--split", "holdout"], "no samples in split 'holdout'"),
    ],
)
def test_order_refuses_wrong_options_with_the_remedy(
    capsys: pytest.CaptureFixture[str], tiny_shards: Path, words: list[str], fault: str
) -> None:
    assert main(["order", str(tiny_shards), *words]) == 2
    message = capsys.readouterr().err
    assert fault in message and message.startswith("kfood order: ")
    assert "→" in message


def test_a_closed_pipe_is_no_error(tiny_shards: Path) -> None:
    command = [sys.executable, "-m", "kfood_dist", "order", str(tiny_shards), "--class-balance", "0.5"]
    done = subprocess.run(
        ["bash", "-c", 'set -o pipefail; "$@" | true', "-", *command], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_a_wrong_key_in_a_mixed_source_is_reported_with_the_right_one() -> None:
    with pytest.raises(RecipeError, match=r"mix.0.wieght: no such key; did you mean weight\?"):
        build_data({"shards": "a", "mix": [{"shards": "b", "wieght": 1}]}, "data")


def test_a_folder_copied_elsewhere_gives_the_same_order(tmp_path: Path, tiny_shards: Path) -> None:
    elsewhere = shutil.copytree(tiny_shards, tmp_path / "elsewhere")
    orders = [
        build_data_order(open_mixture(data, "train"), data)
        for data in (build_data({"shards": str(where)}, "data") for where in (tiny_shards, elsewhere))
    ]
    assert orders[0].fingerprint == orders[1].fingerprint


def test_weights_balance_and_window_of_a_recipe_decide_what_an_epoch_draws(tiny_shards: Path, others: Path) -> None:
    def drawn(balance: float) -> list[tuple[str, str]]:
        """Return the folder and the class of each draw of an epoch."""
        tree = {"shards": str(tiny_shards), "mix": [{"shards": str(others), "weight": 2}], "class_balance": balance}
        data = build_data(tree | {"shuffle_window": 16}, "data")
        mixture = open_mixture(data, "train")
        order = build_data_order(mixture, data)
        assert order.window == 16
        ids = order.ids(0, 0, 0, order.epoch_length).tolist()
        return [(mixture.key(i).split("/")[0], mixture.read(i).columns["label"]) for i in ids]

    folders = Counter(folder for folder, _ in drawn(0))
    assert folders == {d.name: n * len(open_split(d, "train")) for d, n in ((tiny_shards, 1), (others, 2))}
    natural, balanced = (Counter(dish for _, dish in drawn(balance)).values() for balance in (0, 1))
    assert max(natural) >= 1.5 * min(natural)
    assert max(balanced) - min(balanced) <= 2
