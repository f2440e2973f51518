"""One run to a directory."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from kfood_dist.errors import LaunchError
from kfood_dist.system.locks import hold, require_free

HOLD = """
import sys
from pathlib import Path
from kfood_dist.system.locks import hold
with hold(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def other(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that trains in `tmp_path`."""
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdin=pipe, stdout=pipe, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_a_directory_in_use_is_refused_at_once(other: subprocess.Popen[str], tmp_path: Path) -> None:
    for take in (require_free, lambda folder: hold(folder).__enter__()):
        with pytest.raises(LaunchError, match=f"another process is training in {tmp_path} → wait for it"):
            take(tmp_path)
    other.communicate("")
    require_free(tmp_path)


def test_a_directory_that_cannot_be_is_not_in_use(tmp_path: Path) -> None:
    require_free(tmp_path / ("x" * 300))
