"""Which rank is blamed when no rank moves. A single process is watched too."""

import json
import os
import subprocess
import sys
import threading
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.distributed import TCPStore

from kfood_dist.system.world import World
from kfood_dist.train.loop import Trainer
from kfood_dist.train.run.watchdog import Seen, Watch, stalled_ranks

NOW = 1000.0


def seen(num_beats: int, moved_s_ago: float, answered_s_ago: float = 0.0, doing: str = "step 7") -> Seen:
    return Seen(num_beats, doing, tick=1, moved=NOW - moved_s_ago, answered=NOW - answered_s_ago)


def test_no_rank_is_blamed_while_all_ranks_move() -> None:
    assert stalled_ranks([seen(5, 59), seen(9, 0)], 60, NOW) == []


def test_the_rank_that_is_behind_is_blamed_not_those_that_wait_for_it() -> None:
    ranks = [seen(12, 61, doing="the update of step 7"), seen(10, 62, doing="reading"), seen(12, 61)]
    assert stalled_ranks(ranks, 60, NOW) == ["rank 1 stays at reading"]


def test_a_rank_that_does_not_answer_is_blamed_first() -> None:
    ranks = [seen(12, 61), seen(12, 61, answered_s_ago=62, doing="the update of step 7"), seen(11, 61)]
    assert stalled_ranks(ranks, 60, NOW) == ["rank 1 does not answer; it was last at the update of step 7"]


def test_only_rank_0_is_blamed_while_it_does_not_answer() -> None:
    ranks = [seen(12, 61, answered_s_ago=61), seen(12, 61), seen(12, 61, answered_s_ago=61)]
    assert stalled_ranks(ranks, 60, NOW) == ["rank 0 does not answer; it was last at step 7"]


def test_ranks_that_all_wait_at_the_same_place_are_reported() -> None:
    assert stalled_ranks([seen(12, 61), seen(12, 61)], 60, NOW) == ["all ranks wait at step 7"]


def test_the_watch_continues_until_the_process_group_is_destroyed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Under NCCL, leaving the process group waits for the other ranks, and one of them may stall."""
    watch, watched = Watch(World(), 60, tmp_path), []
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "destroy_process_group", lambda: watched.append(not watch._ended.is_set()))
    Trainer.shut_down(SimpleNamespace(watch=watch))  # type: ignore[arg-type]
    assert watched == [True] and watch._ended.is_set()


STALLS = """
import sys
import time
from pathlib import Path
from kfood_dist.system.world import World
from kfood_dist.train.run.watchdog import Watch

def stuck():
    time.sleep(60)

watch = Watch(World(), 1.0, Path(sys.argv[1]))
watch.start()
for _ in range(15):
    watch.heartbeat("the small steps")
    time.sleep(0.1)
watch.heartbeat("the long one")
stuck()
"""


@pytest.mark.parametrize("disk", ["sound", "gone", "hanging"])
def test_a_stalled_single_process_is_ended_and_its_stack_written_if_possible(tmp_path: Path, disk: str) -> None:
    run_dir = tmp_path / "gone" if disk == "gone" else tmp_path
    stacks = tmp_path / "stalled-rank-00000.txt"
    if disk == "hanging":
        os.mkfifo(stacks)  # opening it waits for a reader, as on a file system that does not answer
    done = subprocess.run(
        [sys.executable, "-c", STALLS, str(run_dir)], capture_output=True, text=True, timeout=30, check=False
    )
    assert done.returncode == 1
    assert "no progress for 1 s: rank 0 stays at the long one → look at" in done.stderr
    assert disk != "sound" or " in stuck" in stacks.read_text()


def test_a_broken_connection_is_opened_again(tmp_path: Path) -> None:
    """Otherwise the other ranks would believe that this rank does not answer, and end a healthy run."""
    hosted = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    hosted.set("0", '[5, "step 5", 5]')
    watch = Watch(World(rank=1, size=2, local_rank=1), 0.5, tmp_path)
    watch.heartbeat("step 1")

    class Broken:
        host, port = hosted.host, hosted.port

        def set(self, key: str, value: str) -> None:
            raise RuntimeError("Connection reset by peer")

    exchange = threading.Thread(target=watch._exchange, args=(Broken(),), daemon=True)
    exchange.start()
    hosted.wait(["1"], timedelta(seconds=20))
    watch.stop()
    exchange.join(20)
    assert not exchange.is_alive()
    assert json.loads(hosted.get("1"))[:2] == [1, "step 1"]
