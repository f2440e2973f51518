"""`kfood eval` on two ranks over gloo gives the same bytes as on one, and reports a fault that any rank finds."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest
from running import ROOT, environment, evaluate

from kfood_dist.data.shards.reader import open_split


def launched(
    *words: str | Path, processes: int, timeout_s: float = 180, redirect: str = ""
) -> "subprocess.CompletedProcess[str]":
    """Run `launch/eval.sh` with one thread per rank: the number of threads must not change the sums of this test."""
    command = f'set -o pipefail; bash launch/eval.sh "$@" {redirect}'
    return subprocess.run(
        ["bash", "-c", command, "-", "--processes", str(processes), *map(str, words)],
        capture_output=True,
        encoding="euc-kr",
        env=environment() | {"OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "euc-kr"},
        timeout=timeout_s,
        check=False,
        cwd=ROOT,
    )


@pytest.fixture
def words(tiny_shards: Path, tiny_model: Path, tiny_adapter: Path) -> list[str | Path]:
    return ["--shards", tiny_shards, "--model", tiny_model, "--adapter", tiny_adapter, "--batch-size", "3"]


def test_two_ranks_give_the_same_answers_as_one(words, tiny_shards: Path, tmp_path: Path):
    """In 4-bit and bf16, another batch could round to another answer."""
    done = launched(*words, "--out", tmp_path / "2", processes=2, redirect="| true")  # nothing reads the output
    assert done.returncode == 0, done.stderr
    alone = evaluate(*words, "--out", tmp_path / "1", ranks=1)
    assert alone.status == 0, alone.output
    one, two = (tmp_path / n / "predictions.jsonl" for n in "12")
    assert two.read_bytes() == one.read_bytes()
    keys = [json.loads(line)["key"] for line in two.read_text(encoding="utf-8").splitlines()]
    shards = open_split(tiny_shards, "test")
    assert keys == [shards.key(i) for i in range(len(shards))]
    reports = [json.loads((tmp_path / n / "report.json").read_text(encoding="utf-8")) for n in "12"]
    assert [report["world_size"] for report in reports] == [1, 2]
    for key in ("accuracy", "correct", "images", "wilson_95", "per_class", "confusions", "inputs"):
        assert reports[0][key] == reports[1][key]

    # Two ranks reuse the report of one rank, and neither waits for the other.
    again = evaluate(*words, "--out", tmp_path / "1", ranks=2)
    assert again.status == 0, again.output
    assert again.output.count("reused ") == 1


def test_an_evaluation_may_have_more_ranks_than_batches(words, tmp_path: Path):
    ended = evaluate(*words, "--limit", "2", "--out", tmp_path / "out", ranks=2)
    assert ended.status == 0, ended.output
    assert json.loads((tmp_path / "out" / "report.json").read_text(encoding="utf-8"))["images"] == 2


def test_a_fault_that_only_the_second_rank_finds_is_reported(words, tiny_shards: Path, tmp_path: Path):
    """The second rank's batch has a picture with one inverted bit."""
    copy = shutil.copytree(tiny_shards, tmp_path / "shards")
    shards = open_split(copy, "test")
    tar = next(copy.glob("test-*.tar"))
    data = bytearray(tar.read_bytes())
    data[int(shards.index["offset"][4]) + 612] ^= 1
    tar.write_bytes(bytes(data))
    ended = evaluate(*words, "--shards", copy, "--out", tmp_path / "out", ranks=2)
    assert ended.status != 0
    assert ended.output.count("kfood eval: ") == 1
    assert f"has wrong bytes at {shards.key(4)}" in ended.output
    assert not (tmp_path / "out").exists()
