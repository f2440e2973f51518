"""How a run is asked to stop, and how it says how it stands.

    SIGUSR1, SIGTERM, SIGHUP, or a file STOP in the run directory ──► one rank is asked ──► all agree, once a step
    running, stopped, finished ──► status.json, which the launcher reads

Always holds: a process that was started with a signal ignored goes on ignoring it. So the launcher, which starts its
ranks that way, is the one to hear a batch system that signals every process of a job, and asks by the file.
"""

import json
import os
import signal
from pathlib import Path
from types import FrameType
from typing import Literal

from kfood_dist.system.files import write_whole

SIGNALS = (signal.SIGUSR1, signal.SIGTERM, signal.SIGHUP)
STOP_FILE = "STOP"
STATUS_FILE = "status.json"

State = Literal["running", "stopped", "finished"]


class StopRequest:
    """Whether this rank was asked to stop. The file is rank 0's to look for, and to remove once it was obeyed."""

    def __init__(self, run_dir: Path, is_main: bool):
        self.file = run_dir / STOP_FILE
        self.is_main = is_main
        self._signalled = False

    def listen(self) -> None:
        """Take SIGNALS for a request, but for those that this process was started to ignore."""
        for number in SIGNALS:
            if not is_ignored(number):
                signal.signal(number, self._note)

    def asked(self) -> bool:
        return self._signalled or (self.is_main and os.path.exists(self.file))  # which never raises

    def obeyed(self) -> None:
        """Forget the request, so that the next start goes on."""
        if self.is_main:
            self.file.unlink(missing_ok=True)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._signalled = True


def is_ignored(number: signal.Signals) -> bool:
    """Whether this process ignores a signal, as `nohup` lets it ignore SIGHUP."""
    return signal.getsignal(number) is signal.SIG_IGN


def write_status(run_dir: Path, state: State, step: int) -> None:
    """Say how the run stands: `step` optimiser steps are in a checkpoint. Raises CheckpointError where it cannot."""
    write_whole(run_dir / STATUS_FILE, json.dumps({"state": state, "step": step}) + "\n")


def read_state(run_dir: Path) -> str | None:
    """The state last written, or None."""
    try:
        return str(json.loads((run_dir / STATUS_FILE).read_text(encoding="utf-8"))["state"])
    except (OSError, ValueError, LookupError, TypeError):
        return None
