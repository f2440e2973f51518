"""How the launcher supervises a run: a stop request that it cannot pass on, and the signals that it handles."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest
from running import ROOT, environment

from kfood_dist.launch.ranks import handled_signals

SUPERVISED = """
import os, sys
from pathlib import Path
from kfood_dist.launch.supervise import Supervisor

supervisor = Supervisor()
child = "import time; print('running', flush=True); time.sleep(2); print('done', flush=True)"
status = supervisor.run([sys.executable, "-c", child], os.environ, Path(sys.argv[1]))
print(supervisor.stop_requested, status)
"""


def test_a_stop_request_that_cannot_be_passed_on_is_reported_and_ends_nothing(tmp_path: Path) -> None:
    run = tmp_path / "run"
    process = subprocess.Popen(
        [sys.executable, "-c", SUPERVISED, str(run)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment(), cwd=ROOT,
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline() == "running\n"
    run.rmdir()
    process.send_signal(signal.SIGUSR1)
    output, errors = process.communicate(timeout=60)
    assert output == "done\nTrue 75\n" and process.returncode == 0
    assert errors == f"the run cannot be asked to stop, and continues: {run}: No such file or directory\n"


@pytest.mark.parametrize(
    ("ignored", "handled"),
    [
        ([], ["SIGINT", "SIGQUIT", "SIGTERM", "SIGHUP"]),
        ([signal.SIGHUP], ["SIGINT", "SIGQUIT", "SIGTERM"]),  # nohup launch/eval.sh
        ([signal.SIGTERM, signal.SIGHUP], ["SIGINT", "SIGQUIT"]),  # the process that the launcher starts to train
    ],
)
def test_the_agent_does_not_handle_signals_that_it_was_started_to_ignore(
    ignored: list[signal.Signals], handled: list[str]
) -> None:
    """torchrun's own handler ends all ranks, even at a signal that `nohup` had set to be ignored."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        for number in before:
            signal.signal(number, signal.SIG_IGN if number in ignored else signal.SIG_DFL)
        assert handled_signals() == handled
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
