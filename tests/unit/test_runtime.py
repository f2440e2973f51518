"""Rank variables are read in one place, and a wrong one is a user's mistake, not a crash."""

import errno
import logging
import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import torch
from running import environment

from kfood_dist.errors import CheckpointError, KfoodError, LaunchError
from kfood_dist.system.files import require_writable_folder, write_atomically
from kfood_dist.system.processes import quiet_loggers
from kfood_dist.system.words import plural
from kfood_dist.system.world import World, run_rank


def test_a_process_started_alone_is_rank_0_of_1() -> None:
    world = World.from_environment({})
    assert (world.rank, world.size, world.is_main) == (0, 1, True)
    assert world.gather("x") == ["x"]


def test_the_launchers_variables_are_read() -> None:
    ranks = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1"}
    world = World.from_environment(ranks | {"LOCAL_WORLD_SIZE": "2"})
    assert world == World(rank=3, size=4, local_rank=1, local_size=2)
    assert World.from_environment(ranks).local_size == 4
    assert not world.is_main


@pytest.mark.parametrize(("backend", "device_ids"), [("nccl", [1]), ("gloo", None)])
def test_a_barrier_names_the_device_of_its_rank(
    monkeypatch: pytest.MonkeyPatch, backend: str, device_ids: list[int] | None
) -> None:
    asked: list[object] = []
    monkeypatch.setattr(torch.distributed, "get_backend", lambda: backend)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.distributed, "barrier", lambda **options: asked.append(options["device_ids"]))
    World(rank=3, size=4, local_rank=1).barrier()
    assert asked == [device_ids]


def test_a_mistake_is_reported_by_the_rank_that_found_it(capsys: pytest.CaptureFixture[str]) -> None:
    def work() -> int:
        raise KfoodError("a shard is damaged", "copy it again")

    for rank, message in ((1, "kfood eval: rank 1: a shard is damaged → copy it again\n"), (0, "")):
        with pytest.raises(KfoodError):
            run_rank(World(rank=rank, size=2), "eval", work)
        assert capsys.readouterr().err == message


def test_library_warnings_are_hidden_and_library_errors_are_not() -> None:
    """DeepSpeed sets the level of its logger again when it is imported."""
    logger, message = logging.getLogger("DeepSpeed"), []
    handler = logging.Handler()
    handler.emit = lambda record: message.append(record.getMessage())  # type: ignore[method-assign]
    quiet_loggers()
    quiet_loggers()
    assert len(logger.filters) == 1
    level, _ = logger.level, logger.addHandler(handler)
    try:
        logger.setLevel(logging.WARNING)
        logger.warning("**** You are using ZeRO with an untested optimizer, proceed with caution *****")
        logger.error("out of memory")
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
    assert message == ["out of memory"]


@pytest.mark.parametrize(
    ("message", "text"),
    [
        (plural(1, "fault"), "1 fault"),
        (plural(0, "fault"), "0 faults"),
        (plural(2000, "dish", "dishes"), "2,000 dishes"),
        (plural(1, "class has", "classes have"), "1 class has"),
    ],
)
def test_a_number_agrees_with_its_noun(message: str, text: str) -> None:
    assert message == text


def test_a_rank_that_starts_after_its_launcher_has_ended_ends_too() -> None:
    code = "from kfood_dist.system import processes as r; r.end_with_launcher(); print('goes on')"
    for launcher, goes_on in ((os.getpid(), True), (2**30, False)):
        variables = {"TORCHELASTIC_RUN_ID": "none", "KFOOD_LAUNCHER_PID": str(launcher)}
        done = subprocess.run(
            [sys.executable, "-c", code], env={**environment(), **variables}, capture_output=True, text=True, timeout=60
        )
        assert (done.returncode, done.stdout) == ((0, "goes on\n") if goes_on else (-signal.SIGKILL, ""))


STARTED_BY_A_SHELL = """
import os, subprocess, sys, time
code = "import time, kfood_dist.system.processes as r; r.end_with_launcher(); print(1, flush=True); time.sleep(60)"
child = subprocess.Popen([sys.executable, "-c", code],
    stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
child.stdout.readline()
print(child.pid, flush=True)
os._exit(0)
"""


@pytest.mark.parametrize(
    ("variables", "ends"),
    [
        ({"TORCHELASTIC_RUN_ID": "none"}, True),
        ({"ACCELERATE_MIXED_PRECISION": "no", "ACCELERATE_DYNAMO_BACKEND": "NO"}, True),
        ({"ACCELERATE_MIXED_PRECISION": "no"}, False),
        ({}, False),
    ],
)
def test_a_rank_ends_with_its_launcher_and_a_process_of_a_shell_does_not(variables: dict[str, str], ends: bool) -> None:
    done = subprocess.run(
        [sys.executable, "-c", STARTED_BY_A_SHELL],
        env={**environment(), **variables},
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    rank = psutil.Process(int(done.stdout))
    _, alive = psutil.wait_procs([rank], timeout=5 if ends else 1)
    assert bool(alive) != ends
    if alive:
        rank.kill()


@pytest.mark.parametrize(
    "variables", [{"RANK": "a"}, {"RANK": "1"}, {"RANK": "4", "WORLD_SIZE": "4"}, {"RANK": "-1", "WORLD_SIZE": "2"}]
)
def test_impossible_ranks_are_refused(variables: dict[str, str]) -> None:
    with pytest.raises(LaunchError, match=r"launch/train\.sh"):
        World.from_environment(variables)


def test_an_impossible_output_folder_is_refused_with_the_remedy(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    require_writable_folder(tmp_path / "a" / "b", "--out")
    for folder, fault in ((tmp_path / "file" / "a", "is not a folder"), (tmp_path / ("x" * 300), "name too long")):
        with pytest.raises(KfoodError, match=f"--out .*(?i:{fault}).* → name another folder"):
            require_writable_folder(folder, "--out")


def test_a_file_that_cannot_be_replaced_stays_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """This matters most for the recipe of a run: without it, no start can resume."""
    write_atomically(tmp_path / "recipe.yaml", "the old one")

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(
        CheckpointError, match=r"recipe\.yaml cannot be written \(No space left on device\) → make room"
    ):
        write_atomically(tmp_path / "recipe.yaml", "the new one")
    assert (tmp_path / "recipe.yaml").read_text() == "the old one"
