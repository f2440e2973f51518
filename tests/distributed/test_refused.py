"""Samples that cannot fit are skipped, named and counted on two ranks, and neither rank stalls."""

import re
from pathlib import Path

import pytest
from asking import asking_dishes, pictures_of
from bases import write_llava
from running import metrics, train, try_train, write_recipe
from sweep import swept

from kfood_dist.data.plan.plan import MicroBatch
from kfood_dist.model.vision import blank

IMAGE_TOKENS = 64 + 2  # a 224 px picture and its start and end tokens


@pytest.mark.parametrize("family", ["qwen2_5_vl", "llava"])
def test_too_long_answers_are_skipped_and_the_run_continues(
    tmp_path: Path, tiny_model: Path, tiny_shards: Path, family: str
) -> None:
    base, kept = tiny_model, IMAGE_TOKENS
    if family == "llava":
        write_llava(base := tmp_path / "llava")
        kept = len(pictures_of(base, 224).encode(blank(224)).ids)
    collator = asking_dishes(base, tiny_shards)
    shards = collator.shards
    lengths = [collator[MicroBatch(0, 0, (i,), 0)].num_label_tokens for i in range(len(shards))]
    limit = min(lengths)  # only the shortest answers fit
    too_long = {shards.key(i) for i, length in enumerate(lengths) if length > limit}
    assert 0 < len(too_long) < len(shards)

    recipe = write_recipe(
        tmp_path / "recipe.yaml",
        base,
        tiny_shards,
        data={"max_length": kept + limit},
        train={"zero_stage": 0, "micro_batch_size": 1, "gradient_accumulation_steps": 3, "max_steps": len(shards) // 6},
    )
    output = train(recipe, 2)
    assert sum(row["refused"] for row in metrics(tmp_path / "run")) == len(too_long)
    named = set(re.findall(r"step \d+: (train-\d+) skipped: ", output))
    assert named == too_long


@pytest.mark.parametrize(
    ("ranks", "stage", "max_steps"), [(1, 0, 2), (2, 2, 4), *swept([(2, 0, 4), (2, 3, 4), (1, 0, 4)])]
)
def test_a_run_without_any_usable_sample_ends_with_the_reason(
    tmp_path: Path, tiny_model: Path, tiny_shards: Path, ranks: int, stage: int, max_steps: int
) -> None:
    """With too many such steps, and with fewer if they are all steps of the run."""
    recipe = write_recipe(
        tmp_path / "recipe.yaml",
        tiny_model,
        tiny_shards,
        data={"max_length": IMAGE_TOKENS + 1},  # the end token alone fits
        train={"zero_stage": stage, "max_steps": max_steps, "max_skipped_steps": max_steps // 4 or 10},
        objective={"name": "answer_mean"},
        eval={"every_steps": 1, "max_samples": 2},
    )
    ended = try_train(recipe, ranks)
    assert ended.status == 1, ended.output
    assert "step 2 skipped: none of its samples can be used, train-" in ended.output
    why = "no step of the run changed the weights" if max_steps == 2 else "steps skipped in a row: 2, more than"
    error = ended.output[ended.output.index(why) :]
    assert "for example: answer and image alone exceed data.max_length" in error
    assert ("→ raise data.max_length, or correct the named samples" in error) and "optim.learning_rate" not in error
    assert "the same command resumes from the newest checkpoint" in error, (
        "validated after step 1, and saved as the best"
    )
    assert "val  loss nan  accuracy 0" in ended.output
    assert [(row["loss"], row["skipped"]) for row in metrics(tmp_path / "run")] == [(None, 1.0)]
    assert not (tmp_path / "run" / "adapter").exists()
