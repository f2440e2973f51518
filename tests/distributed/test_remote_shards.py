"""Training and evaluation from a URL, read directly or copied first, give the same numbers as from a folder.

A copy fetches each file once and is removed at the end. In the tests of copies the base model has a hub name and is in
the hub's cache, and no rank of any command may ask the hub.
"""

import json
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from bases import put_into_cache
from faulty_server import serving
from running import ROOT, TIMEOUT_S, adapter_bytes, environment, evaluate, metrics, train, write_recipe
from whole import WHOLE_STEPS, Whole

from kfood_dist.data.shards.manifest import load_manifest

NAME = "Someone/Tiny-VL"


@pytest.fixture
def cached(tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Put the tiny model into the cache of a hub that accepts connections and never answers. Yields its hub name."""
    put_into_cache(tiny_model, tmp_path / "home" / "hub", NAME)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    with socket.create_server(("127.0.0.1", 0)) as hub:
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{hub.getsockname()[1]}")
        yield Path(NAME)
        hub.setblocking(False)
        with pytest.raises(BlockingIOError):  # no process has connected
            hub.accept()


def launch(script: str, *words: object) -> str:
    command = ["bash", str(ROOT / "launch" / script), *map(str, words)]
    done = subprocess.run(
        command, capture_output=True, text=True, env=environment(), cwd=ROOT, timeout=TIMEOUT_S, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def recipe(folder: Path, model: Path, shards: str) -> Path:
    return write_recipe(
        folder / "recipe.yaml",
        model,
        Path("shards"),
        data={"shards": shards, "num_workers": 1},
        train={"zero_stage": 0, "max_steps": WHOLE_STEPS},
        eval={"every_steps": WHOLE_STEPS, "split": "val"},
    )


def test_two_ranks_train_the_same_run_from_a_url(
    tmp_path: Path, tiny_model: Path, tiny_shards: Path, whole: Whole
) -> None:
    with serving(tiny_shards) as server:
        train(recipe(tmp_path, tiny_model, server.url), 2)
    assert [row["loss"] for row in metrics(tmp_path / "run")] == [row["loss"] for row in metrics(whole(2, 0))]
    assert adapter_bytes(tmp_path / "run") == adapter_bytes(whole(2, 0))


def test_two_ranks_train_the_same_run_from_a_copy_of_a_url(
    tmp_path: Path, cached: Path, tiny_shards: Path, whole: Whole
) -> None:
    copy_to = tmp_path / "node"
    with serving(tiny_shards) as server:
        launch("train.sh", recipe(tmp_path, cached, server.url), "--processes", 2, "--copy-to", copy_to)
        fetched = dict(server.sent)
    assert [row["loss"] for row in metrics(tmp_path / "run")] == [row["loss"] for row in metrics(whole(2, 0))]
    assert adapter_bytes(tmp_path / "run") == adapter_bytes(whole(2, 0))
    assert server.url in (tmp_path / "run" / "recipe.yaml").read_text()
    for name, key in (("adapter_config.json", "base_model_name_or_path"), ("kfood.json", "base")):
        assert json.loads((tmp_path / "run" / "adapter" / name).read_text())[key] == NAME
    for shard in load_manifest(tiny_shards).shards:
        expected = shard.bytes if shard.split in ("train", "val") else 0
        assert fetched.get(shard.path, 0) == expected, "both ranks must share one fetch, and only the splits they read"
    assert list(copy_to.iterdir()) == []


def test_an_evaluation_of_a_copied_split_gives_the_same_predictions(
    tmp_path: Path, cached: Path, tiny_model: Path, tiny_shards: Path, tiny_adapter: Path
) -> None:
    options = ["--split", "test", "--adapter", tiny_adapter]
    plainly = evaluate(*options, "--model", tiny_model, "--shards", tiny_shards, "--out", tmp_path / "plain", ranks=2)
    assert plainly.status == 0, plainly.output
    options += ["--model", cached]
    with serving(tiny_shards) as server:
        words = ["--shards", server.url, *options, "--out", tmp_path / "copied", "--copy-to", tmp_path / "node"]
        launch("eval.sh", "--processes", 2, *words)
    plain, copied = ((tmp_path / name / "predictions.jsonl").read_bytes() for name in ("plain", "copied"))
    assert plain == copied
    assert server.url in (tmp_path / "copied" / "report.json").read_text()
    assert list((tmp_path / "node").iterdir()) == []
