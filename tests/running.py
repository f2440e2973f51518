"""Run training as a user does, or in ranks forked from a server, and read what it wrote."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from forked import Ended, Ranks, run_ranks, run_verb, start_ranks

from kfood_dist.config.recipe import load_recipe
from kfood_dist.launch.start import Machine, choose_launch

ROOT = Path(__file__).resolve().parents[1]
TIMEOUT_S = 420


def environment(gpu: bool = False) -> dict[str, str]:
    """Return this process's environment without rank variables and thread counts. Hides the GPUs unless `gpu`."""
    dropped = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "OMP_NUM_THREADS")
    kept = {name: value for name, value in os.environ.items() if name not in dropped}
    return kept if gpu else {**kept, "CUDA_VISIBLE_DEVICES": ""}


def write_recipe(path: Path, model: Path, shards: Path, /, **sections: dict[str, Any]) -> Path:
    """Write a recipe for the tiny model and shards. `sections` adds keys to these sections or replaces them."""
    tree: dict[str, dict[str, Any]] = {
        "data": {"shards": str(shards), "num_workers": 1},
        "model": {"base": str(model)},
        "lora": {},
        "optim": {"learning_rate": 1e-3, "warmup_ratio": 0.0},
        "train": {"micro_batch_size": 2, "gradient_accumulation_steps": 2, "max_steps": 4, "save_every_steps": 100},
        "run": {"dir": str(path.parent / "run")},
    }
    for section, keys in sections.items():
        tree.setdefault(section, {}).update(keys)
    path.write_text(yaml.safe_dump(tree, allow_unicode=True), encoding="utf-8")
    return path


def start(
    recipe: Path,
    processes: int,
    overrides: Sequence[str] = (),
    gpu: bool = False,
    also: Sequence[Path] = (),
) -> "subprocess.Popen[str]":
    """Start `launch/train.sh` in its own process group. `also` are recipes to train after the first.

    Each process has one thread, like the forked ranks that it is compared with.
    """
    words = [word for text in overrides for word in ("--set", text)]
    process = subprocess.Popen(
        ["bash", str(ROOT / "launch/train.sh"), str(recipe), *map(str, also), "--processes", str(processes), *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment(gpu) | {"OMP_NUM_THREADS": "1"},
        start_new_session=True,
        cwd=ROOT,
    )
    _launched.append(process)
    return process


_launched: "list[subprocess.Popen[str]]" = []


def kill_launches() -> None:
    """Kill every training that `start` began and that still runs."""
    while _launched:
        process = _launched.pop()
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()


def launch(recipe: Path, processes: int, overrides: Sequence[str] = (), gpu: bool = False) -> str:
    """Run `launch/train.sh` to its end and return its output. Fails with that output if the status is not 0."""
    process = start(recipe, processes, overrides, gpu)
    output, _ = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 0, output
    return output


def train(recipe: Path, ranks: int, overrides: Sequence[str] = (), words: Sequence[str] = ()) -> str:
    """Train in forked ranks to the end and return their output. Fails with that output if the status is not 0."""
    ended = try_train(recipe, ranks, overrides, words)
    assert ended.status == 0, ended.output
    return ended.output


def try_train(recipe: Path, ranks: int, overrides: Sequence[str] = (), words: Sequence[str] = ()) -> Ended:
    """Train in forked ranks to the end, and return their statuses and output without a check."""
    with training(recipe, ranks, overrides, words) as under_way:
        return under_way.wait(TIMEOUT_S)


@contextmanager
def training(
    recipe: Path,
    ranks: int,
    overrides: Sequence[str] = (),
    words: Sequence[str] = (),
    work: Callable[[list[str]], int] = run_verb,
) -> Iterator[Ranks]:
    """Start in forked ranks what `launch/train.sh` would start: a fifth of the time, and bit-identical losses.

    `words` are further options of `kfood train`. `work` replaces `run_verb`.
    """
    machine = Machine(num_gpus=0, num_cores=len(os.sched_getaffinity(0)), has_deepspeed=True)
    way = choose_launch(machine, load_recipe(recipe, overrides).train.zero_stage, ranks)
    settings = [word for text in (*overrides, f"train.zero_stage={way.zero_stage}") for word in ("--set", text)]
    with start_ranks(
        work,
        ["train", "--config", str(recipe), *settings, *words],
        ranks=ranks,
        environment=environment(),
        folder=ROOT,
        deepspeed=way.configuration == "deepspeed",
    ) as started:
        yield started


def wait_until(under_way: "subprocess.Popen[str] | Ranks", there: Callable[[], bool], timeout_s: float = 240) -> None:
    """Wait until `there` returns True. Fails with the output if the training ends before that or the time is over."""
    deadline = time.monotonic() + timeout_s
    while not there():
        alive = under_way.are_alive if isinstance(under_way, Ranks) else under_way.poll() is None
        if alive and time.monotonic() < deadline:
            time.sleep(0.01)
        elif not there():
            raise AssertionError(_said(under_way))


def _said(under_way: "subprocess.Popen[str] | Ranks") -> str:
    if isinstance(under_way, Ranks):
        return "".join(under_way.outputs)
    if under_way.poll() is None:
        os.killpg(under_way.pid, signal.SIGKILL)
    return under_way.communicate()[0]


def num_steps(run: Path) -> int:
    """Return the number of optimiser steps in metrics.jsonl so far."""
    path = run / "metrics.jsonl"
    return len(path.read_text(encoding="utf-8").splitlines()) if path.is_file() else 0


def evaluate(*words: str | Path, ranks: int) -> Ended:
    """Run `kfood eval WORDS` in forked ranks with one thread each: thread counts must not change the sums of a test."""
    return run_ranks(
        run_verb, ["eval", *map(str, words)], ranks=ranks, environment=environment(), folder=ROOT, timeout_s=TIMEOUT_S
    )


def kfood(*words: str, timeout_s: float = 120) -> "subprocess.CompletedProcess[str]":
    """Run `python -m kfood_dist WORDS` to its end."""
    return subprocess.run(
        [sys.executable, "-m", "kfood_dist", *words],
        capture_output=True,
        text=True,
        env=environment(),
        timeout=timeout_s,
        check=False,
        cwd=ROOT,
    )


def metrics(run: Path) -> list[dict[str, Any]]:
    """Return all lines of a run's metrics.jsonl."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def adapter_bytes(run: Path) -> bytes:
    """Return the published adapter's weight file as bytes."""
    return (run / "adapter" / "adapter_model.safetensors").read_bytes()
