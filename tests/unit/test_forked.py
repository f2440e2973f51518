"""The tests' fork server: a rank that dies or hangs ends its test with its log, and no state leaks to the next test."""

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import torch.distributed as dist
from forked import run_ranks, start_ranks
from running import environment


def how(folder: Path, ranks: int = 2) -> dict[str, Any]:
    return {"ranks": ranks, "environment": environment(), "folder": folder}


def say_and(do: str) -> int:
    print(f"rank {os.environ['RANK']} has pid {os.getpid()}", flush=True)
    if do == "hang" or os.environ["RANK"] == "0":
        time.sleep(600)
    if do == "exit":
        sys.exit(3)
    if do == "raise":
        raise RuntimeError("a fault of rank 1")
    os.kill(os.getpid(), signal.SIGSEGV)
    return 0


def pids(output: str) -> list[int]:
    return [int(line.split()[-1]) for line in output.splitlines() if " has pid " in line]


def test_ranks_that_hang_are_killed_and_their_output_is_shown(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match=r"ranks did not end within 2 s:\nrank 0 has pid \d+\nrank 1 ") as raised:
        run_ranks(say_and, "hang", **how(tmp_path), timeout_s=2)
    found = pids(str(raised.value))
    assert len(found) == 2 and not any(map(psutil.pid_exists, found))


@pytest.mark.parametrize(("do", "status"), [("exit", 3), ("raise", 1), ("die", -signal.SIGSEGV)])
def test_a_rank_that_fails_ends_the_others_and_all_output_is_kept(tmp_path: Path, do: str, status: int) -> None:
    ended = run_ranks(say_and, do, **how(tmp_path), grace_s=0.5)
    assert ended.statuses == (-signal.SIGKILL, status)
    assert ("RuntimeError: a fault of rank 1" in ended.output) == (do == "raise")
    found = pids(ended.output)
    assert len(found) == 2 and not any(map(psutil.pid_exists, found))


def test_a_test_that_fails_leaves_no_rank(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), start_ranks(say_and, "hang", **how(tmp_path)) as ranks:
        while len(found := pids("".join(ranks.outputs))) < 2:
            time.sleep(0.01)
        1 / 0  # noqa: B018
    assert not any(map(psutil.pid_exists, found))


def tell_and_change() -> None:
    """Print the state that this rank finds at its start, then change all of it."""
    print(
        json.dumps(
            {
                "environment": sorted(os.environ),
                "folder": os.getcwd(),
                "words": sys.argv,
                "group": dist.is_initialized(),
                "random": torch.rand(1).item(),
                "patched": hasattr(json, "patched"),
                "precision": str(torch.get_default_dtype()),
                "threads": torch.get_num_threads(),
                "usr1": str(signal.getsignal(signal.SIGUSR1)),
            }
        )
    )
    os.environ["LEAKED"] = "1"
    os.chdir("/")
    sys.argv = ["changed"]
    dist.init_process_group("gloo")
    torch.manual_seed(1)
    json.patched = True  # type: ignore[attr-defined]
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(2)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    torch.zeros(1 << 20).share_memory_()


def test_no_state_of_one_run_leaks_into_the_next(tmp_path: Path) -> None:
    before = set(os.listdir("/dev/shm")), sorted(os.environ), os.getcwd()
    first, second = (run_ranks(tell_and_change, **how(tmp_path)) for _ in range(2))
    assert first.statuses == second.statuses == (0, 0), first.output + second.output
    for rank in range(2):
        found = json.loads(first.outputs[rank])
        assert found == json.loads(second.outputs[rank])
        assert found["folder"] == str(tmp_path) and found["threads"] == 1
        assert not found["group"] and not found["patched"] and "LEAKED" not in found["environment"]
    left = {name for name in set(os.listdir("/dev/shm")) - before[0] if name.startswith("torch")}
    assert (left, sorted(os.environ), os.getcwd()) == (set(), *before[1:])
