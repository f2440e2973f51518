"""Training jobs under a real Slurm: two nodes, warnings, preemption, a lost node, a cancelled and a failing job.

Every stopped run must end with the same adapter, byte for byte, as the uninterrupted run.
"""

import json
import os
import re
from pathlib import Path

import pytest
from mini_slurm import MiniSlurm
from running import adapter_bytes, metrics, write_recipe
from whole import WHOLE_STEPS, Whole

from kfood_dist.cli import main

STEPS = WHOLE_STEPS
JOB = ("--nodes=2", "--exclusive")
SCRIPT = "slurm/train.sbatch"


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, tiny_shards: Path):
    """Return a function that writes a recipe of STEPS steps to a new folder. The run goes to `run` in that folder."""

    def write(**sections) -> Path:
        train = {"max_steps": STEPS, "zero_stage": 2, **sections.pop("train", {})}
        path = tmp_path_factory.mktemp("job") / "recipe.yaml"
        return write_recipe(path, tiny_model, tiny_shards, train=train, **sections)

    return write


def wait_for_step(slurm: MiniSlurm, job: str, run: Path, step: int) -> None:
    slurm.until(lambda: (run / "metrics.jsonl").is_file() and len(metrics(run)) >= step, 120, f"step {step}", job)


def same(run: Path, whole: Path) -> bool:
    exact = ("step", "epoch", "samples", "loss", "learning_rate", "grad_norm")
    lines = [[[row[name] for name in exact] for row in metrics(at)] for at in (run, whole)]
    return lines[0] == lines[1] and adapter_bytes(run) == adapter_bytes(whole)


def was_warned(run: Path) -> bool:
    """Whether the run was warned, or has already stopped: the warning comes up to a minute early."""
    return (run / "STOP").exists() or "stopped after step" in (run / "log.txt").read_text()


def started_again(slurm: MiniSlurm, job: str) -> bool:
    return int(slurm.facts(job)["Restarts"]) >= 1


def test_two_nodes_train_the_same_run_as_two_local_ranks(slurm: MiniSlurm, make, whole: Whole) -> None:
    recipe = make()
    job = slurm.sbatch(*JOB, SCRIPT, recipe, "--processes", "1")
    facts = slurm.wait(job)
    log = slurm.log(job)
    assert (facts["JobState"], facts["ExitCode"]) == ("COMPLETED", "0:0"), log
    assert log.count("launch train: checking ") == 1 and log.count("launch train: ") == 2
    assert "1 process (as asked) on each of 2 nodes, DeepSpeed ZeRO-2; meeting at 127.0.0.1:" in log
    run = recipe.parent / "run"
    facts = json.loads((run / "run.json").read_text())
    assert (facts["world_size"], facts["distributed_type"], facts["zero_stage"]) == (2, "DEEPSPEED", 2)
    assert [row["step"] for row in metrics(run)] == list(range(1, STEPS + 1))
    assert same(run, whole(2, 2))


def test_the_warning_before_the_time_limit_requeues_and_the_run_completes(
    slurm: MiniSlurm, make, set_site, whole: Whole
) -> None:
    set_site(SBATCH_TIMELIMIT=2, SBATCH_SIGNAL="USR1@60")
    recipe = make()
    run = recipe.parent / "run"
    job = slurm.sbatch(*JOB, SCRIPT, recipe, "--processes", "1")
    wait_for_step(slurm, job, run, 1)
    slurm.pause(job)  # else the run may end before the warning, which can come at any time within half a minute
    slurm.until(lambda: was_warned(run) or started_again(slurm, job), 90, "the warning", job)
    slurm.wake(job)
    slurm.until(lambda: started_again(slurm, job), 60, "the requeue", job)
    slurm.run("scontrol", "update", f"JobId={job}", "TimeLimit=10")
    facts = slurm.wait(job)
    log = slurm.log(job)
    assert (facts["JobState"], facts["ExitCode"], facts["Restarts"]) == ("COMPLETED", "0:0", "1"), log
    stopped = re.search(rf"stopped after step (\d+) of {STEPS}", log)
    assert stopped and f"resumed after step {stopped[1]}" in log, log
    assert "slurm: start 1 of" in log and "slurm: start 2 of" in log  # the second appended to the first
    assert "sbatch did not see" not in log
    assert same(run, whole(2, 2))


@pytest.mark.parametrize(
    "how",
    [("--partition=low", "--signal=USR1@20"), ("--partition=cancel",)],
    ids=["requeued, told by SIGUSR1", "cancelled, told by SIGTERM"],
)
def test_a_preempted_job_resumes_when_the_other_job_has_ended(slurm: MiniSlurm, make, whole: Whole, how) -> None:
    """Slurm sends SIGTERM to a job that names no signal, and to every job without preempt_send_user_signal."""
    recipe = make(train={"zero_stage": 0})
    run = recipe.parent / "run"
    job = slurm.sbatch("--nodes=1", "--exclusive", *how, SCRIPT, recipe, "--processes", "1")
    wait_for_step(slurm, job, run, 2)
    slurm.pause(job)
    other = slurm.sbatch(*JOB, "--partition=high", "--wrap", "sleep 1")
    assert slurm.wait(other)["JobState"] == "COMPLETED"
    facts = slurm.wait(job)
    log = slurm.log(job)
    assert (facts["JobState"], facts["Restarts"]) == ("COMPLETED", "1"), log
    assert re.search(rf"stopped after step (\d+) of {STEPS}", log), log
    assert same(run, whole(1, 0))


