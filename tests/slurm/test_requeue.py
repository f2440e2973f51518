"""How a stopped job returns to the queue, under a real Slurm. A packer that waits at its start represents all jobs."""

import json
import shutil
import signal
import sys
from pathlib import Path

import pytest
from mini_slurm import MiniSlurm

from kfood_dist.cli import main


@pytest.fixture
def gate(set_site, tmp_path: Path) -> Path:
    """Return a folder. Each start of a packer writes the file `TASK-RESTARTS` there and waits for the file `open`."""
    folder = tmp_path / "gate"
    folder.mkdir()
    script = folder / "wait"
    script.write_text(
        "#!/bin/bash\n"
        f"touch {folder}/$SLURM_ARRAY_TASK_ID-${{SLURM_RESTART_COUNT:-0}}\n"
        f"until [ -e {folder}/open ]; do sleep 0.1; done\n"
        f'PATH={Path(sys.executable).parent}:$PATH exec "$@"\n'
    )
    script.chmod(0o755)
    set_site(KFOOD_CONTAINER=script)
    return folder


def wait_for_start(slurm: MiniSlurm, job: str, gate: Path, name: str) -> None:
    slurm.until(lambda: (gate / name).exists(), 60, f"start {name}", f"{job}_{name.split('-')[0]}")


def test_a_stopped_packer_does_not_affect_the_other_tasks_of_its_array(
    slurm: MiniSlurm, gate: Path, pictures: Path, tmp_path: Path
) -> None:
    job = slurm.sbatch("--array=1-3", "slurm/pack.sbatch", pictures, tmp_path / "array")
    for task in (1, 2, 3):
        wait_for_start(slurm, job, gate, f"{task}-0")
    # The task whose own id is the array's id.
    (stopped,) = (task for task in (1, 2, 3) if slurm.facts(f"{job}_{task}")["JobId"] == job)
    slurm.run("scancel", "--signal=USR1", f"{job}_{stopped}")
    wait_for_start(slurm, job, gate, f"{stopped}-1")
    (gate / "open").touch()
    for task in (1, 2, 3):
        facts = slurm.wait(f"{job}_{task}")
        assert facts["JobState"] == "COMPLETED", slurm.log(f"{job}_{task}")
        assert facts["Restarts"] == str(int(task == stopped))
    assert main(["pack", str(pictures), str(tmp_path / "one")]) == 0
    whole, parts = ({p.name: p.read_bytes() for p in (tmp_path / n).glob("*.tar")} for n in ("one", "array"))
    assert whole and whole == parts


