"""Who is to blame when nothing moves, and that a single process is watched too."""

import subprocess
import sys
from pathlib import Path

from kfood_dist.train.watch import Seen, blame

NOW = 1000.0


def seen(num_beats: int, moved_s_ago: float, answered_s_ago: float = 0.0, doing: str = "step 7") -> Seen:
    return Seen(num_beats, doing, tick=1, moved=NOW - moved_s_ago, answered=NOW - answered_s_ago)


def test_nobody_is_blamed_while_all_move() -> None:
    assert blame([seen(5, 59), seen(9, 0)], 60, NOW) == []


def test_the_rank_that_is_behind_is_blamed_not_those_that_wait_for_it() -> None:
    ranks = [seen(12, 61, doing="the update of step 7"), seen(10, 62, doing="reading"), seen(12, 61)]
    assert blame(ranks, 60, NOW) == ["rank 1 stays at reading"]


def test_a_rank_that_does_not_answer_is_blamed_first() -> None:
    ranks = [seen(12, 61), seen(12, 61, answered_s_ago=62, doing="the update of step 7"), seen(11, 61)]
    assert blame(ranks, 60, NOW) == ["rank 1 does not answer; it was last at the update of step 7"]


def test_while_rank_0_is_silent_nothing_is_known_of_the_others() -> None:
    ranks = [seen(12, 61, answered_s_ago=61), seen(12, 61), seen(12, 61, answered_s_ago=61)]
    assert blame(ranks, 60, NOW) == ["rank 0 does not answer; it was last at step 7"]


def test_when_all_wait_at_the_same_place_that_is_said() -> None:
    assert blame([seen(12, 61), seen(12, 61)], 60, NOW) == ["all ranks wait at step 7"]


def test_a_single_process_that_stalls_is_ended_with_its_stack(tmp_path: Path) -> None:
    code = f"""
import time
from pathlib import Path
from kfood_dist.runtime import World
from kfood_dist.train.watch import Watch

def stuck():
    time.sleep(60)

watch = Watch(World(), 1.0, Path({str(tmp_path)!r}))
watch.start()
for _ in range(15):
    watch.beat("the small steps")
    time.sleep(0.1)
watch.beat("the long one")
stuck()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30)
    assert done.returncode == 1
    assert "no progress for 1 s: rank 0 stays at the long one → look at" in done.stderr
    assert " in stuck" in (tmp_path / "stalled-rank-00000.txt").read_text()
