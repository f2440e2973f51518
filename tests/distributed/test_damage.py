"""A shard that rots after packing ends the run with one clear message, whichever rank and process meets it."""

import shutil
from pathlib import Path

import pytest
from running import start, write_recipe

from kfood_dist.data.plan import Plan
from kfood_dist.data.shards import open_split


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_flipped_byte_on_the_second_rank_is_named(
    tmp_path: Path, tiny_model: Path, tiny_shards: Path, num_workers: int
) -> None:
    shards = shutil.copytree(tiny_shards, tmp_path / "shards")
    split = open_split(shards, "train")
    plan = Plan(len(split), seed=0, ranks=2, micro_batch=2, accumulation=2)
    victim = next(m for m in plan.micro_batches(1, 1, 2)).ids[0]
    tar = shards / split.manifest.shards[0].path
    with open(tar, "r+b") as file:
        file.seek(int(split.index["image_offset"][victim]) + 100)
        byte = file.read(1)[0]
        file.seek(-1, 1)
        file.write(bytes([byte ^ 0xFF]))
    recipe = write_recipe(
        tmp_path / "recipe.yaml", tiny_model, shards, data={"num_workers": num_workers}, train={"zero_stage": 0}
    )
    process = start(recipe, 2)
    output, _ = process.communicate(timeout=200)
    assert process.returncode != 0
    said = [line for line in output.splitlines() if line.startswith("rank 1: ")]
    assert len(said) == 1, output
    assert split.key(victim) in said[0] and tar.name in said[0] and "→" in said[0]
