"""Ends a run in which a rank stalls, and names it: without this the others would wait in a collective for ever.

    main thread ──► heartbeat("micro-step 3 of step 12") ──► watching thread ──► a small store that rank 0 hosts
                                                    ◄── every rank's last heartbeat

A rank without a heartbeat for `timeout_s` ends the job. Named is the rank whose process does not answer at all, else
the one that is behind the others: those that wait for it have come further. Each rank that can leaves its threads'
stacks in the run directory.

While the ranks are watched, collectives have no time limit of their own: it would run on while a job is suspended, and
end it when it is resumed.
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

from kfood_dist.system.world import World, limit_waits

# A watcher that itself was away for so many of its pauses knows nothing of the others, and begins anew.
_STOOD_STILL = 3
_DUMP_TIMEOUT_S = 5
_NO_LIMIT = timedelta(days=365)  # c10d wants a number


@dataclass
class Seen:
    """What the watcher knows of one rank: its last heartbeat, and when that and its thread were last seen to move."""

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


def blame(ranks: list[Seen], timeout_s: float, now: float) -> list[str]:
    """Which ranks stalled, each in words; empty while all of them moved within `timeout_s`."""
    if all(now - rank.moved < timeout_s for rank in ranks):
        return []
    silent = [i for i, rank in enumerate(ranks) if now - rank.answered >= timeout_s / 2]
    if 0 in silent:
        silent = [0]  # it passes on what the others say
    if silent:
        return [f"rank {i} does not answer; it was last at {ranks[i].doing}" for i in silent]
    least, most = min(rank.num_beats for rank in ranks), max(rank.num_beats for rank in ranks)
    if least == most and len(ranks) > 1:
        return [f"all ranks wait at {ranks[0].doing}"]
    return [f"rank {i} stays at {rank.doing}" for i, rank in enumerate(ranks) if rank.num_beats == least]


class Watch:
    """Watches all ranks from each of them. Started by `start`, kept quiet by `heartbeat`, ended by `stop`."""

    def __init__(self, world: World, timeout_s: float, run_dir: Path):
        self.world = world
        self.timeout_s = timeout_s
        self.run_dir = run_dir
        self._beat = (0, "starting")
        self._ended = threading.Event()
        self._ranks = [Seen() for _ in range(world.size)]
        self._pause_s = min(10.0, timeout_s / 10)

    def start(self) -> None:
        """Begin to watch; a collective."""
        if self.world.size > 1:
            store = _open_store(self.world)
            limit_waits(_NO_LIMIT)
            threading.Thread(target=self._exchange, args=(store,), name="beats", daemon=True).start()
        threading.Thread(target=self._run, name="watch", daemon=True).start()

    def heartbeat(self, doing: str) -> None:
        """Say that this rank goes on, and what it does next."""
        self._beat = (self._beat[0] + 1, doing)

    def stop(self) -> None:
        """End the watch, before the ranks part."""
        self._ended.set()

    def _run(self) -> None:
        tick, looked = 0, time.monotonic()
        while not self._ended.wait(self._pause_s):
            tick += 1
            now = time.monotonic()
            if now - looked > _STOOD_STILL * self._pause_s:  # as a whole job does that the scheduler suspended
                for rank in self._ranks:
                    rank.moved = rank.answered = now
            looked = now
            self._ranks[self.world.rank].update(*self._beat, tick)
            if stalled := blame(self._ranks, self.timeout_s, time.monotonic()):
                self._end_job(stalled)

    def _exchange(self, opened: Any) -> None:
        """Tell and hear beats for ever; a thread of its own, since a rank 0 that froze answers no call to its store."""
        keys, tick, store = [str(rank) for rank in range(self.world.size)], 0, opened
        while not self._ended.wait(self._pause_s):
            tick += 1
            try:
                store = store or _connect(opened.host, opened.port)
                store.set(str(self.world.rank), json.dumps([*self._beat, tick]))
                said = store.multi_get(keys) if store.check(keys) else []  # [] until all have been there once
            except RuntimeError:  # a connection broke; or rank 0 has gone, and the next collective will tell
                store = None
                continue
            for i, words in enumerate(said):
                if i != self.world.rank:
                    self._ranks[i].update(*json.loads(words))

    def _end_job(self, stalled: list[str]) -> None:
        # In a thread, since the disk may be what everything waits for.
        dumping = threading.Thread(target=self._dump_stacks, daemon=True)
        dumping.start()
        answering = [i for i, rank in enumerate(self._ranks) if time.monotonic() - rank.answered < self.timeout_s / 2]
        if self.world.rank == min(answering):
            what = f"no progress for {self.timeout_s:g} s: {'; '.join(stalled)}"
            remedy = f"look at {self.run_dir}/stalled-rank-*.txt and at that node; a new start resumes"
            print(f"{what} → {remedy}", file=sys.stderr, flush=True)
        else:
            time.sleep(1)  # let that rank speak before the launcher ends it for this one's sake
        dumping.join(_DUMP_TIMEOUT_S)
        os._exit(1)  # the main thread waits in a collective, where no exception reaches it

    def _dump_stacks(self) -> None:
        with (
            suppress(OSError),
            open(self.run_dir / f"stalled-rank-{self.world.rank:05d}.txt", "w", encoding="utf-8") as file,
        ):
            faulthandler.dump_traceback(file, all_threads=True)


def _open_store(world: World) -> Any:
    """A store of our own, on a free port of rank 0's host: the process group's may be held by a waiting collective."""
    from torch.distributed import TCPStore

    host = os.environ["MASTER_ADDR"]
    store = TCPStore(host, 0, is_master=True, wait_for_workers=False) if world.is_main else None
    port = world.share(store.port if store else None)[0]
    return store or _connect(host, port)


def _connect(host: str, port: int) -> Any:
    from torch.distributed import TCPStore

    return TCPStore(host, port, is_master=False, wait_for_workers=False)
