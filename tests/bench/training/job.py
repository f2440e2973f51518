"""One run of one contender: what it is asked for, and what it returns."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from training.materials import Materials


@dataclass(frozen=True)
class Job:
    """One run. `dropout` None keeps the shipped one. The run writes into `folder`."""

    materials: Materials
    folder: Path
    steps: int
    dropout: float | None
    threads: int
    environments: Path  # of the peers


@dataclass(frozen=True)
class Start:
    """The process of a run: its command and its environment."""

    command: list[str]
    environment: Mapping[str, str]


@dataclass(frozen=True)
class Measured:
    """What a trainer reports about a run, per step where it is a list. Times are Unix times."""

    step_ends: list[float]  # of each step; the first entry may be the start of the training
    losses: list[float]
    num_label_tokens: list[int]
    padding_share: float
    same_tokens: bool | None  # as our template makes of the same samples; None: not recorded
    facts: dict[str, Any] = field(default_factory=dict)

    def step_seconds(self, warmup: int) -> list[float]:
        """Return the duration of each step after the first `warmup` ones, from the end of one to that of the next."""
        ends = self.step_ends[-len(self.losses) :]
        return [after - before for before, after in zip(ends[warmup - 1 :], ends[warmup:], strict=False)]
