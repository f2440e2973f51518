"""The memory of a process and of its machine: what a process holds alone, and the limits of control groups."""

import mmap
from pathlib import Path

import numpy as np
import pytest

from kfood_dist.system import memory
from kfood_dist.system.memory import machine_memory_gib, private_peak_gib, restart_private_peak

MIB = 2**20


def test_the_peak_counts_arrays_and_starts_again() -> None:
    restart_private_peak()
    before = private_peak_gib()
    block = np.ones(256 * MIB, np.uint8)
    held = private_peak_gib() - before
    assert held == pytest.approx(0.25, abs=0.02)
    del block
    assert private_peak_gib() - before == pytest.approx(0.25, abs=0.02), "a peak stays"
    restart_private_peak()
    assert private_peak_gib() - before < 0.05


def test_a_mapped_file_does_not_count(tmp_path: Path) -> None:
    (tmp_path / "weights").write_bytes(bytes(256 * MIB))
    restart_private_peak()
    before = private_peak_gib()
    with (tmp_path / "weights").open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        assert not np.frombuffer(mapped, np.uint8).any()  # reads every page
        assert private_peak_gib() - before < 0.05


def test_the_memory_of_a_job_is_that_of_its_control_group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job, root = tmp_path / "cgroup", tmp_path / "fs"
    (root / "slurm" / "job_7" / "step").mkdir(parents=True)
    for group, limit in {
        "": "max",
        "slurm": "8589934592",
        "slurm/job_7": "4294967296",
        "slurm/job_7/step": "max",
    }.items():
        (root / group / "memory.max").write_text(f"{limit}\n")
    job.write_text("0::/slurm/job_7/step\n")
    assert min(memory._limits_of_groups(job, root)) == 4 * 2**30
    (root / "memory" / "job").mkdir(parents=True)
    (root / "memory" / "job" / "memory.limit_in_bytes").write_text("2147483648\n")
    job.write_text("9:cpu:/job\n4:memory:/job\n")
    assert min(memory._limits_of_groups(job, root)) == 2 * 2**30
    assert min(memory._limits_of_groups(tmp_path / "missing", root)) == float("inf")
    monkeypatch.setattr(memory, "_limits_of_groups", lambda *_: iter([float("inf")]))
    assert 0 < machine_memory_gib() == memory._physical_bytes() / 2**30
