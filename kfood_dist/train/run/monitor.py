"""The metrics of a run: one dict per step, for the console, `metrics.jsonl` and TensorBoard.

    StepMeter (one step's counts) ──► summed over ranks ──► metrics ──► RunLog.step ──► three places

Always holds: `metrics.jsonl` has one line per optimiser step, and none of a step that was undone. A resumed run removes
the lines after its checkpoint before it writes.
"""

import json
import math
import statistics
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kfood_dist.system.console import LOG_FILE, LineFile, show, stamped
from kfood_dist.system.files import write_atomically
from kfood_dist.system.memory import GIB, machine_memory_gib, private_peak_gib
from kfood_dist.system.words import plural
from kfood_dist.system.world import World

if TYPE_CHECKING:
    import torch

    from kfood_dist.data.batch.collate import Batch

_PACE_STEPS = 100  # the time left is from the median of this many steps


def peak_memory() -> dict[str, float]:
    """Return the peak memory of the training so far in GiB: of the GPU if there is one, else private of this process.

    On a GPU, torch reserves more than its tensors take. The reserved memory must fit the GPU.
    """
    import torch

    if torch.cuda.is_available():
        allocated, reserved = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
        return {"peak_memory_gib": allocated / GIB, "reserved_memory_gib": reserved / GIB}
    return {"peak_memory_gib": private_peak_gib()}


def describe_memory(rows: Sequence[Mapping[str, Any]], local_ranks: int) -> str:
    """Return the peak memory in the metrics of steps in words, beside the memory of the GPU or of the machine.

    All ranks of a machine share its memory. A GPU belongs to one rank.
    """
    import torch

    peak = max(row["peak_memory_gib"] for row in rows)
    if torch.cuda.is_available():
        reserved = max(row["reserved_memory_gib"] for row in rows)
        total = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory / GIB
        return f"{reserved:.2f} GiB reserved, {peak:.2f} GiB allocated at most on one rank, of {total:.1f} GiB"
    ranks = plural(local_ranks, "rank")
    return f"{ranks} × {peak:.2f} GiB at most = {local_ranks * peak:.2f} GiB, of {machine_memory_gib():.1f} GiB"


@dataclass
class StepMeter:
    """The counts of one optimiser step on this rank. `reduce` combines those of all ranks."""

    started: float = field(default_factory=time.perf_counter)
    waited_s: float = 0.0
    batches: "list[Batch]" = field(default_factory=list)
    flops: int = 0  # useful ones, of the batches

    def reduce(self, world: World, loss_sum: "torch.Tensor", weight: int) -> dict[str, float]:
        """Return the step's metrics over all ranks. `weight` is the sum over all ranks. A collective."""
        import torch

        elapsed_s = time.perf_counter() - self.started
        counts = [
            float(loss_sum),
            sum(b.num_label_tokens for b in self.batches),
            sum(len(b.ids) for b in self.batches),
            sum(b.num_tokens for b in self.batches),
            sum(b.input_ids.numel() for b in self.batches),
            sum(len(b.refused) for b in self.batches),
            sum(len(b.replaced) for b in self.batches),
            self.waited_s,
            elapsed_s,
            self.flops,
        ]
        totals = torch.tensor(counts, dtype=torch.float64, device=loss_sum.device)
        loss, labels, samples, tokens, slots, refused, replaced, waited, elapsed, flops = world.all_sum(totals).tolist()
        step_s = elapsed / world.size
        return {
            "loss": loss / weight if weight else math.nan,
            "samples_per_second": samples / step_s,
            "label_tokens_per_second": labels / step_s,
            "flops_per_second": flops / step_s,
            "data_wait_share": waited / elapsed,
            "padding_share": 1 - tokens / slots,
            "refused": refused,
            "replaced": replaced,
            "step_seconds": step_s,
        }


