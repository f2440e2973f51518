"""Requests to stop a run, and the state of the run.

    SIGUSR1, SIGTERM, SIGHUP, or a file STOP in the run directory ──► one rank is asked ──► all agree, once per step
    running, stopped, finished ──► status.json, which the launcher reads

Always holds: a process that is started with a signal ignored keeps ignoring it. The launcher starts its ranks in that
way. So if a batch system signals every process of a job, only the launcher reacts, and it writes the file STOP.
"""

import json
import os
import signal
from pathlib import Path
from types import FrameType
from typing import Literal

from kfood_dist.system.files import write_atomically

SIGNALS = (signal.SIGUSR1, signal.SIGTERM, signal.SIGHUP)
STOP_FILE = "STOP"
STATUS_FILE = "status.json"

State = Literal["running", "stopped", "finished"]


class StopRequest:
    """The request to stop, as this rank sees it. Only rank 0 looks for the file, and removes it after the stop."""

    def __init__(self, run_dir: Path, is_main: bool):
        self.file = run_dir / STOP_FILE
        self.is_main = is_main
        self._signalled = False

    def listen(self) -> None:
        """Treat SIGNALS as a request to stop, except those that this process was started to ignore."""
        for number in SIGNALS:
            if not is_ignored(number):
                signal.signal(number, self._note)

    def is_requested(self) -> bool:
        return self._signalled or (self.is_main and os.path.exists(self.file))  # exists() never raises

    def clear(self) -> None:
        """Remove the file, so that the next start continues the run."""
        if self.is_main:
            self.file.unlink(missing_ok=True)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._signalled = True


def is_ignored(number: signal.Signals) -> bool:
    """Return whether this process ignores a signal. `nohup`, for example, makes it ignore SIGHUP."""
    return signal.getsignal(number) is signal.SIG_IGN


def write_status(run_dir: Path, state: State, step: int) -> None:
    """Write the state of the run to status.json. `step` optimiser steps are in a checkpoint.

    Raises CheckpointError if it cannot be written.
    """
    write_atomically(run_dir / STATUS_FILE, json.dumps({"state": state, "step": step}) + "\n")


def read_state(run_dir: Path) -> str | None:
    """Return the last written state, or None if it cannot be read."""
    try:
        return str(json.loads((run_dir / STATUS_FILE).read_text(encoding="utf-8"))["state"])
    except (OSError, ValueError, LookupError, TypeError):
        return None
