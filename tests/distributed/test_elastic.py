"""A run resumes with another number of ranks and another ZeRO stage, and its loss curve stays the same."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from forked import run_verb
from running import metrics, train, training, write_recipe
from sweep import swept

from kfood_dist.launch.start import main
from kfood_dist.train.run import checkpoint

STEPS, CUT = 6, 3
RANKS_AND_STAGE = tuple[int, int]
KINDS = {
    # The first is a recipe's default. With the second, a resume is exact except for the order of additions.
    "nf4, adamw8bit": ({"quantization": "nf4"}, "adamw8bit"),
    "float32, adamw": ({"quantization": "none", "precision": "fp32"}, "adamw"),
}
RANKS = ((1, 0), (2, 0), (2, 1), (2, 2), (2, 3), (3, 2), (4, 2))
CHANGES = [  # 12 samples a step in micro-batches of one. The sweep runs the other cases.
    ("nf4, adamw8bit", (2, 2), (1, 0)),
    ("nf4, adamw8bit", (2, 2), (3, 2)),
    ("float32, adamw", (2, 3), (3, 2)),
]
SWEPT = [
    (kind, before, after)
    for kind in KINDS
    for before in RANKS
    for after in RANKS
    if before != after and (kind, before, after) not in CHANGES
]


@pytest.fixture(scope="module")
def whole(tmp_path_factory, tiny_model: Path, tiny_shards: Path) -> Callable[[str, RANKS_AND_STAGE], Path]:
    """Return a function that gives the folder of an uninterrupted run, which keeps its checkpoint of step CUT.

    Each run is made when it is first needed.
    """
    made: dict[tuple[str, RANKS_AND_STAGE], Path] = {}

    def get(kind: str, how: RANKS_AND_STAGE) -> Path:
        if (kind, how) not in made:
            model, optimizer = KINDS[kind]
            folder = tmp_path_factory.mktemp("whole")
            recipe = write_recipe(
                folder / "recipe.yaml",
                tiny_model,
                tiny_shards,
                model=model,
                lora={"dropout": 0.0},  # each rank draws its own dropout
                optim={"name": optimizer},
                train={
                    "micro_batch_size": 1,
                    "gradient_accumulation_steps": 12 // how[0],
                    "max_steps": STEPS,
                    "save_every_steps": CUT,
                    "zero_stage": how[1],
                },
            )
            train(recipe, how[0])
            made[kind, how] = folder
        return made[kind, how]

    return get


@pytest.mark.parametrize(
    ("kind", "before", "after"),
    [*CHANGES, *swept(SWEPT)],
    ids=[f"{kind}: {a[0]} ranks zero{a[1]} to {b[0]} ranks zero{b[1]}" for kind, a, b in CHANGES + SWEPT],
)
def test_the_loss_curve_continues_on_other_ranks(
    tmp_path: Path, whole, kind: str, before: RANKS_AND_STAGE, after: RANKS_AND_STAGE
) -> None:
    folder = whole(kind, before)
    run = tmp_path / "run"
    shutil.copytree(folder / "run", run)
    shutil.rmtree(run / "checkpoints" / f"step-{STEPS:08d}")
    shutil.rmtree(run / "adapter")
    ranks, stage = after
    output = train(folder / "recipe.yaml", ranks, [f"run.dir={run}", f"train.zero_stage={stage}"])
    assert f"resumed after step {CUT}" in output
    facts = json.loads((run / "run.json").read_text())
    assert (facts["world_size"], facts["zero_stage"]) == after
    assert facts["gradient_accumulation_steps"] == 12 // ranks  # the global batch is unchanged
    mine, theirs = metrics(run), metrics(folder / "run")
    for name in ("step", "epoch", "samples", "learning_rate"):
        assert [row[name] for row in mine] == [row[name] for row in theirs]
    losses, expected = ([row["loss"] for row in rows] for rows in (mine, theirs))
    assert losses[:CUT] == expected[:CUT]
    # Measured: at most 0.3% in 4 bits. There other kernels round differently, and 8-bit moments are rounded again.
    assert losses == pytest.approx(expected, rel=1e-5 if kind.startswith("float32") else 0.01)
    assert (run / "adapter" / "adapter_model.safetensors").is_file()


def test_a_number_of_ranks_that_does_not_divide_the_batch_is_refused(whole, capsys: pytest.CaptureFixture[str]) -> None:
    folder = whole("nf4, adamw8bit", (1, 0))
    assert main(["train", str(folder / "recipe.yaml"), "--processes", "5", "--set", "train.max_steps=7"]) == 2
    output = capsys.readouterr().err
    assert "a global batch of 12 cannot be cut into micro-batches of 1 on 5 ranks" in output
    assert "use one of [1, 2, 3, 4, 6, 12] ranks" in output


def test_a_run_resumes_repeatedly_with_any_number_of_ranks(tmp_path: Path, tiny_model: Path, tiny_shards: Path) -> None:
    """Like a job that is preempted more than once. The last run has as many ranks as a step has samples."""
    recipe = write_recipe(tmp_path / "recipe.yaml", tiny_model, tiny_shards, train={"save_every_steps": 1})
    cuts = []
    for step, ranks in enumerate((1, 2, 2, 4), start=1):
        output = train(recipe, ranks, [f"train.max_steps={step}", f"train.zero_stage={2 if ranks > 1 else 0}"])
        assert step == 1 or f"resumed after step {step - 1}" in output
        facts = json.loads((tmp_path / "run" / "run.json").read_text())
        assert facts["global_batch"] == 4
        cuts.append((facts["world_size"], facts["gradient_accumulation_steps"]))
    assert cuts == [(1, 2), (2, 1), (2, 1), (4, 1)]
    assert [row["samples"] for row in metrics(tmp_path / "run")] == [4, 8, 12, 16]


def run_blind(words: list[str]) -> int:
    """Run `kfood WORDS` in a rank. All ranks except rank 0 see no checkpoint."""
    if os.environ["RANK"] != "0":
        checkpoint.newest = lambda folder: None
    return run_verb(words)


def test_ranks_that_see_different_checkpoints_are_refused_at_once(
    tmp_path: Path, tiny_model: Path, tiny_shards: Path
) -> None:
    """As if each node had its own run directory: here rank 1 sees no checkpoint."""
    recipe = write_recipe(tmp_path / "recipe.yaml", tiny_model, tiny_shards, train={"max_steps": 1, "zero_stage": 0})
    train(recipe, 2)
    with training(recipe, 2, ["train.max_steps=2"], work=run_blind) as ranks:
        ended = ranks.wait(120)
    assert ended.status == 2, ended.output
    assert "rank 1 sees another run than rank 0: newest checkpoint none there, step 1 here" in ended.output
    assert len(metrics(tmp_path / "run")) == 1
