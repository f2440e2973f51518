"""Training and evaluation from a URL, read in place and staged: the same numbers, each file fetched once, none left.

Here the base goes by its hub name, and lies in the hub's cache: no rank of any command asks the hub for it.
"""

import json
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from bases import put_into_cache
from faulty_server import serving
from running import ROOT, TIMEOUT_S, adapter_bytes, environment, metrics, train, write_recipe

from kfood_dist.data.manifest import load_manifest

NAME = "Someone/Tiny-VL"


@pytest.fixture
def cached(tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The hub name of the tiny model, which lies in the cache of a hub that takes calls and never answers."""
    put_into_cache(tiny_model, tmp_path / "home" / "hub", NAME)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    with socket.create_server(("127.0.0.1", 0)) as hub:
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{hub.getsockname()[1]}")
        yield Path(NAME)
        hub.setblocking(False)
        with pytest.raises(BlockingIOError):  # nobody has called
            hub.accept()


def launch(script: str, *words: object) -> str:
    command = ["bash", str(ROOT / "launch" / script), *map(str, words)]
    done = subprocess.run(
        command, capture_output=True, text=True, env=environment(), cwd=ROOT, timeout=TIMEOUT_S, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


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
    tmp_path: Path, cached: Path, tiny_shards: Path, from_disk: Path, staged: bool
) -> None:
    stage_dir = tmp_path / "node"
    with serving(tiny_shards) as server:
        path = recipe(tmp_path, cached, server.url)
        launch("train.sh", path, "--processes", 2, *(["--stage", stage_dir] if staged else []))
        fetched = dict(server.sent)
    assert [row["loss"] for row in metrics(tmp_path / "run")] == [row["loss"] for row in metrics(from_disk)]
    assert adapter_bytes(tmp_path / "run") == adapter_bytes(from_disk)
    assert server.url in (tmp_path / "run" / "recipe.yaml").read_text()
    for name, key in (("adapter_config.json", "base_model_name_or_path"), ("kfood.json", "base")):
        assert json.loads((tmp_path / "run" / "adapter" / name).read_text())[key] == NAME
    if staged:
        for shard in load_manifest(tiny_shards).shards:
            expected = shard.bytes if shard.split in ("train", "val") else 0
            assert fetched.get(shard.path, 0) == expected, "fetched once for both ranks, and only what is read"
        assert list(stage_dir.iterdir()) == []


def test_an_evaluation_of_a_staged_split_says_the_same(
    tmp_path: Path, cached: Path, tiny_shards: Path, tiny_adapter: Path
) -> None:
    options = ["--split", "test", "--model", cached, "--adapter", tiny_adapter]
    launch("eval.sh", "--processes", 2, "--shards", tiny_shards, *options, "--out", tmp_path / "plain")
    with serving(tiny_shards) as server:
        words = ["--shards", server.url, *options, "--out", tmp_path / "staged", "--stage", tmp_path / "node"]
        launch("eval.sh", "--processes", 2, *words)
    plain, staged = ((tmp_path / name / "predictions.jsonl").read_bytes() for name in ("plain", "staged"))
    assert plain == staged
    assert server.url in (tmp_path / "staged" / "report.json").read_text()
    assert list((tmp_path / "node").iterdir()) == []
