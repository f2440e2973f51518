"""The memory that this process has used, and the memory that the machine lets it use. In GiB, on Linux.

Private memory is what the process holds alone. Its resident set also counts files that are mapped, such as the weights
of a model while they load. Several ranks share those, and the kernel drops them when memory is short.
"""

import os
import re
from collections.abc import Iterator
from pathlib import Path

GIB = 2**30


def private_peak_gib() -> float:
    """Return the most private memory at one time since `restart_private_peak`, or since the start of the process.

    It is the peak of the resident set without the files that are mapped now.
    """
    kib = _status()
    return (kib["VmHWM"] - kib["RssFile"]) / 2**20


def restart_private_peak() -> None:
    """Let `private_peak_gib` count from now on. Does nothing if the kernel does not allow it (proc(5), clear_refs)."""
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return


def _status() -> dict[str, int]:
    """Return the sizes of this process in KiB, by their names in proc(5)."""
    text = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
    return {name: int(size) for name, size in re.findall(r"^(\w+):\s+(\d+) kB$", text, re.MULTILINE)}


def machine_memory_gib() -> float:
    """Return the memory of this machine, or less if a control group, such as that of a Slurm job, has a limit."""
    return min(_physical_bytes(), *_limits_of_groups(Path("/proc/self/cgroup"), Path("/sys/fs/cgroup"))) / GIB


def _physical_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _limits_of_groups(own: Path, root: Path) -> Iterator[float]:
    """Yield the limits in bytes of this process's control group and those above it, of cgroup version 2 or 1."""
    yield float("inf")
    lines = own.read_text(encoding="utf-8").splitlines() if own.is_file() else []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        names = {"": "memory.max", "memory": "memory/memory.limit_in_bytes"}
        if controllers not in names:
            continue
        folder, _, file = names[controllers].rpartition("/")
        here = root / folder / path.strip("/")
        for group in (here, *here.parents):
            if (group / file).is_file() and (limit := (group / file).read_text(encoding="ascii").strip()) != "max":
                yield float(limit)
            if group == root / folder:
                break
