"""A real two-node Slurm on this machine: its own controller and two node daemons, which it ends by process id."""

import getpass
import os
import secrets
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path

import psutil
from running import ROOT, environment

HERE = Path(__file__).parent
COMMANDS = ("slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue", "scancel")
NODES = ("node1", "node2")
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")


def missing() -> list[str]:
    """Return Slurm's commands that this machine does not have."""
    return [name for name in COMMANDS if _which(name) is None]


def _which(name: str) -> str | None:
    return shutil.which(name, path=os.environ.get("PATH", "") + ":/usr/sbin:/sbin")


class MiniSlurm:
    """The daemons of one Slurm and their folder."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.daemons: dict[str, subprocess.Popen[bytes]] = {}
        port = _three_free_ports()
        words = {"DIR": folder, "HOST": socket.gethostname(), "USER": getpass.getuser()}
        words |= {"PORT": port, "NODE1": port + 1, "NODE2": port + 2}
        for name in ("state", "spool/node1", "spool/node2", "run", "log"):
            (folder / name).mkdir(parents=True)
        for name in ("slurm.conf", "gres.conf"):
            text = (HERE / name).read_text()
            for word, value in words.items():
                text = text.replace(f"@{word}@", str(value))
            (folder / name).write_text(text)
        (folder / "site.env").write_text(SITE)
        self.environment = environment() | {
            "SLURM_CONF": str(folder / "slurm.conf"),
            "KFOOD_SITE": str(folder / "site.env"),
        }

    def version(self) -> tuple[int, ...]:
        """Return Slurm's version, for example (22, 5)."""
        return tuple(map(int, self.run("sbatch", "--version").split()[1].split(".")[:2]))

    def start(self) -> None:
        self._start("slurmctld", "slurmctld", "-D")
        for node in NODES:
            self.start_node(node)
        states = ("sinfo", "-h", "-N", "-p", "gpu", "-o", "%T")
        self.until(lambda: self.run(*states).split() == ["idle"] * 2, 60, "the nodes to be idle")

    def start_node(self, node: str) -> None:
        self._start(node, "slurmd", "-D", "-N", node)

    def _start(self, name: str, command: str, *words: str) -> None:
        with open(self.folder / "log" / f"{name}.out", "ab") as log:
            path = _which(command)
            assert path
            self.daemons[name] = subprocess.Popen([path, *words], stdout=log, stderr=log, env=self.environment)

    def cancel_all(self) -> None:
        """Cancel all jobs and kill their processes. Waits until the queue is empty."""
        self.run("scancel", "--user", getpass.getuser(), check=False)
        for process, _ in list(self._processes()):
            with suppress(psutil.NoSuchProcess):
                process.kill()
        self.until(lambda: not self.run("squeue", "-h"), 60, "the queue to be empty")

    def stop(self) -> None:
        """End all jobs, then the daemons."""
        try:
            self.cancel_all()
        finally:
            for process in self.daemons.values():
                process.terminate()
            for process in self.daemons.values():
                process.wait(30)

    def lose_node(self, node: str) -> None:
        """Kill a node's daemon and all processes of jobs there, as if the node were lost."""
        daemon = self.daemons.pop(node)
        daemon.kill()
        daemon.wait()
        here = [process for process, its in self._processes() if its.get("SLURMD_NODENAME") == node]
        steps = [parent for process in here if (parent := process.parent()) and parent.name() == "slurmstepd"]
        for process in {*steps, *here}:
            with suppress(psutil.NoSuchProcess):
                process.kill()

    def kill(self, job: str) -> None:
        """Kill all processes of a job. They are suspended first, so none can react to the death of another."""
        here = [process for process, its in self._processes() if its["SLURM_JOB_ID"] == job]
        for do in (psutil.Process.suspend, psutil.Process.kill):
            for process in here:
                with suppress(psutil.NoSuchProcess):
                    do(process)

    def _processes(self) -> Iterator[tuple[psutil.Process, dict[str, str]]]:
        """Yield all processes of this Slurm's jobs with their environment."""
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                its = process.environ()
                if its.get("SLURM_CONF") == self.environment["SLURM_CONF"] and "SLURM_JOB_ID" in its:
                    yield process, its

    def run(self, *words: str, check: bool = True) -> str:
        done = subprocess.run(words, capture_output=True, text=True, env=self.environment, timeout=60, check=False)
        assert not check or done.returncode == 0, (words, done.stdout, done.stderr)
        return done.stdout.strip()

    def sbatch(self, *words: str | Path, sourced: bool = True, unset: Sequence[str] = ()) -> str:
        """Submit a job from the checkout as a user does, and return its id.

        Runs `source site.env` first if `sourced`, and removes the variables `unset`. The log goes to this folder.
        """
        log = f"--output={self.folder}/%A_%a.log" if any("array" in str(w) for w in words) else self._log("%j")
        source = 'source "$KFOOD_SITE" && ' if sourced else ""
        without = " ".join(f"-u {name}" for name in unset)
        done = subprocess.run(
            ["bash", "-c", f'{source}env {without} sbatch "$@"', "bash", "--parsable", log, *map(str, words)],
            capture_output=True, text=True, env=self.environment, cwd=ROOT, timeout=60, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def _log(self, job: str) -> str:
        return f"--output={self.folder}/{job}.log"

    def log(self, job: str) -> str:
        path = self.folder / f"{job}.log"
        return path.read_text(errors="replace") if path.exists() else ""

    def facts(self, job: str) -> dict[str, str]:
        """Return the output of `scontrol show job` as a dictionary."""
        words = self.run("scontrol", "show", "job", "-o", job).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def wait(self, job: str, timeout_s: float = 150) -> dict[str, str]:
        """Wait until a job has ended finally, and return its facts."""
        self.until(lambda: self.facts(job)["JobState"] in ENDED, timeout_s, f"the end of job {job}", job)
        return self.facts(job)

    def until(self, done: Callable[[], bool], timeout_s: float, what: str, job: str | None = None) -> None:
        deadline = time.monotonic() + timeout_s
        while not done():
            if time.monotonic() > deadline:
                state = self.run("squeue", "--long", check=False) + "\n" + self.run("sinfo", "--long", check=False)
                raise AssertionError(f"waited {timeout_s} s for {what}\n{state}\n{self.log(job) if job else ''}")
            time.sleep(0.5)

    def ranks(self, job: str, node: str | None = None) -> list[psutil.Process]:
        """Return the training processes of a job without their loaders: one per node in these tests."""
        of_job = {p.pid: (p, its) for p, its in self._processes() if its["SLURM_JOB_ID"] == job and "RANK" in its}
        return [
            process
            for process, its in of_job.values()
            if process.ppid() not in of_job and node in (None, its["SLURMD_NODENAME"])
        ]

    def pause(self, job: str) -> None:
        """Suspend the ranks. Slurm can also wake them: it sends SIGCONT with each of its signals."""
        for rank in self.ranks(job):
            with suppress(psutil.NoSuchProcess):
                rank.suspend()

    def wake(self, job: str) -> None:
        for rank in self.ranks(job):
            with suppress(psutil.NoSuchProcess):
                rank.resume()


SITE = """
KFOOD_MODULES=""
KFOOD_VENV=""
KFOOD_CONTAINER=""
KFOOD_SCRATCH=""
KFOOD_MAX_STARTS=3
KFOOD_END_TOGETHER=15
KFOOD_NODE_TIMEOUT=10
export CUDA_VISIBLE_DEVICES= OMP_NUM_THREADS=1
"""


def _three_free_ports() -> int:
    """Return the first of three free ports in a row. The choice is random, because another suite may look too."""
    while True:
        first = 16_000 + 3 * secrets.randbelow(5_000)
        with suppress(OSError), ExitStack() as probes:
            for port in range(first, first + 3):
                probes.enter_context(socket.socket()).bind(("", port))
            return first
