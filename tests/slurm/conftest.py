"""One Slurm for all tests of this folder; skipped with the reason where the packages are missing."""

from collections.abc import Iterator

import pytest
from mini_slurm import MiniSlurm, missing


@pytest.fixture(autouse=True)
def no_job_is_left(slurm: MiniSlurm) -> Iterator[None]:
    """What a test leaves running, such as one that failed, must not hold up the next."""
    yield
    slurm.cancel_all()


@pytest.fixture(scope="session")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MiniSlurm]:
    if absent := missing():
        pytest.skip(f"no {', '.join(absent)} here: apt-get install --no-install-recommends slurm-wlm munge")
    cluster = MiniSlurm(tmp_path_factory.mktemp("slurm"))
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()
