"""The training loop.

    plan ──► stream of batches ──► train_step: sum the weights, forward and backward × accumulation, update
                               └──► every so many steps: evaluate (validate.py), checkpoint (saving.py)

Always holds: the loss is the sum over the global batch divided by the weight of the batch, such as its number of label
tokens. It does not depend on how the batch is cut into ranks, micro-batches and accumulation. The random numbers of a
step depend only on (seed, step, rank).
"""

import math
import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset

from kfood_dist.config.sections import Recipe
from kfood_dist.data.batch.collate import Batch, StreamingCollator, TokenCollator
from kfood_dist.data.batch.loader import stream
from kfood_dist.data.mix import read_ahead
from kfood_dist.data.plan.plan import Plan
from kfood_dist.errors import CheckpointError
from kfood_dist.estimate.utilisation import Utilisation
from kfood_dist.model.objective.base import Objective
from kfood_dist.system.memory import restart_private_peak
from kfood_dist.system.world import World
from kfood_dist.train.engine.base import Engine, Update
from kfood_dist.train.engine.optim import learning_rate_at
from kfood_dist.train.run import checkpoint
from kfood_dist.train.run.checkpoint import Validation
from kfood_dist.train.run.facts import optimizer_facts, write_run_json
from kfood_dist.train.run.monitor import RunLog, StepMeter, peak_memory
from kfood_dist.train.run.skips import SkipWatch, require_few_bad
from kfood_dist.train.run.stop import StopRequest
from kfood_dist.train.run.watchdog import Watch
from kfood_dist.train.saving import Saver
from kfood_dist.train.validate import Validator, log_skipped_samples


class Learnt(NamedTuple):
    """The result of a step on this rank."""

    update: Update
    loss_sum: torch.Tensor  # float64
    losses: Sequence[torch.Tensor]  # of each sample, by micro-batch


# The result of a step without any label. Moments and weights stay as they are.
_NOTHING_LEARNT = Learnt(Update(math.nan, applied=False, loss_scale=None), torch.zeros((), dtype=torch.float64), ())


