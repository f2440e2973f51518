"""Ranks without a new interpreter: a server that has imported torch and the package forks each rank.

    start_ranks ──► fork server, started once ──► Ranks over gloo ──► Ended: exit status and output of each

A rank takes its first step after two seconds instead of ten.

Always holds: each rank has its own environment, working folder and session, and each start has its own port. No rank
outlives the block, the server or the suite, even if the suite is killed. A rank that fails ends the others, as under
torchrun. The server keeps the environment, umask and resource limits that the suite began with: a test that changes
them in its own process does not change them for the ranks. Tests that need a real launch (signals to the launcher,
exit statuses, accelerate's own behaviour) use `running.start` or `running.launch`.
"""

import atexit
import itertools
import multiprocessing
import os
import secrets
import signal
import socket
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

# The imports of a rank before its first step. The server must not start threads or parallel regions: a fork loses them.
_PRELOADED = "forked_preload"
_GRACE_S = 5  # the time that torchrun gives the other ranks when one has failed, as supervise.py sets it
# Process ids for the server: that of the suite's process that starts it, and its own.
SUITE, SERVER = "KFOOD_TESTS_SUITE", "KFOOD_TESTS_SERVER"
# The server's environment, whichever test starts it.
_ENVIRONMENT = dict(os.environ)
# Below the ports that the kernel gives to outgoing connections (32768 and more), above those of Slurm jobs (10000 to
# 29999). Each worker of pytest-xdist has its own ports, and takes them in turn.
_PORTS_PER_WORKER = 300
_WORKER = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")) % 9
_PORTS = itertools.count(secrets.randbelow(_PORTS_PER_WORKER))


@dataclass(frozen=True)
class Ended:
    """The end of all ranks: the exit status of each (negative for a signal) and the output of each.

    `killed` are the ranks that still ran when another one had failed and its grace was over.
    """

    statuses: tuple[int, ...]
    outputs: tuple[str, ...]
    killed: tuple[int, ...] = ()

    @property
    def output(self) -> str:
        return "".join(self.outputs)

    @property
    def status(self) -> int:
        """The status that the launcher would return: 0, or 2 if a rank ended with 2, else 1.

        Raises AssertionError if a rank had to be killed. A test that expects this reads `statuses`.
        """
        assert not self.killed, f"the ranks {self.killed} did not end by themselves:\n{self.output}"
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
        """The output of each rank so far; empty for a rank that has not opened its log."""
        logs = [self._logs / str(rank) for rank in range(len(self._processes))]
        return tuple(log.read_text(encoding="utf-8", errors="replace") if log.exists() else "" for log in logs)

    def send(self, rank: int, number: signal.Signals) -> None:
        """Send a signal to one rank."""
        pid = self._processes[rank].pid
        assert pid
        os.kill(pid, number)

    def kill(self) -> None:
        """Kill all ranks that still run, with the processes that they started."""
        for process in self._processes:
            if process.is_alive() and process.pid:
                with suppress(ProcessLookupError):  # it has no session of its own yet
                    os.killpg(process.pid, signal.SIGKILL)
                process.kill()
        for process in self._processes:
            process.join()

    def wait(self, timeout_s: float, grace_s: float = _GRACE_S) -> Ended:
        """Wait until all ranks have ended. When one has failed, kill the others after `grace_s`.

        Kills all ranks and raises AssertionError with their output if they do not end within `timeout_s`.
        """
        deadline, failed, killed = time.monotonic() + timeout_s, False, ()
        while alive := [process for process in self._processes if process.exitcode is None]:
            if not failed and any(process.exitcode for process in self._processes):
                failed, deadline = True, min(deadline, time.monotonic() + grace_s)
            if not wait([process.sentinel for process in alive], timeout=max(0.0, deadline - time.monotonic())):
                killed = tuple(rank for rank, process in enumerate(self._processes) if process in alive)
                self.kill()
                assert failed, f"ranks did not end within {timeout_s:.0f} s:\n{''.join(self.outputs)}"
        return Ended(tuple(process.exitcode or 0 for process in self._processes), self.outputs, killed)


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
    context = _server()
    with tempfile.TemporaryDirectory(prefix="ranks-") as logs:
        processes: list[multiprocessing.process.BaseProcess] = []
        started = Ranks(processes, Path(logs))
        try:
            with _without_interrupts():  # within a start, they would leave a rank that nobody knows
                for rank in range(ranks):
                    own = {"RANK": str(rank), "LOCAL_RANK": str(rank)} if "WORLD_SIZE" in settled else {}
                    words_of_rank = (work, words, {**settled, **own}, str(folder), f"{logs}/{rank}")
                    process = context.Process(target=_become_rank, args=words_of_rank)
                    process.start()
                    processes.append(process)
            yield started
        finally:
            started.kill()


