"""Decide when a run writes a checkpoint, and what happens if it cannot be written.

    steps done, validation ──► is_due ──► save ──► run/checkpoint.py, tried again after a failure

Always holds: training continues if a checkpoint cannot be written, but the run fails if the last one cannot be written.
"""

import math
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kfood_dist.data.plan.plan import Plan
from kfood_dist.errors import CheckpointError
from kfood_dist.model.adapters import adapter_weights, save_adapter
from kfood_dist.model.objective.base import Objective
from kfood_dist.system.world import World
from kfood_dist.train.engine.base import Engine
from kfood_dist.train.run import checkpoint
from kfood_dist.train.run.checkpoint import Validation
from kfood_dist.train.run.monitor import RunLog
from kfood_dist.train.run.watchdog import Watch

_PAUSES_S = (1, 2, 4, 8, 16, 32, 64)


@dataclass
class Saver:
    """The writer of a run's checkpoints."""

    folder: Path
    every_steps: int
    keep: int
    world: World
    plan: Plan
    module: Objective
    engine: Engine
    log: RunLog
    watch: Watch
    adapter_facts: dict[str, Any]
    run_facts: dict[str, Any]  # what a checkpoint records about the run that wrote it
    bad: dict[str, str] = field(default_factory=dict)  # samples that could not be read so far, and why
    best_score: float = -math.inf  # the best validation score of the checkpoints so far
    failed: int = 0  # failed saves in a row
    retry_at: int = 0  # the step at which to try again
    took_s: float = 0.0  # seconds of the last checkpoint

    def is_due(self, done: int, validation: Validation | None) -> bool:
        """Return whether to save after `done` steps.

        It is time every `every_steps`, if the model is the best so far, and if a failed save is due again.
        """
        is_best = validation is not None and validation.score >= self.best_score
        return is_best or done % self.every_steps == 0 or done == self.retry_at

    def save(self, done: int, validation: Validation | None, insist: bool) -> bool:
        """Write a checkpoint of `done` steps with its validation, and return whether that succeeded. A collective.

        A failure is logged. The next try comes after 1 step, then after twice as many steps each time. With `insist`,
        it waits and tries again for two minutes, and then raises CheckpointError.
        """
        began, pauses = time.perf_counter(), iter(_PAUSES_S if insist else ())
        while (error := self._write(done, validation)) is not None:
            if (pause_s := next(pauses, None)) is None:
                break
            self.log.say(f"step {done}: {error}; trying again in {pause_s} s")
            for _ in range(pause_s):
                self.watch.heartbeat(f"waiting to write the checkpoint of step {done}")
                time.sleep(1)
        if error is None:
            self.failed = self.retry_at = 0
            self.best_score = max(self.best_score, validation.score if validation else -math.inf)
            self.took_s = time.perf_counter() - began
            self.log.say(f"step {done}: checkpoint written in {self.took_s:.2f} s")
            return True
        if insist:
            raise error
        self.failed += 1
        self.retry_at = done + 2 ** min(self.failed - 1, 10)
        self.log.say(f"step {done}: {error}; training continues, and tries again after step {self.retry_at}")
        return False

    def add_validation(self, resumed: checkpoint.Checkpoint, validation: Validation) -> None:
        """Record the validation of the checkpoint that the run resumed from."""
        self.best_score = max(self.best_score, validation.score)
        if self.world.is_main:
            try:
                checkpoint.add_validation(resumed, validation)
            except CheckpointError as error:
                self.log.say(f"step {resumed.step}: {error}; this checkpoint does not count as the best")

    def _write(self, done: int, validation: Validation | None) -> CheckpointError | None:
        """Write one checkpoint. Returns the error, or None. A collective with the same result on all ranks."""
        self.watch.heartbeat(f"the checkpoint of step {done}")
        weights = adapter_weights(self.module.model)

        def write(target: checkpoint.Checkpoint) -> None:
            self.engine.save(target.engine)
            if self.world.is_main:
                save_adapter(self.module.model, target.adapter, {**self.adapter_facts, "step": done}, weights)

        row = validation.model_dump() if validation else None
        state = {"data": self.plan.state(done), "validation": row, "bad": self.bad, **self.run_facts}
        try:
            checkpoint.save(self.folder, done, state, self.world, write, self.keep)
        except CheckpointError as error:
            return error
        return None
