"""One Slurm for all tests of this folder. The tests are skipped with a reason if Slurm's packages are missing."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from mini_slurm import SITE, MiniSlurm, missing


@pytest.fixture(autouse=True)
def no_job_is_left(slurm: MiniSlurm) -> Iterator[None]:
    """Cancel all jobs after each test, because a failed test may leave jobs that block the next test."""
    yield
    slurm.cancel_all()


@pytest.fixture(scope="session")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MiniSlurm]:
    if absent := missing():
        pytest.skip(f"{', '.join(absent)} not found: apt-get install --no-install-recommends slurm-wlm munge")
    cluster = MiniSlurm(tmp_path_factory.mktemp("slurm"))
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()


@pytest.fixture
def set_site(slurm: MiniSlurm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Return a function that sets values in the site.env of this test's jobs."""

    def write(**values: object) -> None:
        lines = [f'{"export " if name.startswith("SBATCH_") else ""}{name}="{value}"' for name, value in values.items()]
        path = tmp_path / "site.env"
        path.write_text(SITE + "\n".join(lines) + "\n")
        monkeypatch.setitem(slurm.environment, "KFOOD_SITE", str(path))

    return write