@dataclass
class Trainer:
    """The parts of a run. `train` and `train_step` show how they work together."""

    recipe: Recipe
    world: World
    device: torch.device
    plan: Plan
    collator: StreamingCollator
    validator: Validator | None
    saver: Saver
    module: Objective
    engine: Engine
    log: RunLog
    watch: Watch
    max_steps: int
    peaks: dict[str, float]  # peak learning rate of each of the optimiser's groups, by name
    run_facts: dict[str, Any]
    utilisation: Utilisation
    stop: StopRequest
    skips: SkipWatch
    stopping: bool = False  # the same on all ranks; True after a step or validation in which any rank was asked to stop
    unevaluated: checkpoint.Checkpoint | None = None  # the run resumed from it, and it was not evaluated

    def train(self, start: int) -> int:
        """Take the steps from `start` to `max_steps`, or until asked to stop. Returns the last step that was saved.

        The watchdog watches the ranks from here until `shut_down`.
        """
        self.watch.start()
        restart_private_peak()
        with closing(self._steps(start)) as steps:
            return self._take_steps(start, steps)

    def _take_steps(self, start: int, steps: Iterator[Sequence[Batch]]) -> int:
        last = start
        if self.unevaluated and (validation := self._evaluate(start)):
            self.saver.add_validation(self.unevaluated, validation)
        for step in range(start, self.max_steps):
            if self.stopping:
                break
            self.log.step(self.train_step(step, steps))
            if step == start and self.world.is_main:
                self._write_run_json(step + 1)
            done = step + 1
            validation = self._evaluate(done)
            ends = done == self.max_steps or self.stopping
            if ends or self.saver.is_due(done, validation):
                last = done if self.saver.save(done, validation, insist=ends) else last
        return last

    def _write_run_json(self, done: int) -> None:
        try:
            write_run_json(self.recipe.run.dir, {**self.run_facts, **optimizer_facts(self.engine.optimizer)})
        except CheckpointError as error:
            self.log.say(f"step {done}: {error}; the run continues")

    def _evaluate(self, done: int) -> Validation | None:
        """Evaluate on the validation split after `done` steps if that is due.

        Returns None if it is not due, or if the run stops instead.
        """
        if self.validator is None or not self.validator.is_due(done, self.max_steps):
            return None
        validation = None if self.stopping else self.validator.evaluate(done)
        if validation is None:
            self.stopping = True
            self.log.say(f"step {done}: not evaluated, because the run stops")
        return validation

    def train_step(self, step: int, steps: Iterator[Sequence[Batch]]) -> dict[str, Any]:
        """Take one optimiser step over the global batch. Returns its metrics."""
        self.watch.heartbeat(f"reading the pictures of step {step + 1}")
        meter = StepMeter()
        meter.batches = self._read(steps, meter)
        meter.flops = sum(map(self.utilisation.flops, meter.batches))
        # After the batches, because the start of the loader at a run's first step also draws a random number.
        seed_step(self.recipe.train.seed, step, self.world.rank)
        here = torch.tensor(sum(map(self.module.weight, meter.batches)), device=self.device)
        weight = int(self.world.all_sum(here))
        optim = self.recipe.optim
        rates = {name: learning_rate_at(step, self.max_steps, optim, peak) for name, peak in self.peaks.items()}
        learnt = self._learn(step, meter.batches, weight, list(rates.values())) if weight else _NOTHING_LEARNT
        memory = peak_memory()
        here = torch.tensor([*memory.values(), float(self.stop.is_requested())], device=self.device)
        *peaks, requested = self.world.all_max(here).tolist()
        self.stopping = bool(requested)
        counted = meter.reduce(self.world, learnt.loss_sum.to(self.device), weight)
        metrics = {
            "step": step + 1,
            "epoch": self.plan.epoch_of(step),
            "samples": self.plan.samples_before(step + 1),
            "learning_rate": rates.get("", next(iter(rates.values()))),
            **{f"learning_rate/{name}": rate for name, rate in rates.items() if name},
            "grad_norm": learnt.update.grad_norm,
            "skipped": float(not learnt.update.applied),
            **({} if learnt.update.loss_scale is None else {"loss_scale": learnt.update.loss_scale}),
            **dict(zip(memory, peaks, strict=True)),
            **counted,
            **self.utilisation.shares(counted["flops_per_second"]),
            "time": time.time(),
        }
        if metrics["refused"] or metrics["replaced"]:
            self._log_skipped_samples(step, meter)
        self.skips.look(step, learnt.update, meter.batches, learnt.losses)
        return metrics

    def _learn(self, step: int, batches: Sequence[Batch], weight: int, rates: Sequence[float]) -> "Learnt":
        """Run forward and backward of each micro-batch, then the update. `weight` is that of the global batch."""
        # The engine averages gradients over ranks. Multiplied by the world size, the average is the sum.
        scale = self.world.size / weight
        loss_sum = torch.zeros((), dtype=torch.float64, device=self.device)
        losses = []  # one tensor per micro-batch, with the loss of each sample
        for i, batch in enumerate(batches):
            self.watch.heartbeat(f"micro-step {i + 1} of step {step + 1}")
            outcome = self.engine.micro_step(batch.to(self.device), scale, last=i == len(batches) - 1)
            loss_sum += outcome.loss
            losses.append(outcome.each)
        self.watch.heartbeat(f"the update of step {step + 1}")
        return Learnt(self.engine.step(rates), loss_sum, losses)

    def shut_down(self) -> None:
        """Leave the process group after a run without errors. Without this, NCCL and gloo print warnings at exit.

        NCCL waits for the other ranks here, so the watchdog stops only after that.
        """
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
        self.watch.stop()

    def _log_skipped_samples(self, step: int, meter: StepMeter) -> None:
        """Log the samples of all ranks that this step skipped or replaced. Raises TrainingError if too many are bad.

        A collective. All ranks enter it, because the counts are global.
        """
        of_ranks = self.world.all_gather([(batch.refused, batch.replaced) for batch in meter.batches])
        pairs = [pair for of_rank in of_ranks for pair in of_rank]
        log_skipped_samples(self.log, f"step {step + 1}", [sample for refused, _ in pairs for sample in refused])
        for _, replaced in pairs:
            for key, why in replaced:
                self.log.say(f"step {step + 1}: {key} replaced by another sample: {why}")
                self.saver.bad[key] = why
        require_few_bad(self.saver.bad, len(self.collator.shards), self.recipe.data.max_bad_share)

    def _steps(self, start: int) -> Generator[Sequence[Batch], None, None]:
        """Yield this rank's micro-batches of each step from `start` on. Loader processes read them ahead."""
        data, num_tokens, plan = self.recipe.data, self.recipe.train.tokens_per_micro_batch, self.plan
        requests = (plan.step_parts if num_tokens else plan.micro_batches)(self.world.rank, start, self.max_steps)
        if self.world.local_rank == 0:
            requests = read_ahead(requests, plan, start, self.max_steps, self.collator.shards.will_need)
        collator: Dataset[Any] = TokenCollator(self.collator, num_tokens) if num_tokens else self.collator
        made = stream(
            collator,
            requests,
            data.num_workers,
            pin_memory=self.device.type == "cuda",
            ahead=1 if num_tokens else plan.accumulation,
            start_method=data.worker_start,
        )
        with closing(made):
            for step in range(start, self.max_steps):
                yield next(made).batches if num_tokens else [next(made) for _ in range(plan.num_micro_steps(step))]

    def _read(self, steps: Iterator[Sequence[Batch]], meter: StepMeter) -> list[Batch]:
        """Return this rank's micro-batches of the next step. A collective if their number may differ between ranks."""
        began = time.perf_counter()
        found = list(next(steps))
        meter.waited_s += time.perf_counter() - began
        if self.recipe.train.tokens_per_micro_batch:
            most = int(self.world.all_max(torch.tensor(len(found), device=self.device)))
            smallest = min(found, key=lambda batch: batch.input_ids.numel())
            found += [smallest.without_labels()] * (most - len(found))
        return found


def seed_step(seed: int, step: int, rank: int) -> None:
    """Make the step's dropout a function of (seed, step, rank), so that no random state has to be saved."""
    torch.manual_seed(int(np.random.SeedSequence([seed, step, rank]).generate_state(1, np.uint64)[0]))
