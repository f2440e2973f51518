"""A watchdog that ends a run in which a rank stalls. Otherwise the other ranks would wait in a collective forever.

    main thread ──► heartbeat("micro-step 3 of step 12") ──► watching thread ──► a small store that rank 0 hosts
                                                    ◄── every rank's last heartbeat

If a rank has no heartbeat for `timeout_s`, the job ends, and the rank that stalls is named. That is the rank whose
process does not answer at all. If all of them answer, it is the rank that is behind the others: the ranks that wait for
it have come further. Each rank that can do so writes the stacks of its threads to the run directory.

While the ranks are watched, collectives have no time limit of their own. Such a limit would also count the
time in which a job is suspended, and would end the job when it is resumed.
"""

import faulthandler
import json
import os
import sys
import threading
import time
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

from kfood_dist.system.world import World, set_collective_timeouts

# If the watcher itself did not run for this many of its pauses, it knows nothing about the others and starts over.
_STOOD_STILL = 3
_DUMP_TIMEOUT_S = 5
_NO_LIMIT = timedelta(days=365)  # c10d requires a number


@dataclass
class Seen:
    """What the watcher knows about one rank: its last heartbeat, when that came, and when its thread last answered."""

    num_beats: int = 0
    doing: str = "starting"
    tick: int = -1
    moved: float = field(default_factory=time.monotonic)
    answered: float = field(default_factory=time.monotonic)

    def update(self, num_beats: int, doing: str, tick: int) -> None:
        now = time.monotonic()
        if num_beats != self.num_beats:
            self.num_beats, self.doing, self.moved = num_beats, doing, now
        if tick != self.tick:
            self.tick, self.answered = tick, now


def stalled_ranks(ranks: list[Seen], timeout_s: float, now: float) -> list[str]:
    """Return in words which ranks stalled. Empty if all of them had a heartbeat within `timeout_s`."""
    if all(now - rank.moved < timeout_s for rank in ranks):
        return []
    silent = [i for i, rank in enumerate(ranks) if now - rank.answered >= timeout_s / 2]
    if 0 in silent:
        silent = [0]  # it passes on the heartbeats of the others, so they cannot be judged
    if silent:
        return [f"rank {i} does not answer; it was last at {ranks[i].doing}" for i in silent]
    least, most = min(rank.num_beats for rank in ranks), max(rank.num_beats for rank in ranks)
    if least == most and len(ranks) > 1:
        return [f"all ranks wait at {ranks[0].doing}"]
    return [f"rank {i} stays at {rank.doing}" for i, rank in enumerate(ranks) if rank.num_beats == least]


class Watch:
    """A watchdog of all ranks, run by every rank. `start` starts it, `heartbeat` keeps it quiet, `stop` ends it."""

    def __init__(self, world: World, timeout_s: float, run_dir: Path):
        self.world = world
        self.timeout_s = timeout_s
        self.run_dir = run_dir
        self._beat = (0, "starting")
        self._ended = threading.Event()
        self._ranks = [Seen() for _ in range(world.size)]
        self._pause_s = min(10.0, timeout_s / 10)

    def start(self) -> None:
        """Start to watch. A collective."""
        if self.world.size > 1:
            store = _open_store(self.world)
            set_collective_timeouts(_NO_LIMIT)
            threading.Thread(target=self._exchange, args=(store,), name="beats", daemon=True).start()
        threading.Thread(target=self._run, name="watch", daemon=True).start()

    def heartbeat(self, doing: str) -> None:
        """Report that this rank makes progress, and what it does next."""
        self._beat = (self._beat[0] + 1, doing)

    def stop(self) -> None:
        """End the watch, before the ranks end at different times."""
        self._ended.set()

    def _run(self) -> None:
        tick, looked = 0, time.monotonic()
        while not self._ended.wait(self._pause_s):
            tick += 1
            now = time.monotonic()
            if now - looked > _STOOD_STILL * self._pause_s:  # for example, the scheduler suspended the job
                for rank in self._ranks:
                    rank.moved = rank.answered = now
            looked = now
            self._ranks[self.world.rank].update(*self._beat, tick)
            if stalled := stalled_ranks(self._ranks, self.timeout_s, time.monotonic()):
                self._end_job(stalled)

    def _exchange(self, opened: Any) -> None:
        """Send and receive heartbeats until the watch ends.

        It runs in a separate thread, because a frozen rank 0 does not answer a call to its store.
        """
        keys, tick, store = [str(rank) for rank in range(self.world.size)], 0, opened
        while not self._ended.wait(self._pause_s):
            tick += 1
            try:
                store = store or _connect(opened.host, opened.port)
                store.set(str(self.world.rank), json.dumps([*self._beat, tick]))
                values = store.multi_get(keys) if store.check(keys) else []  # [] until every rank has written once
            except RuntimeError:  # a connection broke, or rank 0 has ended, which the next collective reports
                store = None
                continue
            for i, words in enumerate(values):
                if i != self.world.rank:
                    self._ranks[i].update(*json.loads(words))

    def _end_job(self, stalled: list[str]) -> None:
        # In a thread, because the disk may be the cause of the stall.
        dumping = threading.Thread(target=self._dump_stacks, daemon=True)
        dumping.start()
        answering = [i for i, rank in enumerate(self._ranks) if time.monotonic() - rank.answered < self.timeout_s / 2]
        if self.world.rank == min(answering):
            what = f"no progress for {self.timeout_s:g} s: {'; '.join(stalled)}"
            remedy = f"look at {self.run_dir}/stalled-rank-*.txt and at that node; start again to resume"
            print(f"{what} → {remedy}", file=sys.stderr, flush=True)
        else:
            time.sleep(1)  # let that rank print first: when this one ends, the launcher ends that one too
        dumping.join(_DUMP_TIMEOUT_S)
        os._exit(1)  # the main thread waits in a collective, where no exception reaches it

    def _dump_stacks(self) -> None:
        with (
            suppress(OSError),
            open(self.run_dir / f"stalled-rank-{self.world.rank:05d}.txt", "w", encoding="utf-8") as file,
        ):
            faulthandler.dump_traceback(file, all_threads=True)


def _open_store(world: World) -> Any:
    """Open a separate store on a free port of rank 0's host.

    A waiting collective may block the store of the process group.
    """
    from torch.distributed import TCPStore

    host = os.environ["MASTER_ADDR"]
    store = TCPStore(host, 0, is_master=True, wait_for_workers=False) if world.is_main else None
    port = world.all_gather(store.port if store else None)[0]
    return store or _connect(host, port)


def _connect(host: str, port: int) -> Any:
    from torch.distributed import TCPStore

    return TCPStore(host, port, is_master=False, wait_for_workers=False)
