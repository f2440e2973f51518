"""The tests' fork server: a rank that dies or hangs ends its test with its log, and no state leaks to the next test."""

import atexit
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import torch.distributed as dist
from forked import run_ranks, start_ranks
from running import ROOT, environment, wait_until


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
    with start_ranks(say_and, "hang", **how(tmp_path)) as ranks:
        wait_until(ranks, lambda: len(pids("".join(ranks.outputs))) == 2)
        message = r"ranks did not end within 0 s:\nrank 0 has pid \d+\nrank 1 "
        with pytest.raises(AssertionError, match=message) as raised:
            ranks.wait(timeout_s=0.1)
        found = pids(str(raised.value))
        assert len(found) == 2 and not any(map(psutil.pid_exists, found))


@pytest.mark.parametrize(("do", "status"), [("exit", 3), ("raise", 1), ("die", -signal.SIGSEGV)])
def test_a_rank_that_fails_ends_the_others_and_all_output_is_kept(tmp_path: Path, do: str, status: int) -> None:
    ended = run_ranks(say_and, do, **how(tmp_path), grace_s=0.5)
    assert ended.statuses == (-signal.SIGKILL, status) and ended.killed == (0,)
    with pytest.raises(AssertionError, match=r"the ranks \(0,\) did not end by themselves"):
        _ = ended.status
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
                "environment": dict(os.environ),
                "is_session_leader": os.getsid(0) == os.getpid(),
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


def test_no_state_of_one_run_leaks_into_the_next(tmp_path: Path) -> None:
    first, second = (run_ranks(tell_and_change, **how(tmp_path)) for _ in range(2))
    assert first.statuses == second.statuses == (0, 0), first.output + second.output
    given = {**environment(), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "WORLD_SIZE": "2"}
    given |= {"LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    for rank in range(2):
        found, again = json.loads(first.outputs[rank]), json.loads(second.outputs[rank])
        assert found["environment"].pop("MASTER_PORT") != again["environment"].pop("MASTER_PORT")
        assert found == again
        assert found["environment"] == given | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        assert found["folder"] == str(tmp_path) and found["threads"] == 1 and found["is_session_leader"]
        assert not found["group"] and not found["patched"]


def end_with(how_it_ends: str) -> int:
    atexit.register(print, "the exit handler ran")
    if how_it_ends == "thread":
        threading.Thread(target=lambda: (time.sleep(0.3), print("the thread ended"))).start()
    elif how_it_ends == "text":
        sys.exit("a text")
    elif how_it_ends == "nothing":
        sys.exit()
    elif how_it_ends == "closed":
        sys.stdout = None  # type: ignore[assignment]
    return 0


@pytest.mark.parametrize(
    ("how_it_ends", "status", "output"),
    [
        ("thread", 0, "the thread ended\nthe exit handler ran\n"),
        ("text", 1, "a text\nthe exit handler ran\n"),
        ("nothing", 0, "the exit handler ran\n"),
        ("closed", 0, ""),
    ],
)
def test_a_rank_ends_like_a_launched_process(tmp_path: Path, how_it_ends: str, status: int, output: str) -> None:
    ended = run_ranks(end_with, how_it_ends, **how(tmp_path, ranks=1))
    assert (ended.status, ended.output) == (status, output)


def describe_server() -> None:
    print(os.getppid(), "torch" in sys.modules and "deepspeed" in sys.modules)


def test_a_server_that_was_killed_is_started_again_as_at_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With all imports, and without the environment of the test that happens to start it."""
    server, _ = run_ranks(describe_server, **how(tmp_path, ranks=1)).output.split()
    (killed := psutil.Process(int(server))).kill()
    while killed.status() != psutil.STATUS_ZOMBIE:
        time.sleep(0.01)
    monkeypatch.setenv("ONLY_OF_THIS_TEST", "1")
    again, has_imports = run_ranks(describe_server, **how(tmp_path, ranks=1)).output.split()
    assert again != server and has_imports == "True"
    assert b"ONLY_OF_THIS_TEST" not in Path(f"/proc/{again}/environ").read_bytes()


def test_an_interrupt_while_ranks_start_leaves_none(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    server = psutil.Process(int(run_ranks(describe_server, **how(tmp_path, ranks=1)).output.split()[0]))
    interrupts = 0
    for tries in range(40):
        timer = threading.Timer(tries * 0.0005, os.kill, [os.getpid(), signal.SIGINT])
        try:
            timer.start()
            with start_ranks(say_and, "hang", **how(tmp_path)):
                time.sleep(0.2)
        except KeyboardInterrupt:
            interrupts += 1
    assert interrupts == 40
    _, left = psutil.wait_procs(server.children(), timeout=10)  # the server collects killed ranks a little later
    assert left == []
    assert "FileNotFoundError" not in capfd.readouterr().err, "a rank that nobody knew did not find its log's folder"


_HANGING_SUITE = """
import sys
from pathlib import Path
from forked import start_ranks
from test_forked import how, pids, say_and
from running import wait_until

with start_ranks(say_and, "hang", **how(Path(sys.argv[1]))) as ranks:
    wait_until(ranks, lambda: len(pids("".join(ranks.outputs))) == 2)
    print(*pids("".join(ranks.outputs)), flush=True)
    ranks.wait(600)
"""


def test_no_rank_outlives_a_suite_that_is_killed(tmp_path: Path) -> None:
    paths = os.pathsep.join([str(ROOT / "tests"), str(ROOT / "tests/unit"), str(ROOT)])
    suite = subprocess.Popen(
        [sys.executable, "-c", _HANGING_SUITE, str(tmp_path)],
        env={**environment(), "PYTHONPATH": paths},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert suite.stdout is not None
    ranks = [psutil.Process(int(pid)) for pid in suite.stdout.readline().split()]
    server = ranks[0].parent()
    assert len(ranks) == 2 and server is not None
    suite.kill()
    _, left = psutil.wait_procs([server, *ranks], timeout=20)
    assert left == []
    suite.wait()
