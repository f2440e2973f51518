"""`kfood doctor`: what this machine has, what is missing, and the command that fixes it.

    each check ──► Findings (OK, WARN or FAULT, what was found, the remedy) ──► one line each ──► 1 if any fault

Always holds: a check tries the operation itself if that takes only seconds, and reports what happened. If a check
crashes, that is a fault, and the other checks still run. Nothing is downloaded, and no file stays behind.
"""

import argparse
import importlib
import importlib.metadata
import io
import multiprocessing
import os
import shutil
import socket
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import redirect_stdout
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from kfood_dist.doctor.finding import FAULT, OK, WARN, Finding
from kfood_dist.doctor.inputs import check_model, check_shards
from kfood_dist.doctor.trials import adamw8bit_step, compile_complaint, nf4_error
from kfood_dist.errors import KfoodError, first_line
from kfood_dist.system import gpus
from kfood_dist.system.gpus import Gpus
from kfood_dist.system.packages import version
from kfood_dist.system.processes import quiet_loggers
from kfood_dist.system.words import plural

DISTRIBUTION = "kfood_dist"

PYTHONS = ((3, 11), (3, 12))  # python_requires in setup.cfg, and the versions that are tested
_GIB = 2**30
_NEEDED_GIB, _WANTED_GIB = 2.0, 20.0  # a run of the tiny model; a 3B model in bf16 with room for shards and runs
# NVIDIA's value for NCCL, which puts the buffers between GPUs into shared memory. Docker gives 64 MiB by default
# (docs.nvidia.com/deeplearning/nccl, "Troubleshooting", shared memory).
_NCCL_SHM_GIB = 1.0

# QLoRA (arXiv 2305.14314): the NF4 error of normally distributed weights is about 9% of their size, and so is the error
# of a product.
_NF4_ERROR = (0.02, 0.2)


