"""Training and evaluation from a URL, read in place and staged: the same numbers, each file fetched once, none left."""

from pathlib import Path

import pytest
from faulty_server import serving
from running import adapter_bytes, evaluate, metrics, train, write_recipe

from kfood_dist.data.manifest import load_manifest


@pytest.fixture(scope="module")
def from_disk(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, tiny_shards: Path) -> Path:
    """The run of two ranks that reads the shards from their folder."""
    folder = tmp_path_factory.mktemp("disk")
    train(recipe(folder, tiny_model, str(tiny_shards)), 2)
    return folder / "run"


def recipe(folder: Path, model: Path, shards: str) -> Path:
    return write_recipe(
        folder / "recipe.yaml",
        model,
        Path("shards"),
        data={"shards": shards, "num_workers": 1},
        train={"zero_stage": 0, "max_steps": 3},
        eval={"every_steps": 3, "split": "val"},
    )


@pytest.mark.parametrize("staged", [False, True])
def test_two_ranks_train_alike_from_a_url_and_from_a_copy_of_it(
    tmp_path: Path, tiny_model: Path, tiny_shards: Path, from_disk: Path, staged: bool
) -> None:
    stage_dir = tmp_path / "node"
    with serving(tiny_shards) as server:
        path = recipe(tmp_path, tiny_model, server.url)
        train(path, 2, words=["--stage", str(stage_dir)] if staged else [])
        fetched = dict(server.sent)
    assert [row["loss"] for row in metrics(tmp_path / "run")] == [row["loss"] for row in metrics(from_disk)]
    assert adapter_bytes(tmp_path / "run") == adapter_bytes(from_disk)
    assert server.url in (tmp_path / "run" / "recipe.yaml").read_text()
    if staged:
        for shard in load_manifest(tiny_shards).shards:
            expected = shard.bytes if shard.split in ("train", "val") else 0
            assert fetched.get(shard.path, 0) == expected, "fetched once for both ranks, and only what is read"
        assert list(stage_dir.iterdir()) == []


def test_an_evaluation_of_a_staged_split_says_the_same(
    tmp_path: Path, tiny_model: Path, tiny_shards: Path, tiny_adapter: Path
) -> None:
    options = ["--split", "test", "--model", tiny_model, "--adapter", tiny_adapter]
    plain = evaluate("--shards", tiny_shards, *options, "--out", tmp_path / "plain", ranks=2)
    with serving(tiny_shards) as server:
        words = ["--shards", server.url, *options, "--out", tmp_path / "staged", "--stage", tmp_path / "node"]
        staged = evaluate(*words, ranks=2)
    assert (plain.status, staged.status) == (0, 0), plain.output + staged.output
    of_plain, of_staged = ((tmp_path / name / "predictions.jsonl").read_bytes() for name in ("plain", "staged"))
    assert of_plain == of_staged
    assert server.url in (tmp_path / "staged" / "report.json").read_text()
    assert list((tmp_path / "node").iterdir()) == []
