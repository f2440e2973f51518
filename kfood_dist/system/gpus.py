"""The GPUs of this machine: how many its driver shows, which of them torch can use, and whether wheels fit them.

    look ──► a short separate process, which may start CUDA ──► Gpus ──► trouble: what is wrong, and the remedy

NVIDIA's management library also counts GPUs that CUDA cannot use: if the driver is too old, if the fabric manager does
not run, and all GPUs of a machine that MIG splits. So this module counts the GPUs that the CUDA runtime offers.
"""

import ctypes
import json
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from kfood_dist.errors import LaunchError
from kfood_dist.system.words import plural

_TIMEOUT_S = 120
_DEVICES = ("/dev/nvidiactl", "/dev/dxg", "/dev/kfd")  # of NVIDIA, of Linux under Windows (WSL), of AMD
_NOT_LOADED = "no driver is loaded"
_MESSAGES = (
    (_NOT_LOADED, "load it (sudo modprobe nvidia); after a kernel update, reinstall the NVIDIA driver"),
    ("too old", "update the NVIDIA driver, or install torch's wheel for an older CUDA"),
    ("802", "start the fabric manager: sudo systemctl start nvidia-fabricmanager"),
    ("not yet initialized", "start the fabric manager: sudo systemctl start nvidia-fabricmanager"),
    ("803", "reboot: the driver was updated while it was loaded"),
)
_COMPARE = "compare `nvidia-smi` with torch's CUDA version, and check CUDA_VISIBLE_DEVICES"

# PyTorch's CUDA support matrix (RELEASE.md): wheels for CUDA 12.6 have kernels for compute capability 5.0 to 9.0,
# wheels for CUDA 13 have them for 7.5 to 12.0.
_FIRST_OF_CUDA_13, _FIRST_AFTER_CUDA_12_6 = (7, 5), (10, 0)
_OLD_WHEEL = "install torch's wheel for CUDA 12.6 (cu126), which torch has up to 2.14"
_NEW_WHEEL = "install torch's ordinary wheel, for CUDA 13: pip install --force-reinstall torch"
# bitsandbytes' installation guide, 0.50: the lowest compute capability of its library for each CUDA version, and the
# lowest of all.
_BITSANDBYTES_FLOORS = (((13, 0), (7, 5)), ((12, 8), (7, 0)), ((0, 0), (6, 0)))
_BITSANDBYTES_LEAST = (6, 0)


@dataclass(frozen=True)
class Gpu:
    """One GPU that torch can use, and its compute capability."""

    name: str
    major: int
    minor: int

    @property
    def capability(self) -> tuple[int, int]:
        return self.major, self.minor

    @property
    def has_bf16(self) -> bool:
        """Whether it has units for bf16. GPUs have them since Ampere; torch emulates bf16 slowly on older ones."""
        return self.major >= 8

    def __str__(self) -> str:
        return f"{self.name}, compute capability {self.major}.{self.minor}"


@dataclass(frozen=True)
class Gpus:
    """The GPUs found. `shown` counts those that the driver shows, `usable` holds those that the CUDA runtime offers."""

    shown: int = 0
    usable: tuple[Gpu, ...] = ()
    torch: str = ""
    cuda: str | None = None  # the version that torch was built for; None for a wheel without CUDA
    arches: tuple[str, ...] = ()  # of torch's kernels, such as sm_90
    complaint: str = ""  # torch's own warning


def look(ask: "Callable[[], Gpus] | None" = None) -> Gpus:
    """Return the GPUs that a process started now can use. Starts neither CUDA nor torch in this process.

    `ask` replaces the separate process that looks. Raises LaunchError if that process fails.
    """
    if ask is None and not any(map(os.path.exists, _DEVICES)) and not count_shown():
        return Gpus()
    return (ask or _ask)()


def _ask() -> Gpus:
    command = [sys.executable, "-m", "kfood_dist.system.gpus"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S, check=True)
        found = json.loads(done.stdout.splitlines()[-1])
    except (subprocess.SubprocessError, ValueError, IndexError) as error:
        # The `stderr` of a TimeoutExpired is always bytes, as subprocess documents.
        printed = getattr(error, "stderr", None) or str(error)
        text = printed.decode(errors="replace") if isinstance(printed, bytes) else printed
        lines = text.strip().splitlines() or [""]
        raise LaunchError(f"torch cannot look for GPUs ({lines[-1][:200]})", "run `kfood doctor`") from None
    usable = tuple(Gpu(**gpu) for gpu in found.pop("usable"))
    return Gpus(**found | {"usable": usable, "arches": tuple(found["arches"])})


def probe() -> Gpus:
    """Return what torch finds. Runs in this process, and may start CUDA in it."""
    import torch

    with warnings.catch_warnings(record=True) as complaints:
        warnings.simplefilter("always")
        # torch.cuda.device_count() asks NVIDIA's management library instead of the CUDA runtime.
        count = torch._C._cuda_getDeviceCount() if torch.cuda.is_available() else 0
    usable = tuple(Gpu(torch.cuda.get_device_name(i), *torch.cuda.get_device_capability(i)) for i in range(count))
    complaint = " ".join(str(complaints[-1].message).split()) if complaints else ""
    if not any(map(os.path.exists, _DEVICES)):  # torch does not report this
        complaint = _NOT_LOADED
    return Gpus(
        count_shown(), usable, torch.__version__, torch.version.cuda, tuple(torch.cuda.get_arch_list()), complaint
    )


