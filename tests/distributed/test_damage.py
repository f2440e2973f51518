"""Pictures damaged after packing are replaced by the same samples on any number of ranks, counted and named.

Too many of them end the run.
"""

import json
import re
import shutil
from pathlib import Path

import pytest
from running import metrics, train, try_train, write_recipe

from kfood_dist.data.shards.reader import open_split

GLOBAL_BATCH = 8


def rot(shards: Path, *ids: int, name: str = "train") -> list[str]:
    """Invert a byte in the pictures of these samples of a split, and return their keys."""
    split = open_split(shards, name)
    with open(shards / split.manifest.shards_of(name)[0].path, "r+b") as tar:
        for i in ids:
            tar.seek(int(split.index["offset"][i]) + 612)
            byte = tar.read(1)[0]
            tar.seek(-1, 1)
            tar.write(bytes([byte ^ 0xFF]))
    return [split.key(i) for i in ids]


def recipe_for(folder: Path, model: Path, shards: Path, num_workers: int, max_bad_share: float, ranks: int) -> Path:
    folder.mkdir()
    return write_recipe(
        folder / "recipe.yaml",
        model,
        shards,
        data={"num_workers": num_workers, "max_bad_share": max_bad_share},
        lora={"dropout": 0.0},
        model={"precision": "fp32", "quantization": "none"},
        train={
            "zero_stage": 0,
            "micro_batch_size": 2,
            "gradient_accumulation_steps": GLOBAL_BATCH // 2 // ranks,
            "max_steps": 3,
        },
    )


def test_damaged_pictures_are_replaced_counted_and_named_on_one_rank_as_on_two(
    tmp_path: Path, tiny_model: Path, tiny_shards: Path
) -> None:
    shards = shutil.copytree(tiny_shards, tmp_path / "shards")
    keys = rot(shards, 1, 4)
    losses, named = {}, {}
    for ranks, num_workers in ((1, 0), (2, 1)):
        recipe = recipe_for(tmp_path / f"of-{ranks}", tiny_model, shards, num_workers, 0.2, ranks)
        output = train(recipe, ranks)
        rows = metrics(recipe.parent / "run")
        assert (
            sum(row["replaced"] for row in rows) == 2
        )  # three steps of eight samples read nearly every sample, and both of these
        assert [row["samples"] for row in rows] == [8, 16, 24]
        named[ranks] = sorted(re.findall(r"step \d+: \S+ replaced by another sample: .*crc32.*", output))
        losses[ranks] = [row["loss"] for row in rows]
        assert "replaced 1" in output or "replaced 2" in output
    assert [line.split()[2] for line in sorted(named[1], key=lambda line: line.split()[2])] == keys
    assert named[1] == named[2]
    assert losses[1] == pytest.approx(losses[2], rel=1e-5)
    train(recipe, 2, ["train.max_steps=4"])
    for step in (3, 4):  # a resumed run keeps the samples that were already found
        record = json.loads((recipe.parent / f"run/checkpoints/step-{step:08d}/state.json").read_text())
        assert sorted(record["bad"]) == keys


def test_more_damaged_samples_than_allowed_stop_the_run_with_their_list(
    tmp_path: Path, tiny_model: Path, tiny_shards: Path
) -> None:
    shards = shutil.copytree(tiny_shards, tmp_path / "shards")
    keys = rot(shards, 0, 3, 7)
    num_samples = len(open_split(shards, "train"))
    recipe = recipe_for(tmp_path / "of-2", tiny_model, shards, 1, 2 / num_samples, 2)
    ended = try_train(recipe, 2)
    output = ended.output
    assert ended.statuses == (1, 1), output
    message = re.search(
        rf"kfood train: 3 of {num_samples} training samples cannot be read, more than data.max_bad_share", output
    )
    assert message, output
    listed = re.findall(r"^  (train-\d+): .*crc32", output[message.start() :], flags=re.MULTILINE)
    assert listed == keys
    assert "→ look at all of them with `kfood verify`" in output
    assert output.count("training samples cannot be read") == 2  # rank 0's, and rank 1's own line


def test_a_sample_that_validation_skips_counts_as_wrong_and_is_named(
    tmp_path: Path, tiny_model: Path, tiny_shards: Path
) -> None:
    shards = shutil.copytree(tiny_shards, tmp_path / "shards")
    keys = rot(shards, 1, 2, name="val")
    recipe = recipe_for(tmp_path / "of-2", tiny_model, shards, 1, 0.2, 2)
    output = train(recipe, 2, ["eval.every_steps=3", "eval.batch_size=1"])
    named = re.findall(r"^validation: (\S+) skipped: .*crc32", output, flags=re.MULTILINE)
    assert sorted(named) == keys
    measured = re.search(r"step 3  val  .*samples (\d+)", output)
    assert measured and int(measured[1]) == len(open_split(shards, "val"))
