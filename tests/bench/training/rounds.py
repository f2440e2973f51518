"""Run the contenders: first whether they learn the same, then the fastest way of each tuned peer, then the rounds.

    check (dropout 0) ──► losses          tune ──► contenders at their best          rounds A B C A B C ──► Outcomes

Always holds: each run is a process of its own. A run that fails becomes an Outcome with its error.
"""

import shutil
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from training import memory
from training.contenders import Contender
from training.environments import EnvironmentFailed
from training.job import Job, Measured
from training.materials import Materials
from training.peers import Peer

RUN_TIMEOUT_S = 3600
TUNE_STEPS = 3  # after the warm-up


@dataclass
class Outcome:
    """One run: what it measured, or why it failed."""

    name: str
    phase: str  # check, tune, or round N
    way: str = ""
    error: str = ""
    measured: Measured | None = None
    step_s: list[float] = field(default_factory=list)  # without the warm-up
    samples_per_s: float = 0.0
    label_tokens_per_s: float = 0.0
    peak: memory.Peak | None = None
    wall_s: float = 0.0


@dataclass(frozen=True)
class Bench:
    """The settings of the benchmark. The runs write into `work`."""

    materials: Materials
    work: Path
    environments: Path
    steps: int
    warmup: int
    check_steps: int
    rounds: int
    threads: int

    def check(self, contenders: Sequence[Contender]) -> list[Outcome]:
        """Train every contender for the first steps without dropout, which is the only random part of a step."""
        if not self.check_steps:
            return []
        return [self._run(c, "check", self.check_steps, dropout=0.0) for c in contenders]

    def tune(self, contenders: Sequence[Contender]) -> tuple[list[Contender], list[Outcome]]:
        """Return the contenders, each tuned peer in its fastest way, and the trials.

        The fastest micro-batch is found first, then the fastest number of loader processes with it.
        """
        best: list[Contender] = []
        trials: list[Outcome] = []
        for contender in contenders:
            if isinstance(contender, Peer) and contender.tuned:
                contender = self._fastest([contender], contender.candidates(self.materials.global_batch), trials)
                contender = self._fastest([contender], contender.with_workers(), trials)
            best.append(contender)
        return best, trials

    def _fastest(self, known: Sequence[Peer], others: Iterable[Peer], trials: list[Outcome]) -> Peer:
        """Try the ways that were not tried yet, and return the peer in the way with the fastest single step.

        On a busy machine the fastest of a few steps says more than their mean.
        """
        peers = {str(peer.way): peer for peer in (*known, *others)}
        name = known[0].name
        for way, peer in peers.items():
            if not any(trial.name == name and trial.way == way for trial in trials):
                trials.append(self._run(peer, "tune", self.warmup + TUNE_STEPS))
        seconds = {t.way: min(t.step_s) for t in trials if t.name == name and t.way in peers and t.step_s}
        return peers[min(seconds, key=lambda way: seconds[way])] if seconds else known[0]

    def measure(self, contenders: Sequence[Contender], outcomes: list[Outcome]) -> None:
        """Run the interleaved rounds: each contender once per round, in the same order. Appends to `outcomes`."""
        failed: set[str] = set()
        for number in range(self.rounds):
            for contender in contenders:
                if contender.name in failed:
                    continue
                outcome = self._run(contender, f"round {number + 1}", self.steps)
                outcomes.append(outcome)
                if outcome.error:
                    failed.add(contender.name)

    def _run(self, contender: Contender, phase: str, steps: int, dropout: float | None = None) -> Outcome:
        folder = self.work / f"{contender.name} {phase}".replace(" ", "-")
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        job = Job(self.materials, folder, steps, dropout, self.threads, self.environments)
        way = str(contender.way) if isinstance(contender, Peer) else ""
        outcome = Outcome(contender.name, phase, way)
        began = time.monotonic()
        try:
            start = contender.start(job)
            outcome.peak = memory.run(start.command, start.environment, folder / "output.log", RUN_TIMEOUT_S)
            outcome.measured = contender.read(job)
            self._rate(outcome, outcome.measured)
        except (EnvironmentFailed, memory.CommandFailed, OSError, ValueError, KeyError) as error:
            outcome.error = f"{type(error).__name__}: {error}"
        outcome.wall_s = time.monotonic() - began
        _say(outcome)
        return outcome

    def _rate(self, outcome: Outcome, measured: Measured) -> None:
        outcome.step_s = measured.step_seconds(self.warmup)
        if took := sum(outcome.step_s):
            labels = sum(measured.num_label_tokens[-len(outcome.step_s) :])
            outcome.samples_per_s = len(outcome.step_s) * self.materials.global_batch / took
            outcome.label_tokens_per_s = labels / took


def _say(outcome: Outcome) -> None:
    what = f"{outcome.name} ({outcome.way})" if outcome.way else outcome.name
    result = outcome.error or f"{outcome.samples_per_s:.2f} samples/s"
    print(f"{outcome.phase:>8}: {what}: {result}, {outcome.wall_s:.0f} s in all", flush=True)