class RunLog:
    """A writer of a run's metrics on rank 0. On other ranks, every call does nothing."""

    def __init__(self, folder: Path, world: World, start_step: int, max_steps: int, every: int):
        self.active = world.is_main
        self.max_steps = max_steps
        self.every = every
        self.start_step = start_step
        self._pace_s: deque[float] = deque(maxlen=_PACE_STEPS)
        if not self.active:
            return
        from torch.utils.tensorboard import SummaryWriter

        self.metrics_path = folder / "metrics.jsonl"
        _cut_after(self.metrics_path, start_step)
        self.num_skipped = sum(bool(row.get("skipped")) for row in read_metrics(self.metrics_path))
        self._log = LineFile(folder / LOG_FILE)
        self._metrics = LineFile(self.metrics_path)
        self.tensorboard: SummaryWriter | None = SummaryWriter(str(folder / "tensorboard"), purge_step=start_step + 1)

    def say(self, text: str) -> None:
        """Write one line for people to the console and to log.txt."""
        if self.active:
            show(text)
            self._log.write(stamped(text))

    def step(self, metrics: dict[str, Any]) -> None:
        """Record one optimiser step. `metrics` has `step` (counted from 1), `loss` and the other metrics."""
        if not self.active:
            return
        self.num_skipped += bool(metrics["skipped"])
        metrics = {**metrics, "skipped_in_all": self.num_skipped}
        # JSON cannot represent a number that is not finite.
        finite = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
        self._metrics.write(json.dumps(finite) + "\n")
        curves = {name: value for name, value in finite.items() if value is not None and name not in ("step", "time")}
        self._draw("train", metrics["step"], curves)
        if metrics["step"] > self.start_step + 1:  # the first waits for the loader and the choice of kernels
            self._pace_s.append(metrics["step_seconds"])
        if metrics["step"] % self.every == 0 or metrics["step"] == self.max_steps:
            step_s = statistics.median(self._pace_s) if self._pace_s else None
            self.say(console_line(metrics, self.max_steps, step_s))

    def evaluation(self, step: int, split: str, scores: dict[str, float]) -> None:
        """Record an evaluation on `split` during the training."""
        if not self.active:
            return
        self._draw("eval", step, scores)
        self.say(f"step {step}  {split}  " + "  ".join(f"{name} {value:.4g}" for name, value in scores.items()))

    def _draw(self, group: str, step: int, values: Mapping[str, float]) -> None:
        """Add points to TensorBoard.

        If it cannot write, its curves end. metrics.jsonl has the same values and continues.
        """
        if self.tensorboard is None:
            return
        try:
            for name, value in values.items():
                self.tensorboard.add_scalar(f"{group}/{name}", value, step)
        except OSError as error:
            self.tensorboard = None
            self.say(f"step {step}: TensorBoard's curves end here, until the next start ({error})")

    def close(self) -> None:
        if self.active:
            if self.tensorboard is not None:
                self.tensorboard.close()
            self._metrics.close()
            self._log.close()


def console_line(metrics: dict[str, Any], max_steps: int, step_s: float | None) -> str:
    """Return one readable line of a step's metrics. It has the time left if the time of a step, `step_s`, is known."""
    left = "" if step_s is None else f"  left {clock((max_steps - metrics['step']) * step_s)}"
    line = (
        f"step {metrics['step']}/{max_steps}  loss {metrics['loss']:.4f}  lr {metrics['learning_rate']:.2e}  "
        f"grad {metrics['grad_norm']:.3f}  {metrics['samples_per_second']:.1f} samples/s  "
        f"mfu {metrics['mfu']:.1%}  wait {metrics['data_wait_share']:.0%}  pad {metrics['padding_share']:.0%}  "
        f"mem {metrics['peak_memory_gib']:.2f} GiB{left}"
    )
    if "loss_scale" in metrics:
        line += f"  scale {metrics['loss_scale']:g}"
    counts = {"refused": "refused", "replaced": "replaced", "skipped so far": "skipped_in_all"}
    return line + "".join(f"  {label} {metrics[name]:.0f}" for label, name in counts.items() if metrics[name])


def clock(seconds: float) -> str:
    """Return seconds as minutes and seconds, or as hours, minutes and seconds: 4:07, 1:02:03."""
    minutes, s = divmod(round(seconds), 60)
    return f"{minutes}:{s:02d}" if minutes < 60 else f"{minutes // 60}:{minutes % 60:02d}:{s:02d}"


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return the steps recorded in a `metrics.jsonl`. Skips incomplete records, such as a line that a kill cut off."""
    if not path.is_file():
        return []
    rows = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            rows.append(row)
    return rows


def _cut_after(path: Path, step: int) -> None:
    """Remove the lines of steps after `step`, because a resumed run takes those steps again."""
    kept = [row for row in read_metrics(path) if row["step"] <= step]
    write_atomically(path, "".join(json.dumps(row) + "\n" for row in kept))
