"""Evaluate the model on the validation split while a run trains.

    validation split ──► distributed to the ranks ──► forward pass only ──► loss, accuracy ──► Validation, and the log

Always holds: every sample is evaluated once, on one rank. The model stays in training mode, with dropout off.
"""

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass

import numpy as np
import torch

from kfood_dist.config.sections import Recipe
from kfood_dist.data.batch.collate import SkippedSample, StreamingCollator
from kfood_dist.data.batch.loader import stream
from kfood_dist.data.plan.plan import MicroBatch, assign_slots
from kfood_dist.model.objective.base import Objective
from kfood_dist.system.world import World
from kfood_dist.train.engine.base import Engine
from kfood_dist.train.run.checkpoint import Validation
from kfood_dist.train.run.monitor import RunLog
from kfood_dist.train.run.stop import StopRequest
from kfood_dist.train.run.watchdog import Watch

_SKIPPED_LISTED = 20
_BATCHES_BETWEEN_STOPS = 8  # a GPU waits for the ranks here; between them it computes without a wait


@dataclass
class Validator:
    """The evaluation of the model in its current state. `evaluate` is the entry point."""

    recipe: Recipe
    world: World
    device: torch.device
    collator: StreamingCollator
    module: Objective
    engine: Engine
    log: RunLog
    watch: Watch
    stop: StopRequest
    sample_s: float | None = None  # seconds per sample in the last evaluation

    def is_due(self, done: int, max_steps: int) -> bool:
        """Return whether to evaluate after `done` of `max_steps` steps: every `eval.every_steps`, and at the end."""
        every = self.recipe.eval.every_steps
        return every is not None and (done % every == 0 or done == max_steps)

    @property
    def ids(self) -> np.ndarray:
        """The samples to evaluate: the validation split, or its first `eval.max_samples` samples."""
        return np.arange(len(self.collator.shards))[: self.recipe.eval.max_samples]

    def evaluate(self, done: int) -> Validation | None:
        """Evaluate after `done` steps and log the scores. Returns None if the run is asked to stop. A collective."""
        scores = self._scores()
        if scores is None:
            return None
        self.log.evaluation(done, self.recipe.eval.split, scores)
        return Validation(loss=scores["loss"], accuracy=scores["accuracy"], best_by=self.module.best)

    def _scores(self) -> dict[str, float] | None:
        """Return loss and accuracy, with every sample counted once, or None if the run is asked to stop.

        `accuracy` requires the label itself, token by token. `kfood eval` also accepts aliases and one half of an `A_B`
        name. A skipped sample counts as wrong and is named in the log.
        """
        recipe, began = self.recipe, time.perf_counter()
        slots = assign_slots(self.ids, self.world.size, recipe.eval.batch_size)[:, self.world.rank]
        micro_batches = (MicroBatch(0, i, tuple(int(n) for n in row if n >= 0), 0) for i, row in enumerate(slots))
        skipped: list[SkippedSample] = []
        on_host = torch.zeros(2, dtype=torch.float64)  # weight, samples
        on_device = torch.zeros(2, dtype=torch.float64, device=self.device)  # loss, right answers
        reader = stream(
            self.collator,
            micro_batches,
            recipe.data.num_workers,
            pin_memory=self.device.type == "cuda",
            start_method=recipe.data.worker_start,
        )
        with torch.no_grad(), without_dropout(self.module), closing(reader) as batches:
            for number, batch in enumerate(batches):
                self.watch.heartbeat("evaluating on the validation split")
                # All ranks have the same number of batches, so all of them enter this collective at the same batch.
                if number % _BATCHES_BETWEEN_STOPS == 0 and self._any_rank_stops():
                    return None
                skipped += batch.refused
                outcome = self.engine.forward(batch.to(self.device))
                on_host += torch.tensor([self.module.weight(batch), len(batch.ids) + len(batch.refused)])
                on_device += torch.stack([outcome.loss.double(), outcome.correct.sum().double()])
        totals = torch.cat([on_host.to(self.device), on_device])
        weight, samples, loss_sum, right = self.world.all_sum(totals).tolist()
        in_all = [sample for of_rank in self.world.all_gather(skipped) for sample in of_rank]
        log_skipped_samples(self.log, "validation", in_all)
        self.sample_s = (time.perf_counter() - began) / samples
        return {"loss": loss_sum / weight if weight else math.nan, "accuracy": right / samples, "samples": samples}

    def _any_rank_stops(self) -> bool:
        """Return whether any rank was asked to stop. A collective."""
        return bool(self.world.all_max(torch.tensor(float(self.stop.is_requested()), device=self.device)))


def log_skipped_samples(log: RunLog, when: str, samples: Sequence[SkippedSample]) -> None:
    """Log the first twenty skipped samples, why each was skipped, and the number of the others."""
    for key, why in samples[:_SKIPPED_LISTED]:
        log.say(f"{when}: {key} skipped: {why}")
    if len(samples) > _SKIPPED_LISTED:
        log.say(f"{when}: {len(samples) - _SKIPPED_LISTED} more skipped")


@contextmanager
def without_dropout(module: torch.nn.Module) -> Iterator[None]:
    """Turn dropout off while the model stays in training mode.

    With `model.eval()`, bitsandbytes would repack 4-bit weights for inference on some CPUs, and training after that
    would be wrong.
    """
    layers = [m for m in module.modules() if isinstance(m, torch.nn.Dropout)]
    for layer in layers:
        layer.eval()
    try:
        yield
    finally:
        for layer in layers:
            layer.train()
