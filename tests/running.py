"""Runs the real command the way a user does, and reads what it wrote."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[1]
TIMEOUT_S = 420


def environment(gpu: bool = False) -> dict[str, str]:
    """This process's environment without rank variables and thread counts; the GPUs are hidden unless asked for."""
    dropped = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "OMP_NUM_THREADS")
    kept = {name: value for name, value in os.environ.items() if name not in dropped}
    return kept if gpu else {**kept, "CUDA_VISIBLE_DEVICES": ""}


def write_recipe(path: Path, model: Path, shards: Path, /, **sections: dict[str, Any]) -> Path:
    """A recipe for the tiny model and shards; `sections` add to or replace what stands here."""
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
    threads: int | None = None,
    also: Sequence[Path] = (),
) -> "subprocess.Popen[str]":
    """Start `launch/train.sh` in a process group of its own; `also` are recipes to train after the first.

    `threads` per process, instead of what it would choose.
    """
    words = [word for text in overrides for word in ("--set", text)]
    return subprocess.Popen(
        ["bash", str(ROOT / "launch/train.sh"), str(recipe), *map(str, also), "--processes", str(processes), *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment(gpu) | ({"OMP_NUM_THREADS": str(threads)} if threads else {}),
        start_new_session=True,
        cwd=ROOT,
    )


def train(
    recipe: Path, processes: int, overrides: Sequence[str] = (), gpu: bool = False, threads: int | None = None
) -> str:
    """Run `launch/train.sh` to its end; returns what it printed, and fails with it if the status is not 0."""
    process = start(recipe, processes, overrides, gpu, threads)
    output, _ = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 0, output
    return output


def kfood(*words: str, timeout_s: float = 120) -> "subprocess.CompletedProcess[str]":
    """Run `python -m kfood_dist …` to its end."""
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
    """All lines of a run's metrics.jsonl."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def adapter_bytes(run: Path) -> bytes:
    """The published adapter's weights as they lie on disk."""
    return (run / "adapter" / "adapter_model.safetensors").read_bytes()
