"""Only one run may use a run directory at a time."""

import errno
import fcntl
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from kfood_dist.errors import LaunchError
from kfood_dist.system.locks import hold, require_free

HOLD = """
import os, sys
from pathlib import Path
from kfood_dist.system.locks import hold
with hold(Path(sys.argv[1])):
    child = os.fork()
    if child:
        print(child, flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def other(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Yield another process that holds `tmp_path`. It prints the id of its child, which lives until the input ends."""
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdin=pipe, stdout=pipe, text=True) as process:
        yield process
        process.kill()


def child_of(process: subprocess.Popen[str]) -> int:
    assert process.stdout is not None
    return int(process.stdout.readline())


def test_a_directory_in_use_is_refused_at_once(other: subprocess.Popen[str], tmp_path: Path) -> None:
    child_of(other)
    for take in (require_free, lambda folder: hold(folder).__enter__()):
        with pytest.raises(LaunchError, match=f"another process is training in {tmp_path} → wait for it"):
            take(tmp_path)
    other.communicate("")
    require_free(tmp_path)


def test_a_directory_that_cannot_exist_is_not_in_use(tmp_path: Path) -> None:
    require_free(tmp_path / ("x" * 300))


def test_a_child_that_outlives_a_killed_run_does_not_hold_its_directory(
    other: subprocess.Popen[str], tmp_path: Path
) -> None:
    child = child_of(other)
    other.kill()
    other.wait()
    os.kill(child, 0)  # the child is alive
    require_free(tmp_path)


def test_a_file_system_without_locks_gives_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    def unsupported(*_: object) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "lockf", unsupported)
    with hold(tmp_path):
        require_free(tmp_path)
    assert capsys.readouterr().err == (
        f"note: {tmp_path} has no locks (Function not implemented); do not start a second run here\n"
    )