def test_a_failed_slurm_request_is_repeated(
    slurm: MiniSlurm, gate: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The commands fail once, as when the controller restarts. The log reports a requeue only after it has happened."""
    for command in ("squeue", "scontrol"):
        path, once = tmp_path / "bin" / command, tmp_path / f"{command} has failed"
        path.parent.mkdir(exist_ok=True)
        real = shutil.which(command)
        path.write_text(
            f'#!/bin/sh\n[ -e "{once}" ] && exec {real} "$@"\ntouch "{once}"; echo {command}: away; exit 1\n'
        )
        path.chmod(0o755)
    monkeypatch.setitem(slurm.environment, "PATH", f"{tmp_path}/bin:{slurm.environment['PATH']}")
    job = slurm.sbatch("--array=1", "slurm/pack.sbatch", pictures, tmp_path / "array")
    wait_for_start(slurm, job, gate, "1-0")
    slurm.run("scancel", "--signal=USR1", f"{job}_1")
    slurm.until(lambda: "scontrol: away" in slurm.log(f"{job}_1"), 30, "the second failure")
    assert "requeued" not in slurm.log(f"{job}_1")
    (gate / "open").touch()
    facts = slurm.wait(f"{job}_1")
    log = slurm.log(f"{job}_1")
    assert (facts["JobState"], facts["Restarts"]) == ("COMPLETED", "1"), log
    assert log.count("requeued") == log.count("slurm: stopped, requeued; the next start is number 2") == 1


def test_a_job_that_may_not_be_requeued_ends(slurm: MiniSlurm, gate: Path, pictures: Path, tmp_path: Path) -> None:
    job = slurm.sbatch("--array=1", "--no-requeue", "slurm/pack.sbatch", pictures, tmp_path / "array")
    wait_for_start(slurm, job, gate, "1-0")
    slurm.run("scancel", "--signal=USR1", f"{job}_1")
    facts = slurm.wait(f"{job}_1", 30)
    assert (facts["JobState"], facts["ExitCode"], facts["Restarts"]) == ("FAILED", "76:0", "0")
    assert "slurm: stopped, and not requeued: the job is RUNNING, Requeue=0" in slurm.log(f"{job}_1")


def test_a_job_that_fails_is_requeued_if_a_node_does_not_answer(slurm: MiniSlurm, set_site, tmp_path: Path) -> None:
    """Slurm itself has not noticed. The script asks all nodes and requeues the job, and the second start succeeds."""
    command = tmp_path / "command"
    command.write_text(
        "#!/bin/bash\n"
        '[ "${SLURM_RESTART_COUNT:-0}" = 0 ] || exit 0\n'
        f"touch {tmp_path}/$SLURMD_NODENAME\n"
        f"until [ -e {tmp_path}/go ]; do sleep 0.1; done; exit 1\n"
    )
    command.chmod(0o755)
    set_site(KFOOD_CONTAINER=command, KFOOD_NODE_TIMEOUT=3)
    job = slurm.sbatch("--nodes=2", "--exclusive", "slurm/train.sbatch", "recipe.yaml")
    slurm.until(lambda: all((tmp_path / node).exists() for node in ("node1", "node2")), 60, "both nodes", job)
    daemon = slurm.daemons["node2"]
    daemon.send_signal(signal.SIGSTOP)
    try:
        (tmp_path / "go").touch()
        slurm.until(lambda: "stopped, requeued; the next start is number 2" in slurm.log(job), 30, "the requeue", job)
    finally:
        daemon.send_signal(signal.SIGCONT)
    facts = slurm.wait(job)
    assert (facts["JobState"], facts["Restarts"]) == ("COMPLETED", "1"), slurm.log(job)


def test_a_preempted_evaluation_starts_again(
    slurm: MiniSlurm, set_site, tiny_model: Path, tiny_shards: Path, tmp_path: Path
) -> None:
    """The first start never ends by itself, and it ignores the warning."""
    command = tmp_path / "command"
    command.write_text(
        "#!/bin/bash\n"
        f"export PATH={Path(sys.executable).parent}:$PATH\n"
        '[ "${SLURM_RESTART_COUNT:-0}" = 0 ] || exec "$@"\n'
        f'touch {tmp_path}/began; exec "${{@:1:4}}" sleep 1000\n'  # the first four words: bash -c 'trap …' deaf
    )
    command.chmod(0o755)
    set_site(KFOOD_CONTAINER=command)
    words = ("--shards", tiny_shards, "--model", tiny_model, "--out", tmp_path / "report", "--limit", "4")
    partition = ("--partition=low", "--signal=USR1@20")
    job = slurm.sbatch("--exclusive", *partition, "slurm/evaluate.sbatch", *words)
    slurm.until((tmp_path / "began").exists, 60, "the first start", job)
    other = slurm.sbatch("--nodes=2", "--exclusive", "--partition=high", "--wrap", "sleep 1")
    assert slurm.wait(other)["JobState"] == "COMPLETED"
    facts = slurm.wait(job)
    assert (facts["JobState"], facts["Restarts"]) == ("COMPLETED", "1"), slurm.log(job)
    assert json.loads((tmp_path / "report" / "report.json").read_text())["images"] == 4
