"""A rank that is killed, wherever it is, takes the job down; a rank that stalls is named; a new start resumes."""

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from running import adapter_bytes, launch, metrics, start, train, write_recipe
from whole import WHOLE_STEPS, Whole

STEPS = WHOLE_STEPS


def write(folder: Path, model: Path, shards: Path, **train_section) -> Path:
    folder.mkdir()
    section = {"max_steps": STEPS, "save_every_steps": 2, **train_section}
    return write_recipe(folder / "recipe.yaml", model, shards, train=section)


def rank(process: "subprocess.Popen[str]", number: int) -> psutil.Process:
    """The process of one rank: the first of those with this RANK, which has the loader processes as children."""
    for child in psutil.Process(process.pid).children(recursive=True):
        try:
            if child.environ().get("RANK") == str(number):
                return child
        except (psutil.NoSuchProcess, psutil.ZombieProcess):
            continue
    raise AssertionError(f"no rank {number}")


def wait_until(process: "subprocess.Popen[str]", there: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 240
    while not there():
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[0]
        time.sleep(0.002)


def num_steps(run: Path) -> int:
    return len((run / "metrics.jsonl").read_text().splitlines()) if (run / "metrics.jsonl").is_file() else 0


def test_a_rank_killed_in_a_step_a_collective_and_a_checkpoint(
    tmp_path: Path, tiny_model: Path, tiny_shards: Path, whole: Whole
) -> None:
    recipe, run = write(tmp_path / "killed", tiny_model, tiny_shards), tmp_path / "killed" / "run"

    def ends(process: "subprocess.Popen[str]") -> None:
        """The other ranks end too, within a minute, and the status says that it failed."""
        ranks = psutil.Process(process.pid).children(recursive=True)
        output, _ = process.communicate(timeout=60)
        assert process.returncode not in (0, 75), output
        _, alive = psutil.wait_procs(ranks, timeout=10)
        assert not alive

    process = start(recipe, 2)
    wait_until(process, lambda: num_steps(run) == 3)  # in the fourth step
    rank(process, 1).kill()
    ends(process)

    process = start(recipe, 2)
    wait_until(process, lambda: num_steps(run) == 5)
    rank(process, 0).suspend()
    time.sleep(1)  # rank 1 now waits for it in a collective
    rank(process, 1).kill()
    rank(process, 0).resume()
    ends(process)

    process = start(recipe, 2)
    wait_until(process, lambda: any((run / "checkpoints").glob(".step-*.partial")))
    rank(process, 0).kill()
    ends(process)

    train(recipe, 2)
    assert [row["loss"] for row in metrics(run)] == [row["loss"] for row in metrics(whole(2, 2))]
    assert adapter_bytes(run) == adapter_bytes(whole(2, 2))


@pytest.mark.parametrize("number", [0, 1])
def test_a_rank_that_stalls_ends_the_job_and_is_named(
    tmp_path: Path, tiny_model: Path, tiny_shards: Path, number: int
) -> None:
    recipe = write(tmp_path / "stalled", tiny_model, tiny_shards, max_steps=500, stall_timeout_s=30)
    run = tmp_path / "stalled" / "run"
    process = start(recipe, 2)
    wait_until(process, lambda: num_steps(run) == 3)
    os.kill(rank(process, number).pid, signal.SIGSTOP)
    output, _ = process.communicate(timeout=150)
    assert process.returncode not in (0, 75)
    assert f"no progress for 30 s: rank {number} does not answer; it was last at " in output
    assert (run / f"stalled-rank-{1 - number:05d}.txt").is_file()


def test_a_job_that_was_suspended_for_longer_than_a_rank_may_stall_goes_on(
    tmp_path: Path, tiny_model: Path, tiny_shards: Path, whole: Whole
) -> None:
    recipe = write(tmp_path / "suspended", tiny_model, tiny_shards, stall_timeout_s=10)
    run = tmp_path / "suspended" / "run"
    process = start(recipe, 2)
    wait_until(process, lambda: num_steps(run) >= 2)
    everything = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    for one in everything:
        one.suspend()
    time.sleep(14)
    for one in everything:
        one.resume()
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    assert [row["loss"] for row in metrics(run)] == [row["loss"] for row in metrics(whole(2, 2))]


def test_shards_that_vanish_are_named_and_a_new_start_resumes(
    tmp_path: Path, tiny_model: Path, pictures: Path, whole: Whole
) -> None:
    from kfood_dist.cli import main

    shards = tmp_path / "shards"
    assert main(["pack", str(pictures), str(shards), "--split", "0.5,0.2,0.3", "--shard-size", "1"]) == 0
    recipe = write(tmp_path / "vanished", tiny_model, shards, max_steps=40, micro_batch_size=1)
    run = tmp_path / "vanished" / "run"
    process = start(recipe, 2)
    wait_until(process, lambda: num_steps(run) >= 2)
    shutil.move(shards, tmp_path / "away")
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 1, output
    assert str(shards) in output and "Traceback" not in output
    process = start(recipe, 2)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 2 and "does not exist" in output
    shutil.move(tmp_path / "away", shards)
    assert "resumed after step" in train(recipe, 2)


def test_the_newest_checkpoint_is_the_one_of_most_steps_whatever_the_clocks_say(
    tmp_path: Path, tiny_model: Path, tiny_shards: Path
) -> None:
    """Nodes disagree about the time: files from the future, and the newest of them the oldest by its date."""
    recipe = write(tmp_path / "clocks", tiny_model, tiny_shards, max_steps=4, zero_stage=0)
    run = tmp_path / "clocks" / "run"
    train(recipe, 1)
    for age, folder in enumerate(sorted((run / "checkpoints").iterdir())):
        for path in [folder, *folder.rglob("*")]:
            os.utime(path, (2**32 - age * 10**8,) * 2)
    assert "resumed after step 4" in train(recipe, 1, ["train.max_steps=5"])


OTHERWISE = """
import os, socket, time

behind_s = float(os.environ["BEHIND_S"]) * (1 + int(os.environ.get("RANK", 0)))
now, now_ns, name = time.time, time.time_ns, os.environ["HOST_NAME"] + "-" + os.environ.get("RANK", "launcher")
time.time = lambda: now() - behind_s
time.time_ns = lambda: now_ns() - int(behind_s * 10**9)
socket.gethostname = lambda: name
"""


def test_clocks_that_disagree_and_other_hosts_change_nothing(
    tmp_path: Path, tiny_model: Path, tiny_shards: Path, whole: Whole, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ranks whose clocks are a day apart stop; on hosts of other names, whose clocks are a year behind, they go on."""
    (tmp_path / "sitecustomize.py").write_text(OTHERWISE)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    recipe, run = write(tmp_path / "hosts", tiny_model, tiny_shards), tmp_path / "hosts" / "run"
    monkeypatch.setenv("HOST_NAME", "old")
    monkeypatch.setenv("BEHIND_S", "86400")
    process = start(recipe, 2)
    wait_until(process, lambda: num_steps(run) >= 3)
    (run / "STOP").touch()
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 75, output
    monkeypatch.setenv("HOST_NAME", "new")
    monkeypatch.setenv("BEHIND_S", str(365 * 86_400))
    assert "resumed after step" in launch(recipe, 2)
    times = [row["time"] for row in metrics(run)]
    assert times[0] - times[-1] > 300 * 86_400, "the clocks were not falsified"
    assert [row["loss"] for row in metrics(run)] == [row["loss"] for row in metrics(whole(2, 2))]
    assert adapter_bytes(run) == adapter_bytes(whole(2, 2))
