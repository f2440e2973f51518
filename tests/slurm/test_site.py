"""The settings of site.env, under a real Slurm. Packing represents every command that a job runs."""

import sysconfig
import venv
from pathlib import Path

import pytest
from mini_slurm import MiniSlurm


@pytest.fixture
def environment(tmp_path: Path) -> Path:
    """Return a virtual environment with this one's packages. Each Python that starts in it logs a line to `started`."""
    folder = tmp_path / "env"
    venv.create(folder, symlinks=True)
    packages = Path(sysconfig.get_path("purelib", vars={"base": str(folder), "platbase": str(folder)}))
    note = f"import sys; open({str(folder / 'started')!r}, 'a').write(' '.join(sys.orig_argv) + chr(10))"
    (packages / "this.pth").write_text(f"{sysconfig.get_path('purelib')}\n{note}\n")
    return folder


@pytest.fixture
def container(tmp_path: Path, environment: Path) -> Path:
    """Return a script in the role of `apptainer exec`. Inside it, only the image's Python can start, not the host's."""
    path = tmp_path / "container"
    path.write_text(
        "#!/bin/bash\n"
        f'echo "$@" >> {tmp_path}/inside\n'
        'for word in "$@"; do case $word in */bin/python*) echo "no $word in this image"; exit 127 ;; esac; done\n'
        f'PATH={environment}/bin:/usr/bin:/bin exec "$@"\n'
    )
    path.chmod(0o755)
    return path


def pack(slurm: MiniSlurm, pictures: Path, tmp_path: Path) -> str:
    """Pack in a job and return its log."""
    job = slurm.sbatch("--array=1", "slurm/pack.sbatch", pictures, tmp_path / "shards")
    facts = slurm.wait(f"{job}_1")
    log = slurm.log(f"{job}_1")
    assert facts["JobState"] == "COMPLETED", log
    assert (tmp_path / "shards" / "manifest.json").is_file()
    return log


def starts(environment: Path) -> list[str]:
    """Return the command line of each Python that was started in a virtual environment."""
    path = environment / "started"
    return path.read_text().splitlines() if path.exists() else []


def test_the_environment_in_site_env_is_used_before_the_checkouts(
    slurm: MiniSlurm, set_site, environment: Path, pictures: Path, tmp_path: Path
) -> None:
    set_site(KFOOD_VENV=environment)
    pack(slurm, pictures, tmp_path)
    assert any("-m kfood_dist pack" in line for line in starts(environment))


def test_a_container_brings_its_own_python(
    slurm: MiniSlurm, set_site, container: Path, environment: Path, pictures: Path, tmp_path: Path
) -> None:
    set_site(KFOOD_CONTAINER=container)
    pack(slurm, pictures, tmp_path)
    assert "kfood_dist pack" in (tmp_path / "inside").read_text()
    assert any("-m kfood_dist pack" in line for line in starts(environment))


def test_an_environment_named_with_a_container_is_looked_up_inside_it(
    slurm: MiniSlurm, set_site, container: Path, pictures: Path, tmp_path: Path
) -> None:
    """The path does not exist on the host. It exists once the container, which mounts it, has started."""
    (tmp_path / "env").rename(tmp_path / "image")
    text = container.read_text().replace("PATH=", f"[ -e {tmp_path}/env ] || ln -s image {tmp_path}/env; PATH=")
    container.write_text(text.replace(f"PATH={tmp_path}/env/bin:", "PATH="))
    set_site(KFOOD_CONTAINER=container, KFOOD_VENV=tmp_path / "env")
    pack(slurm, pictures, tmp_path)
    assert any("-m kfood_dist pack" in line for line in starts(tmp_path / "env"))


def test_a_missing_environment_is_reported(slurm: MiniSlurm, set_site, pictures: Path, tmp_path: Path) -> None:
    set_site(KFOOD_VENV=tmp_path / "nowhere")
    job = slurm.sbatch("--array=1", "slurm/pack.sbatch", pictures, tmp_path / "shards")
    facts = slurm.wait(f"{job}_1")
    assert (facts["JobState"], facts["ExitCode"]) == ("FAILED", "2:0")
    assert f"{tmp_path}/nowhere/bin/activate" in slurm.log(f"{job}_1")


def test_settings_that_sbatch_did_not_see_are_reported(
    slurm: MiniSlurm, set_site, pictures: Path, tmp_path: Path
) -> None:
    set_site(SBATCH_TIMELIMIT=2, SBATCH_SIGNAL="USR1@20")
    words = ("--array=1", "--partition=gpu", "slurm/pack.sbatch", pictures, tmp_path / "shards")
    limits, logs = [], []
    for sourced in (True, False):
        job = slurm.sbatch(*words, sourced=sourced)
        limits.append(slurm.facts(f"{job}_1")["TimeLimit"])
        assert slurm.wait(f"{job}_1")["JobState"] == "COMPLETED"
        logs.append(slurm.log(f"{job}_1"))
    assert limits == ["00:02:00", "01:00:00"]
    assert "did not see" not in logs[0]
    (line,) = (line for line in logs[1].splitlines() if "did not see" in line)
    assert line.startswith("slurm: sbatch did not see SBATCH_SIGNAL SBATCH_TIMELIMIT of ") and "`source " in line


def test_the_number_of_cores_follows_the_gpus(slurm: MiniSlurm, set_site, pictures: Path, tmp_path: Path) -> None:
    """The site sets the cores per GPU. A packer can ask for no GPU and for its own number of cores.

    If it asks only for no GPU, it gets one core on a Slurm before 23.02. A later Slurm may not accept the job.
    """
    per_gpu = ("SBATCH_CPUS_PER_GPU", "SBATCH_MEM_PER_GPU")
    set_site(SBATCH_GRES="gpu:2", SBATCH_CPUS_PER_GPU=1)
    words = ("--array=1", "slurm/pack.sbatch", pictures, tmp_path / "shards")
    cases = [((), (), "2"), (("--gres=none", "--cpus-per-task=2"), per_gpu, "2")]
    if slurm.version() < (23, 2):
        cases.append((("--gres=none",), (), "1"))
    for more, unset, cores in cases:
        job = slurm.sbatch(*more, *words, unset=unset)
        facts = slurm.wait(f"{job}_1")
        assert (facts["JobState"], facts["NumCPUs"]) == ("COMPLETED", cores), slurm.log(f"{job}_1")
