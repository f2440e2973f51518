"""The training loop.

    plan ──► stream of batches ──► train_step: count labels, forward and backward × accumulation, update
                               └──► every so many steps: measure, checkpoint

Always holds: the loss is the sum over all label tokens of the global batch divided by their number, however the batch
is cut into ranks, micro-batches and accumulation; a step's random numbers depend on (seed, step, rank) alone.
"""

import time
from collections.abc import Generator, Iterable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kfood_dist.config.recipe import Recipe
from kfood_dist.data.batch.collate import Batch, LeftOut, StreamingCollator
from kfood_dist.data.batch.loader import stream
from kfood_dist.data.mix import read_ahead
from kfood_dist.data.plan.plan import MicroBatch, Plan, deal
from kfood_dist.errors import CheckpointError
from kfood_dist.model.adapters import adapter_weights, save_adapter
from kfood_dist.model.objective.answer import AnswerLoss, exact_matches
from kfood_dist.system.world import World
from kfood_dist.train.engine.base import Engine
from kfood_dist.train.engine.optim import learning_rate_at
from kfood_dist.train.run import checkpoint
from kfood_dist.train.run.facts import optimizer_facts, write_run_json
from kfood_dist.train.run.monitor import RunLog, StepMeter, peak_memory_gib
from kfood_dist.train.run.skips import SkipWatch, require_few_bad
from kfood_dist.train.run.stop import StopRequest
from kfood_dist.train.run.watchdog import Watch

_LEFT_OUT_LISTED = 20
_PAUSES_S = (1, 2, 4, 8, 16, 32, 64)


