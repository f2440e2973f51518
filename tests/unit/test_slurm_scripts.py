"""slurm/stages.sh queues all jobs or none. Instead of Slurm, a fake sbatch writes down its arguments.

The tests also check what the job scripts print when they cannot begin.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
STAGES = sorted((ROOT / "launch/recipes/stages").glob("*.yaml"))
SITE = [line for line in (ROOT / "slurm/site.env.example").read_text().splitlines() if line.startswith("KFOOD_")]


@pytest.fixture
def login(tmp_path: Path):
    """A function that runs stages.sh as on a login node and returns output, status and one line per queued job."""
    queued = tmp_path / "queued"
    sbatch = tmp_path / "bin/sbatch"
    sbatch.parent.mkdir()
    queued.touch()
    sbatch.write_text(
        f'#!/bin/sh\n[ "$(wc -l < {queued})" != "$REFUSED_AFTER" ] || {{ echo no such partition >&2; exit 1; }}\n'
        f'echo "$@" >> {queued}\nwc -l < {queued}\n'
    )
    scancel = tmp_path / "bin/scancel"
    scancel.write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/cancelled\n')
    for command in (sbatch, scancel):
        command.chmod(0o755)

    def run(
        *recipes: Path, modules: str = "", venv: str | Path = "", lacks: str = "none", **variables: str
    ) -> tuple[str, int, list[str]]:
        site = [*SITE, f'KFOOD_MODULES="{modules}"', f'KFOOD_VENV="{venv}"']
        (tmp_path / "site.env").write_text("\n".join(line for line in site if not line.startswith(lacks)) + "\n")
        path = f"{sbatch.parent}:{os.environ['PATH']}"
        done = subprocess.run(
            ["bash", str(ROOT / "slurm/stages.sh"), "--nodes=2", "--", *map(str, recipes)],
            env=dict(os.environ) | {"PATH": path, "KFOOD_SITE": str(tmp_path / "site.env")} | variables,
            capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip
        return done.stdout + done.stderr, done.returncode, queued.read_text().splitlines()

    return run


def python(folder: Path, *lines: str) -> Path:
    """Write a virtual environment whose `python` is a script of these shell lines, and return its folder."""
    (folder / "bin").mkdir(parents=True)
    (folder / "bin/activate").touch()
    (folder / "bin/python").write_text("\n".join(["#!/bin/bash", *lines]) + "\n")
    (folder / "bin/python").chmod(0o755)
    return folder


def test_each_stage_is_trained_after_the_one_before_and_evaluated(login) -> None:
    output, status, jobs = login(*STAGES)
    assert status == 0, output
    assert len(STAGES) == 3 and len(jobs) == 6
    for at, recipe in enumerate(STAGES):
        trained, measured = jobs[2 * at], jobs[2 * at + 1]
        assert trained.endswith(f"--nodes=2 slurm/train.sbatch {recipe}")
        assert ("afterok" not in trained) if at == 0 else (f"--dependency=afterok:{2 * at - 1} " in trained)
        assert f"--dependency=afterok:{2 * at + 1} --nodes=2 --nodes=1 slurm/evaluate.sbatch" in measured
        run = yaml.safe_load(recipe.read_text())["run"]["dir"]
        assert f"--adapter {run}/adapter --out {run}/tuned" in measured


def test_no_job_is_queued_if_one_recipe_has_a_mistake(login, tmp_path: Path) -> None:
    bad = tmp_path / "bad.yaml"
    bad.write_text(yaml.safe_dump({"extends": str(STAGES[1]), "lora": {"ranks": 4}}))
    output, status, jobs = login(STAGES[0], bad, STAGES[2])
    assert (status, jobs) == (2, [])
    assert "lora.ranks: no such key" in output and "stages: nothing was queued" in output
    assert "Traceback" not in output and "unbound" not in output


@pytest.mark.parametrize(("taken", "cancelled"), [(0, None), (1, "1"), (4, "1 2 3 4")])
def test_a_refused_job_cancels_the_jobs_before_it(login, tmp_path: Path, taken: int, cancelled: str | None) -> None:
    output, status, jobs = login(*STAGES, REFUSED_AFTER=str(taken))
    assert (status, len(jobs)) == (1, taken)
    assert "no such partition" in output and f"not all jobs could be queued; cancelling {cancelled or 'none'}" in output
    message = tmp_path / "cancelled"
    assert (message.read_text().strip() if message.exists() else None) == cancelled


def test_no_job_is_queued_if_python_lacks_the_packages(login, tmp_path: Path) -> None:
    bare = python(tmp_path / "bare", f'exec {sys.executable} -S "$@"')
    output, status, jobs = login(*STAGES, venv=bare)
    assert (status, jobs) == (2, [])
    assert "No module named" in output and "name the jobs' Python in site.env" in output
    assert "stages: nothing was queued" in output and "Traceback" not in output


def test_recipes_are_read_with_the_modules_and_environment_of_the_jobs(login, tmp_path: Path) -> None:
    """A login node may have no other Python that can read a recipe."""
    named = python(tmp_path / "named", f'echo "$LOADED" > {tmp_path}/asked', f'exec {sys.executable} "$@"')
    module = {"BASH_FUNC_module%%": '() { export LOADED="$*"; }'}
    output, status, jobs = login(*STAGES, modules="python/3.12", venv=named, **module)
    assert (status, len(jobs)) == (0, 6), output
    assert (tmp_path / "asked").read_text() == "load python/3.12\n"


def test_the_missing_line_of_a_site_file_is_named(login, tmp_path: Path) -> None:
    output, status, jobs = login(*STAGES, lacks="KFOOD_NODE_TIMEOUT")
    assert (status, jobs) == (2, [])
    assert f"{tmp_path}/site.env does not set KFOOD_NODE_TIMEOUT → copy its line from slurm/site.env.example" in output


@pytest.mark.parametrize("script", sorted((ROOT / "slurm").glob("*.sbatch")), ids=lambda path: path.name)
def test_a_job_submitted_from_another_folder_says_so(script: Path, tmp_path: Path) -> None:
    """Slurm runs a copy of the script in the folder where sbatch was called."""
    copy = tmp_path / "slurm_script"
    copy.write_text(script.read_text())
    done = subprocess.run(["bash", str(copy)], cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert f"start sbatch from the checkout's own folder, not from {tmp_path}" in done.stderr


@pytest.mark.parametrize(
    ("tasks", "parts"),
    [
        ([0, 1, 2, 3, 4, 5, 6, 7], ["1/8", "2/8", "3/8", "4/8", "5/8", "6/8", "7/8", "8/8"]),
        ([3, 5], ["1/3", "3/3"]),
        ([6], ["1/1"]),
        ([0, 2, 4], ["1/5", "3/5", "5/5"]),
    ],
)
def test_each_packer_of_an_array_with_gaps_gets_another_part(tmp_path: Path, tasks: list[int], parts: list[str]):
    """The variables are set as Slurm sets them. Instead of Slurm, a fake srun prints its last argument."""
    srun = tmp_path / "bin/srun"
    srun.parent.mkdir()
    srun.write_text('#!/bin/sh\nfor word; do last="$word"; done; echo "$last"\n')
    srun.chmod(0o755)
    (tmp_path / "site.env").write_text("\n".join(SITE) + "\n")
    array = {"MIN": min(tasks), "MAX": max(tasks), "COUNT": len(tasks)}
    output = []
    for task in tasks:
        variables = {f"SLURM_ARRAY_TASK_{name}": str(value) for name, value in (array | {"ID": task}).items()}
        variables |= {"SLURM_JOB_NUM_NODES": "1", "KFOOD_SITE": str(tmp_path / "site.env")}
        done = subprocess.run(
            ["bash", "slurm/pack.sbatch", "pictures", "shards"],
            env=dict(os.environ) | {"PATH": f"{srun.parent}:{os.environ['PATH']}"} | variables,
            capture_output=True, text=True, timeout=60, check=False, cwd=ROOT,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        output.append(done.stdout.strip())
    assert output == parts