@contextmanager
def _without_interrupts() -> Iterator[None]:
    """Hold Ctrl-C and pytest-timeout's alarm back until the end of the block. For the main thread, which runs tests."""
    came: list[int] = []
    interrupts = (signal.SIGINT, signal.SIGALRM)
    before = {number: signal.signal(number, lambda number, _: came.append(number)) for number in interrupts}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for number in came:
            signal.raise_signal(number)


def run_ranks(
    work: Callable[..., int | None], *words: Any, timeout_s: float = 300, grace_s: float = _GRACE_S, **how: Any
) -> Ended:
    """Run `start_ranks` with the same arguments to the end. Raises AssertionError as `Ranks.wait` does."""
    with start_ranks(work, *words, **how) as ranks:
        return ranks.wait(timeout_s, grace_s)


def _server() -> "multiprocessing.context.ForkServerContext":
    """Return the context of the server, which runs and has imported everything. It ends with this process.

    A server that was killed is started again.
    """
    from multiprocessing import forkserver

    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([_PRELOADED])
    here = str(Path(__file__).parent)
    before = dict(os.environ)
    # The server imports by its own path, and DeepSpeed looks for GPUs when it is imported.
    settled = {
        **_ENVIRONMENT,
        "PYTHONPATH": os.pathsep.join(filter(None, (here, _ENVIRONMENT.get("PYTHONPATH")))),
        "DS_ACCELERATOR": "cpu",
        "CUDA_VISIBLE_DEVICES": "",
        SUITE: str(os.getpid()),
    }
    try:
        os.environ.clear()
        os.environ.update(settled)
        forkserver.ensure_running()
    finally:
        os.environ.clear()
        os.environ.update(before)
    return context


def _become_rank(
    work: Callable[..., int | None], words: tuple[Any, ...], environment: dict[str, str], folder: str, log: str
) -> None:
    """Set up this process, forked from the server, like a launched one, then call `work` and exit with its status."""
    os.setsid()
    descriptor = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    # multiprocessing does not report an import that fails in the server.
    assert SERVER in os.environ, f"the fork server could not import {_PRELOADED}; try: python -m {_PRELOADED}"
    import torch

    from kfood_dist.system.processes import end_with_parent

    end_with_parent(int(os.environ[SERVER]))
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    torch.set_num_threads(1)  # OMP_NUM_THREADS was read when the server imported torch
    status = _status_of(work, words)
    # What a launched process does at its end: it waits for its threads, calls the exit handlers and flushes.
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with suppress(AttributeError, ValueError):  # it is None or closed
            stream.flush()
    os._exit(status)  # without the exit handlers of multiprocessing, which belong to the server


def _status_of(work: Callable[..., int | None], words: tuple[Any, ...]) -> int:
    try:
        return work(*words) or 0
    except SystemExit as exit:
        if exit.code is None or isinstance(exit.code, int):
            return exit.code or 0
        print(exit.code, file=sys.stderr)
        return 1
    except BaseException:
        traceback.print_exc()
        return 1


def run_verb(words: list[str]) -> int:
    """Run `kfood WORDS` in this rank."""
    from kfood_dist.cli import main

    sys.argv = ["kfood", *words]
    return main(words)


def _free_port() -> int:
    """Return a free port of this worker, the one that was used the longest time ago."""
    for _ in range(_PORTS_PER_WORKER):
        port = 30_000 + _WORKER * _PORTS_PER_WORKER + next(_PORTS) % _PORTS_PER_WORKER
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise AssertionError(f"none of the {_PORTS_PER_WORKER} ports of this worker is free")