def test_a_lost_node_costs_the_steps_since_the_last_checkpoint(slurm: MiniSlurm, make, whole: Whole) -> None:
    recipe = make(train={"save_every_steps": 3})
    run = recipe.parent / "run"
    job = slurm.sbatch(*JOB, SCRIPT, recipe, "--processes", "1")
    wait_for_step(slurm, job, run, 4)
    slurm.lose_node("node2")
    slurm.until(lambda: slurm.facts(job)["JobState"] == "PENDING", 90, "the requeue", job)
    slurm.start_node("node2")
    facts = slurm.wait(job)
    log = slurm.log(job)
    assert facts["JobState"] == "COMPLETED", log
    assert re.search(r"resumed after step (\d+)", log), log
    assert same(run, whole(2, 2))


def test_a_cancelled_job_stays_cancelled(slurm: MiniSlurm, make) -> None:
    recipe = make(train={"max_steps": 400, "zero_stage": 0})
    run = recipe.parent / "run"
    job = slurm.sbatch("--nodes=1", SCRIPT, recipe, "--processes", "1")
    wait_for_step(slurm, job, run, 2)
    slurm.run("scancel", job)
    facts = slurm.wait(job, 60)
    assert (facts["JobState"], facts["Restarts"]) == ("CANCELLED", "0")
    slurm.until(lambda: not slurm.ranks(job), 60, "the ranks to end", job)
    assert "requeued" not in slurm.log(job).replace("not requeued", "")


def test_a_rank_that_dies_ends_the_job(slurm: MiniSlurm, make) -> None:
    recipe = make(train={"max_steps": 400, "zero_stage": 0})
    run = recipe.parent / "run"
    job = slurm.sbatch(*JOB, SCRIPT, recipe, "--processes", "1")
    wait_for_step(slurm, job, run, 2)
    slurm.pause(job)  # the other rank would not notice
    (dying,) = slurm.ranks(job, "node2")
    dying.kill()
    facts = slurm.wait(job, 60)
    assert (facts["JobState"], facts["Restarts"]) == ("FAILED", "0"), slurm.log(job)
    assert facts["ExitCode"] not in ("75:0", "76:0")
    slurm.until(lambda: not slurm.ranks(job), 10, "the ranks to end", job)


def test_a_mistake_is_reported_and_not_retried(slurm: MiniSlurm, make) -> None:
    job = slurm.sbatch(*JOB, SCRIPT, make(lora={"ranks": 4}), "--processes", "1")
    facts = slurm.wait(job)
    assert (facts["JobState"], facts["ExitCode"], facts["Restarts"]) == ("FAILED", "2:0", "0")
    assert "lora.ranks: no such key" in slurm.log(job)


def test_a_job_that_is_stopped_too_often_is_not_requeued(slurm: MiniSlurm, make, set_site) -> None:
    """The test stops the job with the file STOP."""
    set_site(KFOOD_MAX_STARTS=1)
    recipe = make(train={"max_steps": 400, "zero_stage": 0})
    job = slurm.sbatch("--nodes=1", SCRIPT, recipe, "--processes", "1")
    wait_for_step(slurm, job, recipe.parent / "run", 1)
    (recipe.parent / "run" / "STOP").touch()
    facts = slurm.wait(job)
    assert (facts["JobState"], facts["ExitCode"], facts["Restarts"]) == ("FAILED", "76:0", "0"), slurm.log(job)
    assert "stopped at start 1 of KFOOD_MAX_STARTS=1; given up" in slurm.log(job)


def test_a_killed_jobs_copy_is_removed_by_another_job(
    slurm: MiniSlurm, make, set_site, tmp_path: Path, pictures: Path
) -> None:
    assert main(["pack", str(pictures), str(tmp_path / "other"), "--split", "0.6,0.2,0.2"]) == 0
    set_site(KFOOD_SCRATCH=tmp_path)
    scratch = tmp_path / f"kfood-copy-{os.geteuid()}"
    recipe = make(data={"shards": str(tmp_path / "other")}, train={"max_steps": 400, "zero_stage": 0})
    killed = slurm.sbatch("--nodes=1", SCRIPT, recipe, "--processes", "1")
    wait_for_step(slurm, killed, recipe.parent / "run", 1)
    (copy,) = scratch.iterdir()
    assert copy.name.startswith("other-")
    slurm.kill(killed)
    slurm.wait(killed)
    assert list(scratch.iterdir()) == [copy]

    recipe = make(train={"max_steps": 1, "zero_stage": 0})
    job = slurm.sbatch("--nodes=1", SCRIPT, recipe, "--processes", "1")
    assert slurm.wait(job)["JobState"] == "COMPLETED", slurm.log(job)
    assert not scratch.exists()