@dataclass
class Trainer:
    """A run's built parts; `train` and `train_step` are the whole story."""

    recipe: Recipe
    world: World
    device: torch.device
    plan: Plan
    collator: StreamingCollator
    validation: StreamingCollator | None
    module: AnswerLoss
    engine: Engine
    log: RunLog
    watch: Watch
    max_steps: int
    adapter_facts: dict[str, Any]
    checkpoint_facts: dict[str, Any]
    run_facts: dict[str, Any]
    stop: StopRequest
    skips: SkipWatch
    stopping: bool = False  # agreed by all ranks, after the step or the measured batch in which any was asked to
    bad: dict[str, str] = field(default_factory=dict)  # samples that could not be read so far, and why
    best_accuracy: float = -1.0  # of the checkpoints there are, on the validation split
    unmeasured: checkpoint.Checkpoint | None = None  # what the run resumed from, if nothing was measured there
    failed_saves: int = 0  # in a row
    retry_at: int = 0  # the step at which to try again
    took_s: dict[str, float] = field(default_factory=dict)  # seconds of the last checkpoint and measurement

    def train(self, start: int) -> int:
        """Take the steps from `start` to `max_steps`, or until asked to stop; returns the last one saved.

        The ranks are watched from here on, until `shut_down`.
        """
        self.watch.start()
        with closing(self._batches(start)) as batches:
            return self._take_steps(start, batches)

    def _take_steps(self, start: int, batches: Iterator[Batch]) -> int:
        recipe, last = self.recipe.train, start
        if self.unmeasured and self._is_measured_at(start):
            self._make_up_for(self.unmeasured)
        for step in range(start, self.max_steps):
            if self.stopping:
                break
            self.log.step(self.train_step(step, batches))
            if step == start and self.world.is_main:
                self._write_run_json(step + 1)
            done = step + 1
            scores = self._measure(done) if self._is_measured_at(done) else None
            ends = done == self.max_steps or self.stopping
            best = scores is not None and scores["accuracy"] >= self.best_accuracy
            if ends or best or done % recipe.save_every_steps == 0 or done == self.retry_at:
                last = done if self.save(done, scores, insist=ends) else last
        return last

    def _write_run_json(self, done: int) -> None:
        try:
            write_run_json(self.recipe.run.dir, {**self.run_facts, **optimizer_facts(self.engine.optimizer)})
        except CheckpointError as error:
            self.log.say(f"step {done}: {error}; the run goes on")

    def _is_measured_at(self, done: int) -> bool:
        every = self.recipe.eval.every_steps
        return self.validation is not None and every is not None and (done % every == 0 or done == self.max_steps)

    def _measure(self, done: int) -> dict[str, float] | None:
        """Validate after `done` steps and say so; None where the run is to stop instead."""
        scores = None if self.stopping else self.validate()
        if scores is None:
            self.log.say(f"step {done}: not measured, as the run is to stop")
        else:
            self.log.evaluation(done, self.recipe.eval.split, scores)
        return scores

    def _make_up_for(self, resumed: checkpoint.Checkpoint) -> None:
        """Measure what the run resumed from, where it was to stop before it could be."""
        scores = self._measure(resumed.step)
        if scores is None:
            return
        self.best_accuracy = max(self.best_accuracy, scores["accuracy"])
        if self.world.is_main:
            try:
                checkpoint.add_validation(resumed, scores)
            except CheckpointError as error:
                self.log.say(f"step {resumed.step}: {error}; it does not count as the best")

    def train_step(self, step: int, batches: Iterator[Batch]) -> dict[str, Any]:
        """One optimiser step over the global batch; returns its metrics."""
        self.watch.beat(f"reading the pictures of step {step + 1}")
        meter = StepMeter()
        meter.batches = [self._next(batches, meter) for _ in range(self.plan.num_micro_steps(step))]
        # After the batches: starting the loader, at a run's first step, draws a random number too.
        seed_step(self.recipe.train.seed, step, self.world.rank)
        num_labels = torch.tensor(sum(b.num_label_tokens for b in meter.batches), device=self.device)
        # The engine averages gradients over ranks; times the world size, they are summed.
        scale = self.world.size / max(1, int(self.world.all_sum(num_labels)))
        loss_sum = torch.zeros((), dtype=torch.float64, device=self.device)
        losses = []  # of each sample, by micro-batch
        for i, batch in enumerate(meter.batches):
            self.watch.beat(f"micro-step {i + 1} of step {step + 1}")
            loss, _, each = self.engine.micro_step(batch.to(self.device), scale, last=i == len(meter.batches) - 1)
            loss_sum += loss
            losses.append(each)
        self.watch.beat(f"the update of step {step + 1}")
        learning_rate = learning_rate_at(step, self.max_steps, self.recipe.optim)
        update = self.engine.step(learning_rate)
        here = torch.tensor([peak_memory_gib(), float(self.stop.asked())], device=self.device)
        peak, asked = self.world.all_max(here).tolist()
        self.stopping = bool(asked)
        metrics = {
            "step": step + 1,
            "epoch": self.plan.epoch_of(step),
            "samples": self.plan.samples_before(step + 1),
            "learning_rate": learning_rate,
            "grad_norm": update.grad_norm,
            "skipped": float(not update.applied),
            **({} if update.loss_scale is None else {"loss_scale": update.loss_scale}),
            "peak_memory_gib": peak,
            **meter.reduce(self.world, loss_sum),
            "time": time.time(),
        }
        if metrics["refused"] or metrics["replaced"]:
            self._name_left_out(step, meter)
        self.skips.look(step, update, meter.batches, losses)
        return metrics

    def validate(self) -> dict[str, float] | None:
        """Loss and accuracy on the validation split, every sample once; None if meanwhile the run is asked to stop.

        `accuracy` asks for the label itself, token by token; `kfood eval` also takes aliases and halves of `A_B`.
        A sample that is left out counts as wrong, and is named in the log. Training mode stays, dropout rests.
        """
        assert self.validation is not None
        recipe, began = self.recipe, time.perf_counter()
        slots = deal(self.validation_ids, self.world.size, recipe.eval.batch_size)[:, self.world.rank]
        micro_batches = (MicroBatch(0, i, tuple(int(n) for n in row if n >= 0), 0) for i, row in enumerate(slots))
        left_out: list[LeftOut] = []
        totals = torch.zeros(4, dtype=torch.float64, device=self.device)
        reader = stream(self.validation, micro_batches, recipe.data.num_workers, start_method=recipe.data.worker_start)
        with torch.no_grad(), resting_dropout(self.module), closing(reader) as batches:
            for batch in batches:
                self.watch.beat("measuring")
                # Every rank has as many batches as the others, so all ask at the same one.
                self.stopping = bool(self.world.all_max(torch.tensor(float(self.stop.asked()), device=self.device)))
                if self.stopping:
                    return None
                left_out += batch.refused
                on_device = batch.to(self.device)
                loss, hits, _ = self.engine.forward(on_device)
                right = exact_matches(hits, on_device.labels)
                counts = (loss, batch.num_label_tokens, right.sum(), len(batch.ids) + len(batch.refused))
                totals += torch.tensor([float(c) for c in counts], dtype=torch.float64, device=self.device)
        loss_sum, labels, right_sum, samples = self.world.all_sum(totals).tolist()
        in_all = [sample for of_rank in self.world.share(left_out) for sample in of_rank]
        self._say_left_out("validation", in_all[:_LEFT_OUT_LISTED])
        if len(in_all) > _LEFT_OUT_LISTED:
            self.log.say(f"validation: {len(in_all) - _LEFT_OUT_LISTED} more left out")
        self.took_s["validate"] = time.perf_counter() - began
        return {"loss": loss_sum / max(1.0, labels), "accuracy": right_sum / samples, "samples": samples}

    @property
    def validation_ids(self) -> np.ndarray:
        """The samples that are measured: the validation split, or the first so many of it."""
        assert self.validation is not None
        return np.arange(len(self.validation.shards))[: self.recipe.eval.max_samples]

    def save(self, done: int, scores: dict[str, float] | None, insist: bool) -> bool:
        """Write a checkpoint of `done` steps with what was measured there; whether that succeeded. A collective.

        What fails is said, and tried again after twice as many steps each time; to `insist` is to wait and try for
        two minutes, and to raise CheckpointError then.
        """
        began, pauses = time.perf_counter(), iter(_PAUSES_S if insist else ())
        while (error := self._write_checkpoint(done, scores)) is not None:
            if (pause_s := next(pauses, None)) is None:
                break
            self.log.say(f"step {done}: {error}; tried again in {pause_s} s")
            for _ in range(pause_s):
                self.watch.beat(f"waiting to write the checkpoint of step {done}")
                time.sleep(1)
        if error is None:
            self.failed_saves = self.retry_at = 0
            self.best_accuracy = max(self.best_accuracy, scores["accuracy"] if scores else -1.0)
            self.took_s["save"] = time.perf_counter() - began
            self.log.say(f"step {done}: checkpoint written in {self.took_s['save']:.2f} s")
            return True
        if insist:
            raise error
        self.failed_saves += 1
        self.retry_at = done + 2 ** min(self.failed_saves - 1, 10)
        self.log.say(f"step {done}: {error}; training goes on, and tries again after step {self.retry_at}")
        return False

    def _write_checkpoint(self, done: int, scores: dict[str, float] | None) -> CheckpointError | None:
        """Write one checkpoint; what hindered it, or None. A collective with the same answer on all ranks."""
        self.watch.beat(f"the checkpoint of step {done}")
        weights = adapter_weights(self.module.model)

        def write(target: checkpoint.Checkpoint) -> None:
            self.engine.save(target.engine)
            if self.world.is_main:
                save_adapter(self.module.model, target.adapter, {**self.adapter_facts, "step": done}, weights)

        state = {"data": self.plan.state(done), "validation": scores, "bad": self.bad, **self.checkpoint_facts}
        try:
            checkpoint.save(self.checkpoints, done, state, self.world, write, self.recipe.train.keep_checkpoints)
        except CheckpointError as error:
            return error
        return None

    @property
    def checkpoints(self) -> Path:
        return self.recipe.run.dir / "checkpoints"

    def shut_down(self) -> None:
        """Leave the process group, when all went well; without it NCCL and gloo complain at exit.

        NCCL waits for the other ranks here. So the watch goes on until that is done.
        """
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
        self.watch.stop()

    def _name_left_out(self, step: int, meter: StepMeter) -> None:
        """Name the samples of all ranks that this step left out or replaced; stop the run if too many are bad.

        A collective, entered by all ranks since the counts are global.
        """
        of_ranks = self.world.share([(batch.refused, batch.replaced) for batch in meter.batches])
        for refused, replaced in (pair for pairs in of_ranks for pair in pairs):
            self._say_left_out(f"step {step + 1}", refused)
            for key, why in replaced:
                self.log.say(f"step {step + 1}: {key} replaced by another sample: {why}")
                self.bad[key] = why
        require_few_bad(self.bad, len(self.collator.shards), self.recipe.data.max_bad_share)

    def _say_left_out(self, when: str, samples: Iterable[LeftOut]) -> None:
        for key, why in samples:
            self.log.say(f"{when}: {key} left out: {why}")

    def _batches(self, start: int) -> Generator[Batch, None, None]:
        """This rank's batches from step `start` on, read by loader processes ahead of the training."""
        data, micro_batches = self.recipe.data, self.plan.micro_batches(self.world.rank, start, self.max_steps)
        if self.world.local_rank == 0:
            micro_batches = read_ahead(micro_batches, self.plan, start, self.max_steps, self.collator.shards.will_need)
        return stream(
            self.collator,
            micro_batches,
            data.num_workers,
            pin_memory=self.device.type == "cuda",
            ahead=self.plan.accumulation,
            start_method=data.worker_start,
        )

    def _next(self, batches: Iterator[Batch], meter: StepMeter) -> Batch:
        began = time.perf_counter()
        batch = next(batches)
        meter.waited_s += time.perf_counter() - began
        return batch


def seed_step(seed: int, step: int, rank: int) -> None:
    """Make the step's dropout a function of (seed, step, rank), so that no random state needs saving."""
    torch.manual_seed(int(np.random.SeedSequence([seed, step, rank]).generate_state(1, np.uint64)[0]))


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
