"""A killed rank ends the job at any point, a stalled rank is named, and a new start resumes."""

import os
import shutil
import signal
import socket
import subprocess
import time
from functools import partial
from pathlib import Path

import psutil
import pytest
from forked import run_verb
from running import adapter_bytes, metrics, num_steps, start, train, training, wait_until, write_recipe
from whole import WHOLE_STEPS, Whole

from kfood_dist.cli import main
from kfood_dist.launch import start as launch

STEPS = WHOLE_STEPS


def write(folder: Path, model: Path, shards: Path, **train_section) -> Path:
    folder.mkdir()
    section = {"max_steps": STEPS, "save_every_steps": 2, **train_section}
    return write_recipe(folder / "recipe.yaml", model, shards, train=section)


def rank(process: "subprocess.Popen[str]", number: int) -> psutil.Process:
    """Return the process of one rank: the first with this RANK. The loader processes are its children."""
    for child in psutil.Process(process.pid).children(recursive=True):
        try:
            if child.environ().get("RANK") == str(number):
                return child
        except (psutil.NoSuchProcess, psutil.ZombieProcess):
            continue
    raise AssertionError(f"no rank {number}")


def test_a_rank_killed_in_a_step_a_collective_or_a_checkpoint_ends_the_run(
    tmp_path: Path, tiny_model: Path, tiny_shards: Path, whole: Whole
) -> None:
    """Only the kill in a collective uses the real launcher, whose agent must end the others. The rest is forked."""
    recipe, run = write(tmp_path / "killed", tiny_model, tiny_shards), tmp_path / "killed" / "run"

    with training(recipe, 2) as ranks:
        wait_until(ranks, lambda: num_steps(run) >= 3)  # rank 1 is now in the fourth step
        ranks.send(1, signal.SIGKILL)
        assert ranks.wait(60).statuses[1] == -signal.SIGKILL

    process = start(recipe, 2)
    wait_until(process, lambda: num_steps(run) >= 5)
    rank(process, 0).suspend()
    time.sleep(1)  # rank 1 now waits for it in a collective
    rank(process, 1).kill()
    rank(process, 0).resume()
    everything = psutil.Process(process.pid).children(recursive=True)
    output, _ = process.communicate(timeout=60)  # the other ranks end too, and the status says that it failed
    assert process.returncode not in (0, 75), output
    _, alive = psutil.wait_procs(everything, timeout=10)
    assert not alive

    with training(recipe, 2) as ranks:
        wait_until(ranks, lambda: any((run / "checkpoints").glob(".step-*.partial")))
        ranks.send(0, signal.SIGKILL)
        assert ranks.wait(60).statuses[0] == -signal.SIGKILL

    train(recipe, 2)
    assert [row["loss"] for row in metrics(run)] == [row["loss"] for row in metrics(whole(2, 2))]
    assert adapter_bytes(run) == adapter_bytes(whole(2, 2))


@pytest.mark.parametrize("number", [0, 1])
def test_a_rank_that_stalls_is_named_and_ends_the_others(
    tmp_path: Path, tiny_model: Path, tiny_shards: Path, number: int
) -> None:
    recipe = write(tmp_path / "stalled", tiny_model, tiny_shards, max_steps=500, stall_timeout_s=10)
    run = tmp_path / "stalled" / "run"
    with training(recipe, 2) as ranks:
        wait_until(ranks, lambda: num_steps(run) >= 3)
        ranks.send(number, signal.SIGSTOP)
        ended = ranks.wait(120)
    assert ended.statuses[1 - number] > 0
    assert f"no progress for 10 s: rank {number} does not answer; it was last at " in ended.output
    assert (run / f"stalled-rank-{1 - number:05d}.txt").is_file()


def test_a_job_suspended_for_longer_than_the_stall_timeout_continues(
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


def test_missing_shards_are_named_and_a_new_start_resumes(
    tmp_path: Path, tiny_model: Path, pictures: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shards = tmp_path / "shards"
    assert main(["pack", str(pictures), str(shards), "--split", "0.5,0.2,0.3", "--shard-size", "1"]) == 0
    recipe = write(tmp_path / "vanished", tiny_model, shards, max_steps=40, micro_batch_size=1)
    run = tmp_path / "vanished" / "run"
    with training(recipe, 2) as ranks:
        wait_until(ranks, lambda: num_steps(run) >= 2)
        shutil.move(shards, tmp_path / "away")
        ended = ranks.wait(120)
    assert 1 in ended.statuses, ended.output
    assert str(shards) in ended.output and "Traceback" not in ended.output
    assert launch.main(["train", str(recipe), "--processes", "2"]) == 2
    assert "does not exist" in capsys.readouterr().err
    shutil.move(tmp_path / "away", shards)
    assert "resumed after step" in train(recipe, 2)


def test_the_newest_checkpoint_has_the_most_steps_whatever_its_date(
    tmp_path: Path, tiny_model: Path, tiny_shards: Path
) -> None:
    """Clocks of nodes can disagree. Here all dates are in the future, and the newest checkpoint has the oldest date."""
    recipe = write(tmp_path / "clocks", tiny_model, tiny_shards, max_steps=4, zero_stage=0)
    run = tmp_path / "clocks" / "run"
    train(recipe, 1)
    for age, folder in enumerate(sorted((run / "checkpoints").iterdir())):
        for path in [folder, *folder.rglob("*")]:
            os.utime(path, (2**32 - age * 10**8,) * 2)
    assert "resumed after step 4" in train(recipe, 1, ["train.max_steps=5"])


def run_elsewhere(words: list[str], host: str, behind_s: int) -> int:
    """Run `kfood WORDS` as on a host with another name and a late clock: `behind_s` seconds late, times rank + 1."""
    number = int(os.environ["RANK"])
    now, now_ns, behind_s = time.time, time.time_ns, behind_s * (1 + number)
    time.time = lambda: now() - behind_s
    time.time_ns = lambda: now_ns() - behind_s * 10**9
    socket.gethostname = lambda: f"{host}-{number}"
    return run_verb(words)


def test_clocks_that_disagree_and_other_hosts_change_nothing(
    tmp_path: Path, tiny_model: Path, tiny_shards: Path, whole: Whole
) -> None:
    """Ranks whose clocks are a day apart stop. They resume on hosts with other names and clocks a year behind."""
    recipe, run = write(tmp_path / "hosts", tiny_model, tiny_shards), tmp_path / "hosts" / "run"
    with training(recipe, 2, work=partial(run_elsewhere, host="old", behind_s=86_400)) as ranks:
        wait_until(ranks, lambda: num_steps(run) >= 3)
        (run / "STOP").touch()
        ended = ranks.wait(120)
    assert ended.statuses == (75, 75), ended.output
    with training(recipe, 2, work=partial(run_elsewhere, host="new", behind_s=365 * 86_400)) as ranks:
        ended = ranks.wait(120)
    assert ended.status == 0 and "resumed after step" in ended.output, ended.output
    times = [row["time"] for row in metrics(run)]
    assert times[0] - times[-1] > 300 * 86_400, "the clocks were not falsified"
    assert [row["loss"] for row in metrics(run)] == [row["loss"] for row in metrics(whole(2, 2))]
    assert adapter_bytes(run) == adapter_bytes(whole(2, 2))
