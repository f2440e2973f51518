"""Keeps watch over `accelerate launch`: passes a request to stop on to the run, and tells how it ended.

    SIGUSR1, SIGTERM, SIGHUP ──► file STOP in the run directory ──► checkpoint on all ranks ──► status.json ──► status

A batch system signals every process of a job at once. What is started here ignores those signals, so that neither a
rank nor torchrun's agent dies of a warning; a launcher that is killed takes all of them along. Under `nohup`, which
starts the launcher with SIGHUP ignored, SIGHUP is no request: the run goes on.
"""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import FrameType

from kfood_dist.errors import FAILED, FINISHED, INTERRUPTED, MISTAKE, STOPPED, LaunchError
from kfood_dist.system import console
from kfood_dist.system.processes import end_with_parent
from kfood_dist.train.run.stop import SIGNALS, STOP_FILE, is_ignored, read_state

# When a rank has died, torchrun's agent gives the others that many seconds.
AGENT_SETTINGS = {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "5"}


class Supervisor:
    """Remembers that the launcher was asked to stop, and asks the run that is under way."""

    def __init__(self) -> None:
        self.asked = False
        self._run_dir: Path | None = None

    def run(self, command: Sequence[str], environment: Mapping[str, str], run_dir: Path, decides: bool = True) -> int:
        """Run `command` to its end; returns FINISHED, STOPPED, INTERRUPTED, MISTAKE or FAILED.

        Of several machines' launchers, the one that `decides` tells finished and stopped apart: the others may see an
        old status.json for a while, and say FINISHED.
        """
        run_dir.mkdir(parents=True, exist_ok=True)
        if decides:
            try:
                (run_dir / STOP_FILE).unlink(missing_ok=True)  # of a run that was killed before it could obey
            except OSError as error:
                raise LaunchError(f"{run_dir / STOP_FILE} is in the way ({error.strerror})", "remove it") from None
        self._run_dir = run_dir
        try:
            with self._listening():
                settings = {**AGENT_SETTINGS, console.LOG_VARIABLE: str(run_dir / console.LOG_FILE)}
                child = subprocess.Popen(
                    command, env={**environment, **settings}, preexec_fn=partial(_deaf, os.getpid())
                )
                status = child.wait()
        except KeyboardInterrupt:
            return INTERRUPTED  # and what was started ends with this process
        if status != 0:
            return MISTAKE if status == MISTAKE else FAILED
        return FINISHED if not decides or read_state(run_dir) == "finished" else STOPPED

    @contextmanager
    def _listening(self) -> Iterator[None]:
        heard = [number for number in SIGNALS if number != signal.SIGHUP or not is_ignored(number)]
        before = {number: signal.signal(number, self._ask) for number in heard}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self.asked = True
        assert self._run_dir is not None
        try:
            (self._run_dir / STOP_FILE).touch()
        except OSError as error:  # nor could a checkpoint be written there now
            print(f"the run cannot be asked to stop, and goes on: {self._run_dir}: {error.strerror}", file=sys.stderr)


def _deaf(launcher_pid: int) -> None:
    """In a process about to become accelerate: hear no request to stop, and end with the launcher."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    end_with_parent(launcher_pid)
