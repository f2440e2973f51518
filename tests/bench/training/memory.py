"""Run one command, and sample the memory of its process tree from /proc until it ends.

    command ──► Popen ──► every SAMPLE_S: sum over the tree ──► the peak of each sum
                    └──► log file ──► the lines that say why it failed

Private memory is that of no other process: what the tree would give back if it ended, without shared pages such as
libraries and mapped weight files. The resident set (RSS) counts a page once in each process that maps it.
"""

import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

SAMPLE_S = 1.0  # one sample takes the kernel some 10 ms per GiB, in which the process waits for its memory map


class CommandFailed(Exception):
    """A command that ended with an error or ran too long. The text says why, in one line."""


@dataclass
class Peak:
    """The largest sums over a process tree, in MiB, and the largest private memory of one of its processes."""

    private_mib: float = 0.0
    rss_mib: float = 0.0
    largest_process_mib: float = 0.0

    def add_sample(self, usages: Sequence[Mapping[str, int]]) -> None:
        """Take one sample: the smaps_rollup of each process, in KiB."""
        private = [sum(u.get(key, 0) for key in _PRIVATE) / 1024 for u in usages]
        self.private_mib = max(self.private_mib, sum(private))
        self.rss_mib = max(self.rss_mib, sum(u.get("Rss", 0) for u in usages) / 1024)
        self.largest_process_mib = max(self.largest_process_mib, *private, 0.0)


_PRIVATE = ("Private_Clean", "Private_Dirty", "Private_Hugetlb", "Swap")


def run(command: Sequence[str], environment: Mapping[str, str], log: Path, timeout_s: float) -> Peak:
    """Run the command to its end, with its output in `log`. Returns the peak memory of its process tree.

    Raises CommandFailed if it ends with an error or takes longer than `timeout_s`.
    """
    peak, deadline = Peak(), time.monotonic() + timeout_s
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, env=dict(environment), stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        while process.poll() is None:
            peak.add_sample([usage for pid in tree(process.pid) if (usage := _usage(pid))])
            if time.monotonic() > deadline:
                raise CommandFailed(f"not finished after {timeout_s:.0f} s; see {log}")
            time.sleep(SAMPLE_S)
    finally:
        end_tree(process)
    if process.returncode:
        raise CommandFailed(f"{_reason(log)} (exit status {process.returncode}; see {log})")
    return peak


def tree(root: int) -> list[int]:
    """Return the process ids of `root` and all its descendants."""
    found, new = [], [root]
    while new:
        pid = new.pop()
        found.append(pid)
        new.extend(_children(pid))
    return found


def _children(pid: int) -> list[int]:
    children: list[int] = []
    with suppress(OSError):  # it has ended
        for task in Path(f"/proc/{pid}/task").iterdir():
            children += map(int, (task / "children").read_text().split())
    return children


def _usage(pid: int) -> dict[str, int]:
    """Return the lines of a process's smaps_rollup in KiB, or nothing if the process has ended."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]
    except OSError:
        return {}
    return {name: int(rest.split()[0]) for name, _, rest in (line.partition(":") for line in lines)}


def end_tree(process: "subprocess.Popen[bytes]") -> None:
    """Kill the process and its descendants if it still runs, and wait for it."""
    if process.poll() is None:
        for pid in reversed(tree(process.pid)):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    process.wait()


def _reason(log: Path) -> str:
    """Return the last line of a log that names an error, or its last line."""
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    errors = [line for line in lines if "Error" in line.partition(":")[0] or line.startswith(("launch", "kfood"))]
    return (errors or lines or ["it printed nothing"])[-1][:300]
