"""How a stopped job goes back to the queue, under a real Slurm. Packers that wait before they begin stand for all."""

import sys
from pathlib import Path

import pytest
from mini_slurm import MiniSlurm

from kfood_dist.cli import main


@pytest.fixture
def gate(set_site, tmp_path: Path) -> Path:
    """A folder: each start of a packer leaves `TASK-RESTARTS` there, and waits for `open`; `stop` warns them all."""
    folder = tmp_path / "gate"
    folder.mkdir()
    script = folder / "wait"
    script.write_text(
        "#!/bin/bash\n"
        f"touch {folder}/$SLURM_ARRAY_TASK_ID-${{SLURM_RESTART_COUNT:-0}}\n"
        f"until [ -e {folder}/open ]; do sleep 0.1; [ ! -e {folder}/stop ] || kill -USR1 $$; done\n"
        f'PATH={Path(sys.executable).parent}:$PATH exec "$@"\n'
    )
    script.chmod(0o755)
    set_site(KFOOD_CONTAINER=script)
    return folder


def wait_for_start(slurm: MiniSlurm, job: str, gate: Path, name: str) -> None:
    slurm.until(lambda: (gate / name).exists(), 60, f"start {name}", f"{job}_{name.split('-')[0]}")


def test_a_stopped_packer_leaves_the_others_of_its_array_alone(
    slurm: MiniSlurm, gate: Path, pictures: Path, tmp_path: Path
) -> None:
    job = slurm.sbatch("--array=1-3", "slurm/pack.sbatch", pictures, tmp_path / "array")
    for task in (1, 2, 3):
        wait_for_start(slurm, job, gate, f"{task}-0")
    (stopped,) = (task for task in (1, 2, 3) if slurm.facts(f"{job}_{task}")["JobId"] == job)  # as all together
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
