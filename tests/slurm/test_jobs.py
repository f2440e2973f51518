"""Stages as dependent jobs, and packing as an array, under a real Slurm."""

import json
from pathlib import Path

import pytest
import yaml
from mini_slurm import ROOT, MiniSlurm
from running import metrics

from kfood_dist.cli import main

STAGES = ROOT / "launch" / "recipes" / "stages"


@pytest.fixture
def stages(tmp_path: Path, tiny_model: Path, tiny_shards: Path) -> list[Path]:
    """Return the first two shipped stage recipes, with a tiny model and few steps."""
    paths = []
    for number in (1, 2):
        tree = {
            "extends": str(STAGES / f"{number}.yaml"),
            "data": {"shards": str(tiny_shards), "num_workers": 1},
            "model": {"base": str(tiny_model)},
            "train": {"micro_batch_size": 2, "gradient_accumulation_steps": 1, "max_steps": 2, "zero_stage": 0},
            "eval": {"every_steps": None},
            "run": {"dir": str(tmp_path / f"run{number}")},
        }
        if number > 1:
            tree["model"]["adapter"] = str(tmp_path / f"run{number - 1}" / "adapter")
        paths.append(tmp_path / f"{number}.yaml")
        paths[-1].write_text(yaml.safe_dump(tree))
    return paths


def test_stages_run_as_dependent_jobs(slurm: MiniSlurm, stages: list[Path], tmp_path: Path) -> None:
    output = slurm.run("bash", str(ROOT / "slurm/stages.sh"), f"--output={tmp_path}/%j.log", "--", *map(str, stages))
    jobs = [[int(word) for word in line.replace(",", " ").split() if word.isdecimal()] for line in output.splitlines()]
    assert len(jobs) == 2
    for (trained, measured), run in zip(jobs, ("run1", "run2"), strict=True):
        for job in (trained, measured):
            facts = slurm.wait(str(job))
            assert facts["JobState"] == "COMPLETED", (tmp_path / f"{job}.log").read_text()
        assert len(metrics(tmp_path / run)) == 2
        assert json.loads((tmp_path / run / "tuned" / "report.json").read_text())["images"] > 0
    began = [slurm.facts(str(trained))["StartTime"] for trained, _ in jobs]
    ended = [slurm.facts(str(trained))["EndTime"] for trained, _ in jobs]
    assert ended[0] <= began[1]


def test_an_array_packs_the_same_shards_as_one_process(slurm: MiniSlurm, pictures: Path, tmp_path: Path) -> None:
    """The task numbers have gaps, as when a part of an array is submitted again."""
    job = slurm.sbatch("--array=3,5", "slurm/pack.sbatch", pictures, tmp_path / "array")
    for part in (3, 5):
        facts = slurm.wait(f"{job}_{part}")
        assert facts["JobState"] == "COMPLETED", (slurm.folder / f"{job}_{part}.log").read_text()
    assert main(["pack", str(pictures), str(tmp_path / "one")]) == 0
    tars = sorted(path.name for path in (tmp_path / "one").glob("*.tar"))
    assert tars and tars == sorted(path.name for path in (tmp_path / "array").glob("*.tar"))
    assert all((tmp_path / "one" / n).read_bytes() == (tmp_path / "array" / n).read_bytes() for n in tars)