def require_usable() -> None:
    """Raise LaunchError if the machine has GPUs and torch can use none. For a process that trains or evaluates."""
    import torch

    if not torch.cuda.is_available() and (fault := trouble(probe())):
        raise refusal(*fault)


def refusal(what: str, remedy: str) -> LaunchError:
    """Return the error for GPUs that torch cannot use. Training uses the CPU only if the user asks for it."""
    return LaunchError(what, f"{remedy}; `kfood doctor` shows more; CUDA_VISIBLE_DEVICES= trains on the CPU")


def count_shown() -> int:
    """Count the GPUs that NVIDIA's driver shows, usable by CUDA or not. 0 if CUDA_VISIBLE_DEVICES hides all of them."""
    if not are_wanted():
        return 0
    try:
        library = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return 0
    if library.nvmlInit_v2() != 0:  # the driver is older than the library, or none is loaded since a kernel update
        return max(len(list(Path("/dev").glob("nvidia[0-9]*"))), count_plugged())
    count = ctypes.c_uint()
    library.nvmlDeviceGetCount_v2(ctypes.byref(count))
    library.nvmlShutdown()
    return count.value


def count_plugged(devices: Path = Path("/sys/bus/pci/devices")) -> int:
    """Count NVIDIA's display and 3D controllers that are plugged in, with or without a driver."""
    facts = ((path / "vendor", path / "class") for path in devices.glob("*"))
    return sum(vendor.read_text() == "0x10de\n" and kind.read_text().startswith("0x03") for vendor, kind in facts)


def are_wanted() -> bool:
    """Return whether CUDA_VISIBLE_DEVICES leaves any GPU visible. Slurm sets NoDevFiles for a job without a GPU."""
    return os.environ.get("CUDA_VISIBLE_DEVICES") not in ("", "-1", "NoDevFiles")


def trouble(gpus: Gpus) -> tuple[str, str] | None:
    """Return why torch cannot compute on this machine's GPUs, and the remedy, or None if it can."""
    if gpus.shown and not gpus.usable:
        build = f"CUDA {gpus.cuda}" if gpus.cuda else "CPU only"
        what = f"torch {gpus.torch} ({build}) cannot use the {plural(gpus.shown, 'GPU')} of this machine"
        if not gpus.cuda:
            return what, "install the ordinary torch wheel: pip install --force-reinstall torch"
        remedy = next((remedy for sign, remedy in _MESSAGES if sign in gpus.complaint), _COMPARE)
        return (f"{what} ({gpus.complaint[:300]})" if gpus.complaint else what), remedy
    for i, gpu in enumerate(gpus.usable):
        if not has_kernels(gpu, gpus.arches):
            what = f"torch {gpus.torch} (CUDA {gpus.cuda}) has no kernels for GPU {i} ({gpu})"
            return what, wheel_for(gpu)
    return None


def has_kernels(gpu: Gpu, arches: tuple[str, ...]) -> bool:
    """Return whether kernels of these architectures run on `gpu`. True if no name is one of NVIDIA's.

    Code for sm_XY runs on capability X.Y and on a higher minor version of X. Code for compute_XY is compiled at load
    time for any capability from X.Y on (CUDA C++ Programming Guide, "Binary Compatibility" and "PTX Compatibility").
    """
    judged = [arch.partition("_") for arch in arches if arch.startswith(("sm_", "compute_"))]
    built = [(kind, divmod(int(number), 10)) for kind, _, number in judged if number.isdecimal()]
    return not built or any(
        version <= gpu.capability and (kind == "compute" or version[0] == gpu.major) for kind, version in built
    )


def wheel_for(gpu: Gpu) -> str:
    """Return the remedy that names the torch wheel with kernels for `gpu`."""
    return _OLD_WHEEL if gpu.capability < _FIRST_OF_CUDA_13 else _NEW_WHEEL


def find_bitsandbytes_fault(gpus: Gpus) -> tuple[str, str] | None:
    """Return which GPU bitsandbytes' library for torch's CUDA has no kernels for, and the remedy, or None."""
    if not gpus.cuda:
        return None
    version = tuple(int(part) for part in gpus.cuda.split(".")[:2])
    floor = next(least for first, least in _BITSANDBYTES_FLOORS if version >= first)
    for i, gpu in enumerate(gpus.usable):
        if gpu.capability < _BITSANDBYTES_LEAST:
            remedy = "set model.quantization=none and optim.name=adamw"
        elif gpu.capability < floor:
            remedy = _OLD_WHEEL
        elif version <= (12, 6) and gpu.capability >= _FIRST_AFTER_CUDA_12_6:
            remedy = _NEW_WHEEL
        else:
            continue
        return f"bitsandbytes for CUDA {gpus.cuda} has no kernels for GPU {i} ({gpu})", remedy
    return None


if __name__ == "__main__":
    print(json.dumps(asdict(probe())))