Check = Callable[[], Iterable[Finding]]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `kfood doctor`."""
    parser.description = (
        "Try what training needs on this machine, and print the remedy for each fault. The exit status is 1 if there "
        "is a fault. Nothing is downloaded."
    )
    parser.add_argument("--shards", type=Path, metavar="DIR", help="also check that this shard folder can be read")
    parser.add_argument("--model", metavar="BASE", help="also check that this base model is there and fits")


def run(args: argparse.Namespace) -> int:
    """Run every check and print each finding at once. Returns 1 if any finding is a fault."""
    quiet_loggers()
    faults = 0
    for name, check in checks(args.shards, args.model).items():
        for finding in examine(name, check):
            print(finding, flush=True)
            faults += finding.level == FAULT
    print(plural(faults, "fault") if faults else "no faults")
    return 1 if faults else 0


def checks(shards: Path | None, model: str | None) -> dict[str, Check]:
    """Return every check by name, in the order in which they run."""
    found: dict[str, Check] = {
        "python": check_python,
        "packages": check_packages,
        "torch": check_torch,
        "gpu": check_gpus,
        "torchvision": check_torchvision,
        "bitsandbytes": check_bitsandbytes,
        "deepspeed": check_deepspeed,
        "compiler": check_compiler,
        "disk": partial(check_disk, Path.cwd()),
        "shared memory": check_shared_memory,
        "semaphores": check_semaphores,
        "temporary files": check_temporary_files,
    }
    if shards is not None:
        found["shards"] = partial(check_shards, shards)
    if model is not None:
        found["model"] = partial(check_model, model, shards)
    return found


def examine(name: str, check: Check) -> Iterator[Finding]:
    """Yield the findings of one check. A crash of the check is a finding too; for a KfoodError with its remedy."""
    try:
        yield from check()
    except KfoodError as error:
        yield Finding(FAULT, f"{name}: {error.what}", error.remedy)
    except Exception as error:
        yield Finding(FAULT, f"{name}: {type(error).__name__}: {first_line(error)}", _REINSTALL)


_REINSTALL = "install the tested versions: pip install -c launch/constraints.txt -e ."


def check_python(version: tuple[int, int] = sys.version_info[:2]) -> Iterator[Finding]:
    """Check that Python is one of the tested versions."""
    what = f"Python {version[0]}.{version[1]} ({sys.executable})"
    if version in PYTHONS:
        yield Finding(OK, what)
    else:
        yield Finding(FAULT, f"{what} is not 3.11 or 3.12", "make a new environment with python3.11 or python3.12")


def check_packages(distribution: str = DISTRIBUTION) -> Iterator[Finding]:
    """Check that every dependency is installed in a version between the floor and the ceiling of setup.cfg."""
    from packaging.requirements import Requirement

    try:
        wanted = importlib.metadata.requires(distribution) or []
    except importlib.metadata.PackageNotFoundError:
        yield Finding(WARN, f"{distribution} runs from its source folder and is not installed", "pip install -e .")
        return
    requirements = [Requirement(text) for text in wanted]
    needed = [r for r in requirements if r.marker is None or r.marker.evaluate({"extra": ""})]
    faults = [fault for r in needed if (fault := _package_fault(r))]
    for fault in faults:
        yield Finding(FAULT, fault, _REINSTALL)
    if not faults:
        shown = ("torch", "transformers", "accelerate", "peft", "bitsandbytes", "deepspeed")
        versions = ", ".join(f"{r.name} {version(r.name)}" for r in needed if r.name in shown)
        yield Finding(
            OK, f"{plural(len(needed), 'package')} in the stated versions: {versions}" if versions else "no packages"
        )


def _package_fault(requirement: Any) -> str | None:
    if (found := version(requirement.name)) is None:
        return f"{requirement.name} is not installed"
    if not requirement.specifier.contains(found, prereleases=True):
        return f"{requirement.name} is {found}; {requirement.specifier} is needed"
    return None


def check_torch(probe: Callable[[], Gpus] = gpus.probe) -> Iterator[Finding]:
    """Check that torch computes, sees the GPU if the machine has one, and has kernels for it."""
    import torch

    found = probe()
    build = f"CUDA {found.cuda}" if found.cuda else "CPU only"
    assert float(torch.ones(2, 2).matmul(torch.ones(2, 2)).sum()) == 8.0, "the product of 2×2 ones is wrong"
    has_driver = Path("/proc/driver/nvidia/version").exists() or shutil.which("nvidia-smi") is not None
    if fault := gpus.trouble(replace(found, shown=found.shown or int(has_driver and gpus.are_wanted()))):
        yield Finding(FAULT, *fault)
    else:
        yield Finding(OK, f"torch {found.torch} ({build}), {plural(torch.get_num_threads(), 'thread')}")


def check_gpus(probe: Callable[[], Gpus] = gpus.probe) -> Iterator[Finding]:
    """Report each GPU, its memory, and whether it computes in bf16."""
    import torch

    found = probe()
    if not found.usable:
        yield Finding(WARN, "no GPU: training runs on the CPU", "fine for the practice set; a 3B model needs a GPU")
    for i, gpu in enumerate(found.usable):
        free, total = (n / _GIB for n in torch.cuda.mem_get_info(i))
        what = f"GPU {i}: {gpu}, {total:.0f} GiB ({free:.0f} free)"
        if gpu.has_bf16:
            yield Finding(OK, f"{what}, bf16")
        else:
            yield Finding(WARN, f"{what}, bf16 is emulated and slow", "set model.precision=fp16")


def check_torchvision() -> Iterator[Finding]:
    """Check that torchvision loads if it is installed. It is not needed, but a wrong build breaks transformers."""
    if (found := version("torchvision")) is None:
        yield Finding(OK, "torchvision is not installed, and not needed")
        return
    try:
        importlib.import_module("torchvision")
        yield Finding(OK, f"torchvision {found}")
    except Exception as error:
        yield Finding(
            FAULT,
            f"torchvision {found} does not load ({type(error).__name__}), and that breaks transformers",
            "pip uninstall torchvision, or install the one made for this torch",
        )


def check_bitsandbytes(probe: Callable[[], Gpus] = gpus.probe) -> Iterator[Finding]:
    """Check that bitsandbytes multiplies in 4-bit and does an 8-bit AdamW step, on the device that training uses."""
    import torch

    if fault := gpus.find_bitsandbytes_fault(probe()):
        yield Finding(FAULT, *fault)
        return
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    error = nf4_error(device)
    low, high = _NF4_ERROR
    if low < error < high:
        yield Finding(OK, f"bitsandbytes multiplies in NF4 on {device} (relative error {error:.3f})")
    else:
        yield Finding(
            FAULT, f"bitsandbytes in NF4 on {device}: relative error {error:.3f}, not {low} to {high}", _REINSTALL
        )
    dtype, moved = adamw8bit_step(device)
    if dtype == torch.uint8 and 0.9 < moved < 1.1:
        yield Finding(OK, f"bitsandbytes does an AdamW step with 8-bit states on {device}")
    else:
        yield Finding(
            FAULT,
            f"bitsandbytes' AdamW8bit on {device}: states in {dtype}, a first step of {moved:.2f} learning rates",
            _REINSTALL,
        )


def check_deepspeed() -> Iterator[Finding]:
    """Check that DeepSpeed can be imported."""
    with redirect_stdout(io.StringIO()):  # it prints a greeting on standard output
        deepspeed = importlib.import_module("deepspeed")
    yield Finding(OK, f"deepspeed {deepspeed.__version__} can be imported")


def check_compiler(programs: Path = Path(sys.executable).parent) -> Iterator[Finding]:
    """Check the tools with which DeepSpeed builds optional ops: a C++ compiler, Python's headers, ninja.

    One of these ops is AdamW on the CPU, for offloading. No shipped recipe needs any. `programs` is the folder of
    programs of this environment.
    """
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        yield Finding(
            WARN, "no C++ compiler", "fine for the shipped recipes; to offload the optimiser: sudo apt-get install g++"
        )
    elif fault := compile_complaint(compiler):
        remedy = f"sudo apt-get install python{sys.version_info[0]}.{sys.version_info[1]}-dev g++"
        yield Finding(WARN, f"{compiler} does not build an extension ({fault})", remedy)
    else:
        yield Finding(OK, f"{compiler} builds extensions")
    if shutil.which("ninja", path=f"{programs}{os.pathsep}{os.environ.get('PATH', '')}") is None:
        yield Finding(WARN, f"ninja is neither in {programs} nor on the PATH", "pip install ninja")


def check_disk(folder: Path, needed_gib: float = _NEEDED_GIB, wanted_gib: float = _WANTED_GIB) -> Iterator[Finding]:
    """Check the free space in the current folder, because runs and shards are written below it by default."""
    free = shutil.disk_usage(folder).free / _GIB
    what = f"{free:.1f} GiB free in {folder}"
    remedy = "make room, or put shards and run.dir on another disk"
    if free < needed_gib:
        yield Finding(FAULT, f"{what}, less than {needed_gib:g}", remedy)
    elif free < wanted_gib:
        yield Finding(WARN, f"{what}; a 3B model and its runs need {wanted_gib:g}", remedy)
    else:
        yield Finding(OK, what)


def check_shared_memory(folder: Path = Path("/dev/shm"), num_gpus: int | None = None) -> Iterator[Finding]:
    """Check that NCCL has room in shared memory for its buffers between GPUs. Loader processes need none.

    `num_gpus` is how many GPUs of this machine one run uses. The default is all of them.
    """
    if num_gpus is None:
        import torch

        num_gpus = torch.cuda.device_count()
    free = shutil.disk_usage(folder).free / _GIB if folder.is_dir() else 0.0
    what = f"{free * 1024:,.0f} MiB of shared memory free in {folder}"
    if num_gpus > 1 and free < _NCCL_SHM_GIB:
        remedy = "start the container with --shm-size=1g"
        yield Finding(WARN, f"{what}; NCCL may need {_NCCL_SHM_GIB:g} GiB between {num_gpus} GPUs", remedy)
    else:
        yield Finding(OK, what)


def check_semaphores() -> Iterator[Finding]:
    """Check that semaphores can be made. They are files in /dev/shm, and packing in several processes needs some."""
    try:
        multiprocessing.get_context("fork").Lock()
        yield Finding(OK, "semaphores can be made")
    except OSError as error:
        remedy = "make /dev/shm writable and make room there; until then pack with --workers 1"
        yield Finding(FAULT, f"no semaphore can be made ({error.strerror})", remedy)


def check_temporary_files() -> Iterator[Finding]:
    """Check that a file and a socket can be made in the folder for temporary files, TMPDIR or another.

    The socket has a name of the length that multiprocessing uses.
    """
    try:
        with tempfile.TemporaryDirectory(prefix="pymp-") as folder, socket.socket(socket.AF_UNIX) as listener:
            (Path(folder) / "file").write_bytes(b"some bytes")
            try:
                listener.bind(f"{folder}/listener-12345678")
                too_long = None
            except OSError as error:
                too_long = str(error)
    except OSError as error:
        yield Finding(FAULT, f"no temporary file can be written ({error})", _TMPDIR_REMEDY)
        return
    used, wanted = tempfile.gettempdir(), os.environ.get("TMPDIR")
    if wanted and os.path.realpath(wanted) != os.path.realpath(used):
        yield Finding(WARN, f"TMPDIR is {wanted}, which cannot be written to; {used} is used", _TMPDIR_REMEDY)
    elif too_long:
        what = f"no socket works in the temporary folder {used} ({too_long}); training needs none, but a library may"
        yield Finding(WARN, what, _TMPDIR_REMEDY)
    else:
        yield Finding(OK, f"temporary files and sockets in {used}")


_TMPDIR_REMEDY = "set TMPDIR to a local folder with a short path and free space, such as /tmp"
