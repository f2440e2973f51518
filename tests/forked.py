"""Ranks without a new interpreter: a server that has imported torch and the package forks each rank.

    start_ranks ──► fork server, started once ──► Ranks over gloo ──► Ended: exit status and output of each

A rank takes its first step after two seconds instead of ten.

Always holds: each rank has its own environment, working folder and session, and each start has its own port. No rank
outlives the block, the server or the suite. A rank that fails ends the others, as under torchrun. Tests that need a
real launch (signals to the launcher, exit statuses, accelerate's own behaviour) use `running.start` or
`running.launch`.
"""

import atexit
import multiprocessing
import os
import secrets
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

# The imports of a rank before its first step. The server must not start threads or parallel regions: a fork loses them.
_PRELOADED = "forked_preload"
_GRACE_S = 5  # the time that torchrun gives the other ranks when one has failed, as supervise.py sets it


@dataclass(frozen=True)
class Ended:
    """The end of all ranks: the exit status of each (negative for a signal) and the output of each."""

    statuses: tuple[int, ...]
    outputs: tuple[str, ...]

    @property
    def output(self) -> str:
        return "".join(self.outputs)

    @property
    def status(self) -> int:
        """The status that the launcher would return: 0, or 2 if a rank ended with 2, else 1."""
        if not any(self.statuses):
            return 0
        return 2 if 2 in self.statuses else 1


class Ranks:
    """Running ranks, each the leader of its own session. `start_ranks` makes them."""

    def __init__(self, processes: "list[multiprocessing.process.BaseProcess]", logs: Path):
        self._processes, self._logs = processes, logs

    @property
    def are_alive(self) -> bool:
        """Whether all ranks are alive."""
        return all(process.is_alive() for process in self._processes)

    @property
    def outputs(self) -> tuple[str, ...]:
        """The output of each rank so far."""
        return tuple(path.read_text(encoding="utf-8", errors="replace") for path in sorted(self._logs.iterdir()))

    def send(self, rank: int, number: signal.Signals) -> None:
        """Send a signal to one rank."""
        pid = self._processes[rank].pid
        assert pid
        os.kill(pid, number)

    def kill(self) -> None:
        """Kill all ranks that still run."""
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join()

    def wait(self, timeout_s: float, grace_s: float = _GRACE_S) -> Ended:
        """Wait until all ranks have ended. When one has failed, kill the others after `grace_s`.

        Kills all ranks and raises AssertionError with their output if they do not end within `timeout_s`.
        """
        deadline, failed = time.monotonic() + timeout_s, False
        while alive := [process for process in self._processes if process.exitcode is None]:
            if not failed and any(process.exitcode for process in self._processes):
                failed, deadline = True, min(deadline, time.monotonic() + grace_s)
            if not wait([process.sentinel for process in alive], timeout=max(0.0, deadline - time.monotonic())):
                self.kill()
                assert failed, f"ranks did not end within {timeout_s:.0f} s:\n{''.join(self.outputs)}"
        return Ended(tuple(process.exitcode or 0 for process in self._processes), self.outputs)


@contextmanager
def start_ranks(
    work: Callable[..., int | None],
    *words: Any,
    ranks: int,
    environment: Mapping[str, str],
    folder: Path,
    deepspeed: bool = False,
) -> Iterator[Ranks]:
    """Call `work(*words)`, a function of a module, as `ranks` ranks in `folder`. It returns a rank's exit status.

    Each rank has one thread, however many cores the suite has at the moment. No rank is left after the block.
    """
    settled = {**environment, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    if ranks > 1 or deepspeed:
        settled |= {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
        settled |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
    if deepspeed:
        settled["ACCELERATE_USE_DEEPSPEED"] = "true"
    with tempfile.TemporaryDirectory(prefix="ranks-") as logs:
        processes = []
        for rank in range(ranks):
            own = {"RANK": str(rank), "LOCAL_RANK": str(rank)} if "WORLD_SIZE" in settled else {}
            words_of_rank = (work, words, {**settled, **own}, str(folder), f"{logs}/{rank}")
            processes.append(_server().Process(target=_become_rank, args=words_of_rank))
            processes[-1].start()
        started = Ranks(processes, Path(logs))
        try:
            yield started
        finally:
            started.kill()


def run_ranks(
    work: Callable[..., int | None], *words: Any, timeout_s: float = 300, grace_s: float = _GRACE_S, **how: Any
) -> Ended:
    """Run `start_ranks` with the same arguments to the end. Raises AssertionError as `Ranks.wait` does."""
    with start_ranks(work, *words, **how) as ranks:
        return ranks.wait(timeout_s, grace_s)


@cache
def _server() -> "multiprocessing.context.ForkServerContext":
    """Return the context whose server has imported everything. The server ends with this process."""
    from multiprocessing import forkserver

    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([_PRELOADED])
    here = str(Path(__file__).parent)
    before = dict(os.environ)
    # The server imports by its own path, and DeepSpeed looks for GPUs when it is imported.
    os.environ |= {
        "PYTHONPATH": os.pathsep.join(filter(None, (here, before.get("PYTHONPATH")))),
        "DS_ACCELERATOR": "cpu",
        "CUDA_VISIBLE_DEVICES": "",
    }
    try:
        forkserver.ensure_running()
    finally:
        os.environ.clear()
        os.environ.update(before)
    return context


def _become_rank(
    work: Callable[..., int | None], words: tuple[Any, ...], environment: dict[str, str], folder: str, log: str
) -> None:
    """Set up this process, forked from the server, like a launched one, then call `work` and exit with its status."""
    import torch

    from kfood_dist.system.processes import end_with_parent

    os.setsid()
    end_with_parent(os.getppid())
    descriptor = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    torch.set_num_threads(1)  # OMP_NUM_THREADS was read when the server imported torch
    status = _status_of(work, words)
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # after what a launched process does at its end, and without pytest's own exit handlers


def _status_of(work: Callable[..., int | None], words: tuple[Any, ...]) -> int:
    try:
        return work(*words) or 0
    except SystemExit as exit:
        return exit.code if isinstance(exit.code, int) else 1
    except BaseException:
        traceback.print_exc()
        return 1


def run_verb(words: list[str]) -> int:
    """Run `kfood WORDS` in this rank."""
    from kfood_dist.cli import main

    sys.argv = ["kfood", *words]
    return main(words)


def _free_port() -> int:
    """Return a free port below those that the kernel gives to outgoing connections (32768 and more)."""
    while True:
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", 10_000 + secrets.randbelow(6_000)))
            return int(probe.getsockname()[1])
