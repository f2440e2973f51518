"""`kfood doctor`: each check reports what it finds and a remedy for each fault. A check that crashes is a finding."""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from running import ROOT, environment

from kfood_dist.cli import main
from kfood_dist.doctor import checks as doctor
from kfood_dist.doctor.checks import FAULT, OK, WARN, Finding
from kfood_dist.doctor.trials import adamw8bit_step, compile_complaint, nf4_error
from kfood_dist.errors import ShardError
from kfood_dist.system.gpus import Gpu, Gpus

CPU = torch.device("cpu")


def levels(findings) -> list[str]:
    return [finding.level for finding in findings]


def test_this_machine_passes(tiny_shards: Path, tiny_model: Path, tmp_path: Path):
    """The complete command checks what the other tests need. It uses no network and leaves no files."""
    nowhere = {"HTTPS_PROXY": "http://127.0.0.1:9", "HTTP_PROXY": "http://127.0.0.1:9", "TMPDIR": str(tmp_path)}
    words = ["doctor", "--shards", str(tiny_shards), "--model", str(tiny_model)]
    done = subprocess.run(
        [sys.executable, "-m", "kfood_dist", *words],
        capture_output=True,
        text=True,
        env=environment() | nowhere,
        cwd=tmp_path,
        timeout=180,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert lines[-1] == "no faults"
    assert done.stderr == ""  # for example no advice to install `kernels`, which nothing here needs
    assert all(line.split()[0] in (OK, WARN) for line in lines[:-1])
    assert all(" → " in line for line in lines if line.startswith(WARN))
    for found in ("NF4", "8-bit states", "deepspeed", "GiB free", "4 dishes at 224 px", "qwen2_5_vl"):
        assert found in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_faults_give_status_1_and_all_checks_still_run(tmp_path: Path, tiny_model: Path, capsys):
    shutil.copytree(tiny_model, tmp_path / "model")
    (tmp_path / "model" / "config.json").unlink()
    assert main(["doctor", "--shards", str(tmp_path / "none")]) == 1
    assert capsys.readouterr().out.splitlines()[-1] == "1 fault"
    assert main(["doctor", "--shards", str(tmp_path / "none"), "--model", str(tmp_path / "model")]) == 1
    out = capsys.readouterr().out
    assert "FAULT shards: shard folder" in out and "→ name the OUT folder of a `kfood pack SOURCE OUT`" in out
    assert "lacks config.json" in out
    assert out.splitlines()[-1] == "2 faults"


def test_only_tested_python_versions_pass():
    assert [levels(doctor.check_python((3, minor))) for minor in (10, 11, 12, 13)] == [[FAULT], [OK], [OK], [FAULT]]


def test_a_check_that_crashes_is_a_finding():
    def crash():
        yield Finding(OK, "so far")
        raise RuntimeError("long\ntrace")

    def mistake():
        raise ShardError("bad shard", "pack again")

    assert list(doctor.examine("disk", crash))[1].what == "disk: RuntimeError: long"
    assert list(doctor.examine("shards", mistake)) == [Finding(FAULT, "shards: bad shard", "pack again")]


def test_versions_outside_the_required_range_are_faults(tmp_path: Path, monkeypatch):
    """A made-up distribution requires versions that do not exist, installed ones, and packages of other platforms."""
    info = tmp_path / "greedy-1.dist-info"
    info.mkdir()
    wanted = (
        "transformers>=99",
        "no-such-thing>=1",
        "numpy>=2",
        'torch<1; sys_platform == "never"',
        'pip<1; extra == "x"',
    )
    (info / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: greedy\nVersion: 1\n" + "".join(f"Requires-Dist: {w}\n" for w in wanted)
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    found = list(doctor.check_packages("greedy"))
    assert levels(found) == [FAULT, FAULT]
    assert found[0].what.startswith("transformers is 5.") and found[0].what.endswith(">=99 is needed")
    assert found[1].what == "no-such-thing is not installed"
    assert levels(doctor.check_packages("not-installed-anywhere")) == [WARN]
    assert levels(doctor.check_packages()) == [OK]


def test_doctor_really_quantises_to_four_bits():
    assert 0.05 < nf4_error(CPU) < 0.15  # four bits of a normal distribution (unquantised bf16 would be near 0.003)


def test_doctor_really_steps_with_eight_bit_states():
    dtype, moved = adamw8bit_step(CPU)
    assert dtype == torch.uint8
    assert moved == pytest.approx(1.0, abs=0.02)  # Adam's first step is the learning rate


def test_wrong_arithmetic_is_a_fault(monkeypatch):
    monkeypatch.setattr(doctor, "nf4_error", lambda device: 0.003)
    monkeypatch.setattr(doctor, "adamw8bit_step", lambda device: (torch.float32, 1.0))
    assert levels(doctor.check_bitsandbytes()) == [FAULT, FAULT]


def test_torch_and_bitsandbytes_are_checked_for_kernels_of_the_gpu(monkeypatch):
    """CUDA 13 dropped Volta. The wheels for CUDA 12.6 support Volta but not Blackwell."""
    cuda_13, cuda_12_6 = ("sm_75", "sm_90", "sm_120"), ("sm_50", "sm_60", "sm_70", "sm_90")
    volta, blackwell, maxwell = Gpu("Tesla V100", 7, 0), Gpu("RTX 5090", 12, 0), Gpu("GTX 980", 5, 2)

    def found(gpu: Gpu, cuda: str, arches: tuple[str, ...]):
        return lambda: Gpus(1, (gpu,), "2.13.0", cuda, arches)

    (fault,) = doctor.check_torch(found(volta, "13.0", cuda_13))
    assert fault.level == FAULT and fault.what.endswith(
        "(CUDA 13.0) has no kernels for GPU 0 (Tesla V100, compute capability 7.0)"
    )
    assert fault.remedy == "install torch's wheel for CUDA 12.6 (cu126), which torch has up to 2.14"
    (fault,) = doctor.check_torch(found(blackwell, "12.6", cuda_12_6))
    assert fault.level == FAULT and fault.remedy.startswith("install torch's ordinary wheel, for CUDA 13")
    assert levels(doctor.check_torch(found(volta, "12.6", cuda_12_6))) == [OK]

    (fault,) = doctor.check_bitsandbytes(found(volta, "13.0", cuda_13))
    assert fault.what == ("bitsandbytes for CUDA 13.0 has no kernels for GPU 0 (Tesla V100, compute capability 7.0)")
    assert "cu126" in fault.remedy
    (fault,) = doctor.check_bitsandbytes(found(blackwell, "12.6", cuda_12_6))
    assert "CUDA 13" in fault.remedy
    (fault,) = doctor.check_bitsandbytes(found(maxwell, "12.6", cuda_12_6))
    assert fault.remedy == "set model.quantization=none and optim.name=adamw"
    monkeypatch.setattr(doctor, "nf4_error", lambda device: 0.1)
    monkeypatch.setattr(doctor, "adamw8bit_step", lambda device: (torch.uint8, 1.0))
    for gpu, cuda in ((volta, "12.6"), (volta, "12.8"), (blackwell, "12.8"), (blackwell, "13.0")):
        assert levels(doctor.check_bitsandbytes(found(gpu, cuda, ()))) == [OK, OK]


def test_a_gpu_that_emulates_bf16_is_reported(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda i: (14 * 2**30, 15 * 2**30))
    turing, ampere = doctor.check_gpus(lambda: Gpus(2, (Gpu("Tesla T4", 7, 5), Gpu("A100", 8, 0)), "2", "13.0"))
    assert (turing.level, turing.remedy) == (WARN, "set model.precision=fp16")
    assert turing.what == ("GPU 0: Tesla T4, compute capability 7.5, 15 GiB (14 free), bf16 is emulated and slow")
    assert (ampere.level, ampere.remedy) == (OK, "")


def test_a_compiler_that_fails_is_reported(tmp_path: Path):
    assert compile_complaint(shutil.which("c++") or "c++") is None
    assert compile_complaint(str(tmp_path / "none")) == "No such file or directory"
    broken = tmp_path / "c++"
    broken.write_text("#!/bin/sh\necho 'fatal error: Python.h: No such file' >&2\nexit 1\n")
    broken.chmod(0o755)
    assert compile_complaint(str(broken)) == "fatal error: Python.h: No such file"


def test_a_missing_compiler_and_a_missing_ninja_are_warnings(monkeypatch, tmp_path: Path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    found = list(doctor.check_compiler(tmp_path / "bin"))
    assert found[0].what == "no C++ compiler" and found[1].what.startswith("ninja is neither in")
    assert "apt-get install g++" in found[0].remedy and found[1].remedy == "pip install ninja"
    assert levels(found) == [WARN, WARN]


def test_the_room_on_disk_and_in_shared_memory_is_checked(tmp_path: Path):
    free = shutil.disk_usage(tmp_path).free / 2**30
    assert levels(doctor.check_disk(tmp_path, 0, free / 2)) == [OK]
    assert levels(doctor.check_disk(tmp_path, free / 2, free * 2)) == [WARN]
    assert levels(doctor.check_disk(tmp_path, free * 2, free * 3)) == [FAULT]
    # Without GPUs, no shared memory is needed, because loader processes send bytes. NCCL between GPUs needs some.
    assert levels(doctor.check_shared_memory(tmp_path / "none", num_gpus=1)) == [OK]
    (found,) = doctor.check_shared_memory(tmp_path / "none", num_gpus=4)
    assert str(found) == (
        f"WARN  0 MiB of shared memory free in {tmp_path / 'none'}; NCCL may need 1 GiB between 4 GPUs "
        "→ start the container with --shm-size=1g"
    )
    assert levels(doctor.check_semaphores()) == [OK]


IN_A_SMALL_SHM = 'mount -t tmpfs -o size=4k,nr_inodes=$0 shm /dev/shm && exec "$@"'


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small /dev/shm needs root")
def test_a_full_dev_shm_is_reported_and_limits_packing_to_one_process(pictures: Path, tmp_path: Path):
    def run(*words: str) -> subprocess.CompletedProcess[str]:
        command = ["unshare", "-m", "bash", "-c", IN_A_SMALL_SHM, "1", sys.executable, *words]
        return subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=120, cwd=ROOT)

    doctor_code = "from kfood_dist.doctor import checks as doctor; print(*doctor.check_semaphores())"
    assert run("-c", doctor_code).stdout.startswith("FAULT no semaphore can be made (No space left on device) → ")
    pack = ["-m", "kfood_dist", "pack", str(pictures), str(tmp_path / "shards"), "--workers"]
    several = run(*pack, "2")
    assert several.returncode == 2, several.stderr
    assert "worker processes cannot be started (No space left on device) → see `kfood doctor`" in several.stderr
    one = run(*pack, "1")
    assert one.returncode == 0, one.stderr


@pytest.mark.parametrize(
    ("name", "level", "message"),
    [
        ("fine", OK, "temporary files and sockets in"),
        ("x" * 100, WARN, "AF_UNIX path too long"),
        ("none", WARN, "is used"),
    ],
)
def test_the_folder_for_temporary_files_is_checked(tmp_path_factory, monkeypatch, name: str, level: str, message: str):
    folder = tmp_path_factory.mktemp("t") / name
    if name != "none":
        folder.mkdir()
    monkeypatch.setenv("TMPDIR", str(folder))
    monkeypatch.setattr(tempfile, "tempdir", None)
    (found,) = doctor.check_temporary_files()
    assert found.level == level and message in found.what and str(folder) in found.what
    assert not list(folder.parent.glob("*/pymp-*"))


def test_a_damaged_shard_is_found(tiny_shards: Path, tmp_path: Path):
    copy = shutil.copytree(tiny_shards, tmp_path / "shards")
    assert levels(doctor.examine("shards", lambda: doctor.check_shards(copy))) == [OK]
    tar = next(copy.glob("test-*.tar"))
    tar.write_bytes(tar.read_bytes()[:-512])
    (found,) = doctor.examine("shards", lambda: doctor.check_shards(copy))
    assert found.level == FAULT and "bytes, not the" in found.what and "kfood verify" in found.remedy


def test_pictures_that_do_not_fit_the_model_are_reported(tiny_model: Path, pictures: Path, tmp_path: Path, capsys):
    assert main(["pack", str(pictures), str(tmp_path / "odd"), "--image-size", "50"]) == 0
    (found,) = doctor.examine("model", lambda: doctor.check_model(str(tiny_model), tmp_path / "odd"))
    assert found.level == FAULT and "50 is not a multiple of the model's 28 pixels" in found.what


def test_torchvision_is_optional_but_must_load_if_installed(tmp_path: Path, monkeypatch):
    info = tmp_path / "torchvision-0.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: torchvision\nVersion: 0.0\n")
    (tmp_path / "torchvision.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')")
    assert levels(doctor.check_torchvision()) == [OK]
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "torchvision", raising=False)
    (found,) = doctor.check_torchvision()
    assert found.level == FAULT and found.what.startswith("torchvision 0.0 does not load")
