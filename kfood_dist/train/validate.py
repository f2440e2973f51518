"""Measuring on the validation split while a run trains.

    validation split ──► dealt to the ranks ──► forward alone ──► loss, accuracy ──► Validation, told in the log

Always holds: every sample is measured once, on one rank; training mode stays, dropout rests.
"""

import math
import time
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass

import numpy as np
import torch

from kfood_dist.config.sections import Recipe
from kfood_dist.data.batch.collate import SkippedSample, StreamingCollator
from kfood_dist.data.batch.loader import stream
from kfood_dist.data.plan.plan import MicroBatch, deal
from kfood_dist.model.objective.base import Objective
from kfood_dist.system.world import World
from kfood_dist.train.engine.base import Engine
from kfood_dist.train.run.checkpoint import Validation
from kfood_dist.train.run.monitor import RunLog
from kfood_dist.train.run.stop import StopRequest
from kfood_dist.train.run.watchdog import Watch

_LEFT_OUT_LISTED = 20


@dataclass
class Validator:
    """Measures the model as it is; `measure` is the whole story."""

    recipe: Recipe
    world: World
    device: torch.device
    collator: StreamingCollator
    module: Objective
    engine: Engine
    log: RunLog
    watch: Watch
    stop: StopRequest
    picture_s: float | None = None  # seconds that a picture took when last measured

    def is_due(self, done: int, max_steps: int) -> bool:
        """Whether to measure after `done` steps of `max_steps`: every so many, and after the last."""
        every = self.recipe.eval.every_steps
        return every is not None and (done % every == 0 or done == max_steps)

    @property
    def ids(self) -> np.ndarray:
        """The samples that are measured: the validation split, or the first so many of it."""
        return np.arange(len(self.collator.shards))[: self.recipe.eval.max_samples]

    def measure(self, done: int) -> Validation | None:
        """Measure after `done` steps and say so; None if meanwhile the run is asked to stop. A collective."""
        scores = self._scores()
        if scores is None:
            return None
        self.log.evaluation(done, self.recipe.eval.split, scores)
        return Validation(loss=scores["loss"], accuracy=scores["accuracy"], best_by=self.module.best)

    def _scores(self) -> dict[str, float] | None:
        """Loss and accuracy, every sample once; None if the run is asked to stop.

        `accuracy` asks for the label itself, token by token; `kfood eval` also takes aliases and halves of `A_B`.
        A sample that is left out counts as wrong, and is named in the log.
        """
        recipe, began = self.recipe, time.perf_counter()
        slots = deal(self.ids, self.world.size, recipe.eval.batch_size)[:, self.world.rank]
        micro_batches = (MicroBatch(0, i, tuple(int(n) for n in row if n >= 0), 0) for i, row in enumerate(slots))
        left_out: list[SkippedSample] = []
        totals = torch.zeros(4, dtype=torch.float64, device=self.device)
        reader = stream(self.collator, micro_batches, recipe.data.num_workers, start_method=recipe.data.worker_start)
        with torch.no_grad(), resting_dropout(self.module), closing(reader) as batches:
            for batch in batches:
                self.watch.heartbeat("measuring")
                # Every rank has as many batches as the others, so all ask at the same one.
                if bool(self.world.all_max(torch.tensor(float(self.stop.asked()), device=self.device))):
                    return None
                left_out += batch.refused
                outcome = self.engine.forward(batch.to(self.device))
                samples = len(batch.ids) + len(batch.refused)
                counts = (outcome.loss, self.module.weight(batch), outcome.correct.sum(), samples)
                totals += torch.tensor([float(c) for c in counts], dtype=torch.float64, device=self.device)
        loss_sum, weight, right, samples = self.world.all_sum(totals).tolist()
        in_all = [sample for of_rank in self.world.share(left_out) for sample in of_rank]
        log_skipped_samples(self.log, "validation", in_all[:_LEFT_OUT_LISTED])
        if len(in_all) > _LEFT_OUT_LISTED:
            self.log.say(f"validation: {len(in_all) - _LEFT_OUT_LISTED} more left out")
        self.picture_s = (time.perf_counter() - began) / samples
        return {"loss": loss_sum / weight if weight else math.nan, "accuracy": right / samples, "samples": samples}


def log_skipped_samples(log: RunLog, when: str, samples: Iterable[SkippedSample]) -> None:
    """Name in the log the samples that were left out, and why."""
    for key, why in samples:
        log.say(f"{when}: {key} left out: {why}")


@contextmanager
def resting_dropout(module: torch.nn.Module) -> Iterator[None]:
    """Let dropout do nothing while the model stays in training mode.

    `model.eval()` would let bitsandbytes repack 4-bit weights for inference on some CPUs, and training after that
    is wrong.
    """
    layers = [m for m in module.modules() if isinstance(m, torch.nn.Dropout)]
    for layer in layers:
        layer.eval()
    try:
        yield
    finally:
        for layer in layers:
            layer.train()
