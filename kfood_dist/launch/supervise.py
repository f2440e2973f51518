"""Supervise `accelerate launch`: pass a request to stop on to the run, and report how the run ended.

    SIGUSR1, SIGTERM, SIGHUP ──► file STOP in the run directory ──► checkpoint on all ranks ──► status.json ──► status

A batch system signals every process of a job at once. The processes that are started here ignore those signals, so a
warning kills neither a rank nor torchrun's agent. If the launcher is killed, all of them end too. `nohup` starts the
launcher with SIGHUP ignored. Then SIGHUP is not a request to stop, and the run continues.
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

# When a rank has died, torchrun's agent gives the others this many seconds to end.
AGENT_SETTINGS = {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "5"}


class Supervisor:
    """A supervisor of runs. It remembers that the launcher was asked to stop, and asks the current run to stop."""

    def __init__(self) -> None:
        self.stop_requested = False
        self._run_dir: Path | None = None

    def run(self, command: Sequence[str], environment: Mapping[str, str], run_dir: Path, decides: bool = True) -> int:
        """Run `command` to its end. Returns FINISHED, STOPPED, INTERRUPTED, MISTAKE or FAILED.

        If several machines have a launcher, only the one that `decides` distinguishes FINISHED and STOPPED. The others
        may see an old status.json for a while, so they return FINISHED in both cases.
        """
        run_dir.mkdir(parents=True, exist_ok=True)
        if decides:
            try:
                (run_dir / STOP_FILE).unlink(missing_ok=True)  # left by a run that was killed before it could stop
            except OSError as error:
                raise LaunchError(
                    f"{run_dir / STOP_FILE} cannot be removed ({error.strerror})", "remove it by hand"
                ) from None
        self._run_dir = run_dir
        try:
            with self._listening():
                settings = {**AGENT_SETTINGS, console.LOG_VARIABLE: str(run_dir / console.LOG_FILE)}
                child = subprocess.Popen(
                    command, env={**environment, **settings}, preexec_fn=partial(_ignore_stop_requests, os.getpid())
                )
                status = child.wait()
        except KeyboardInterrupt:
            return INTERRUPTED  # the processes that were started end with this one
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
        self.stop_requested = True
        assert self._run_dir is not None
        try:
            (self._run_dir / STOP_FILE).touch()
        except OSError as error:  # a checkpoint could not be written there either
            print(f"the run cannot be asked to stop, and continues: {self._run_dir}: {error.strerror}", file=sys.stderr)


def _ignore_stop_requests(launcher_pid: int) -> None:
    """Ignore requests to stop, and end with the launcher. Runs in the process that is about to become accelerate."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    end_with_parent(launcher_pid)
