"""Measure the cost of checkpoints, the time to resume, and how far losses differ after a resume on other ranks.

    python tests/bench/resume.py [--model DIR] [--shards DIR] [--out tests/bench/resume.md]

Runs on a CPU or a GPU and needs the practice set (launch/quickstart.sh makes it). All runs start as a user starts
them, with launch/train.sh. The compared losses are those of the steps after the resume. Dropout is off, because each
rank draws its own.
"""

import argparse
import json
import re
import shutil
import statistics
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[2]
STEPS, CUT = 10, 5
GLOBAL_BATCH = 12
MATRIX = [  # ranks and ZeRO stage before the resume, ranks and ZeRO stage after it
    ((1, 0), (2, 2)),
    ((2, 2), (1, 0)),
    ((2, 2), (2, 1)),
    ((2, 2), (2, 3)),
    ((2, 3), (2, 2)),
    ((2, 2), (3, 2)),
    ((4, 2), (2, 2)),
]
KINDS: dict[str, dict[str, Any]] = {
    "4-bit, AdamW8bit": {"model": {"quantization": "nf4"}, "optim": {"name": "adamw8bit"}},
    "float32, AdamW": {"model": {"quantization": "none", "precision": "fp32"}, "optim": {"name": "adamw"}},
}


class Run:
    """One run directory with its recipe."""

    def __init__(self, folder: Path, args: argparse.Namespace, kind: str, ranks: int, stage: int, save_every: int):
        self.recipe = folder / "recipe.yaml"
        self.dir = folder / "run"
        folder.mkdir(parents=True, exist_ok=True)
        tree: dict[str, dict[str, Any]] = {
            "data": {"shards": str(args.shards), "num_workers": 1},
            "model": {"base": str(args.model)},
            "lora": {"dropout": 0.0},
            "optim": {"learning_rate": 1e-3, "warmup_ratio": 0.0},
            "train": {"micro_batch_size": 1, "global_batch_size": GLOBAL_BATCH, "max_steps": STEPS},
            "run": {"dir": str(self.dir)},
        }
        for section, keys in KINDS[kind].items():
            tree[section] |= keys
        tree["train"] |= {"save_every_steps": save_every, "zero_stage": stage}
        self.recipe.write_text(yaml.safe_dump(tree))
        self.ranks, self.stage = ranks, stage

    def train(self, ranks: int | None = None, stage: int | None = None) -> tuple[str, float]:
        """Start the run and wait. Returns its output and the seconds from the start to the end of its first step."""
        words = ["--processes", str(ranks or self.ranks)]
        words += ["--set", f"train.zero_stage={self.stage if stage is None else stage}", "--set", f"run.dir={self.dir}"]
        began = time.time()
        done = subprocess.run(
            ["bash", str(ROOT / "launch/train.sh"), str(self.recipe), *words],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        if done.returncode:
            raise SystemExit(done.stdout + done.stderr)
        resumed = re.search(r"resumed after step (\d+)", done.stdout)
        first = int(resumed[1]) if resumed else 0
        return done.stdout, self.rows()[first]["time"] - began

    def rows(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.dir / "metrics.jsonl").read_text().splitlines()]

    def cut(self, folder: Path) -> "Run":
        """Return a copy of the run as it was after step CUT."""
        shutil.copytree(self.dir, folder / "run")
        for path in (folder / "run" / "checkpoints").iterdir():
            if path.name != f"step-{CUT:08d}":
                shutil.rmtree(path)
        shutil.rmtree(folder / "run" / "adapter", ignore_errors=True)
        copy = object.__new__(Run)
        copy.recipe, copy.dir, copy.ranks, copy.stage = self.recipe, folder / "run", self.ranks, self.stage
        return copy


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shards", type=Path, default=ROOT / "shards/practice")
    parser.add_argument("--model", type=Path, default=ROOT / "data/practice/model")
    parser.add_argument("--out", type=Path, help="write the tables here")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        text = "\n".join([*cost(Path(folder), args), "", *elastic(Path(folder), args), ""])
    print(text)
    if args.out:
        args.out.write_text(text, encoding="utf-8")


def cost(folder: Path, args: argparse.Namespace) -> list[str]:
    """Save after every second step. Returns a table: seconds of a step, a checkpoint and a restart, and bytes."""
    lines = [
        "| 4-bit, ZeRO-2 | a step | a checkpoint | of a step | bytes | start to first step | requeued, to first step |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for ranks in (1, 2):
        run = Run(folder / f"cost{ranks}", args, "4-bit, AdamW8bit", ranks, 2, save_every=2)
        output, first_s = run.train()
        save_s = statistics.median(float(s) for s in re.findall(r"checkpoint written in ([\d.]+) s", output))
        step_s = statistics.median(row["step_seconds"] for row in run.rows()[1:])
        newest = max((run.dir / "checkpoints").glob("step-*"))
        num_bytes = sum(path.stat().st_size for path in newest.rglob("*") if path.is_file())
        shutil.rmtree(newest)
        _, again_s = run.train()
        lines.append(
            f"| {ranks} rank{'s' * (ranks > 1)} | {step_s:.2f} s | {save_s:.2f} s | {save_s / step_s:.0%} | "
            f"{num_bytes:,} | {first_s:.1f} s | {again_s:.1f} s |"
        )
    return lines


def elastic(folder: Path, args: argparse.Namespace) -> list[str]:
    """Return the matrix of the largest relative difference of a loss after the resume from the uninterrupted run's."""
    lines = [f"| resumed after step {CUT} of {STEPS} | " + " | ".join(KINDS) + " |", "|---|---:|---:|"]
    whole: dict[tuple[str, tuple[int, int]], Run] = {}
    for number, (before, after) in enumerate(MATRIX):
        cells = []
        for kind in KINDS:
            if (kind, before) not in whole:
                run = Run(folder / f"whole{len(whole)}", args, kind, *before, save_every=CUT)
                run.train()
                whole[kind, before] = run
            run = whole[kind, before].cut(folder / f"{number}{kind}")
            run.train(*after)
            pairs = zip(run.rows()[CUT:], whole[kind, before].rows()[CUT:], strict=True)
            apart = max(abs(mine["loss"] - theirs["loss"]) / theirs["loss"] for mine, theirs in pairs)
            cells.append(f"{apart:.1e}")
        names = [
            f"{ranks} rank{'s' * (ranks > 1)}, {f'ZeRO-{stage}' if stage else 'no ZeRO'}"
            for ranks, stage in (before, after)
        ]
        lines.append(f"| {names[0]} → {names[1]} | {' | '.join(cells)} |")
    return lines


if __name__ == "__main__":
    main()
