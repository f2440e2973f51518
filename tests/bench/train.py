"""Measure training beside other trainers and with each of our levers, on the same small model. One command, one run.

    python tests/bench/train.py --out tests/bench/reports/ [--rounds 5] [--steps 12] [--only ours trl-recompute-on]

    scaled model, pictures, order ──► check: same losses? ──► tune the peers ──► interleaved rounds ──► report

The model has the classes and the proportions of the 3B model and 61 M parameters (training/scaled_model.py). Every
trainer reads the same pictures in the same order, with the same question, label tokens, LoRA targets, quantisation,
precision, optimiser, learning rate and global batch. The rest of ours is as in launch/recipes/qwen2.5-vl-3b.yaml.

The peers get environments of their own, which never mix with this project's. They are made under --keep at the first
run, which takes minutes. With --keep, later runs use the model, the pictures and the environments again. A contender
that fails becomes a line with its error in the report. The report is a dated Markdown file, with all figures in a JSON
file beside it.
"""

import argparse
import os
import signal
import sys
import tempfile
from pathlib import Path

from training import contenders, environments, materials, report
from training.rounds import TUNE_STEPS, Bench, Outcome


def main() -> None:
    args = build_parser().parse_args()
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # so that no contender stays behind
    chosen, missing = contenders.choose(args.only, args.skip, args.global_batch)
    if args.steps <= args.warmup or args.warmup < 1:
        raise SystemExit("train.py: --warmup must be at least 1, and --steps more than --warmup")
    with tempfile.TemporaryDirectory() as folder:
        keep = (args.keep or Path(folder)).resolve()
        keep.mkdir(parents=True, exist_ok=True)
        most_steps = max(args.steps, args.check_steps, args.warmup + TUNE_STEPS)
        shared = materials.prepare(keep, args.global_batch, most_steps, args.learning_rate)
        bench = Bench(
            materials=shared,
            work=keep / "runs",
            environments=keep / "environments",
            steps=args.steps,
            warmup=args.warmup,
            check_steps=args.check_steps,
            rounds=args.rounds,
            threads=args.threads,
        )
        absent = {name: environments.why_absent(missing[name], bench.environments) for name in missing}
        checks = bench.check(contenders.to_check(chosen))
        chosen, trials = (chosen, []) if args.no_tuning else bench.tune(chosen)
        rounds: list[Outcome] = []
        try:
            bench.measure(chosen, rounds)
        finally:  # also if it is interrupted
            print(report.write(args.out, bench, chosen, report.Found(checks, trials, rounds, absent)))


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--out", type=Path, required=True, metavar="DIR", help="write train-DATE.md and train-DATE.json here")
    add("--rounds", type=int, default=5, help="runs of each contender (default: 5)")
    add("--steps", type=int, default=12, help="optimiser steps of each run (default: 12)")
    add("--warmup", type=int, default=2, help="first steps of each run that are not timed (default: 2)")
    add("--check-steps", type=int, default=8, help="steps of the runs that compare losses; 0: none (default: 8)")
    add("--global-batch", type=int, default=8, help="samples per optimiser step (default: 8)")
    add("--learning-rate", type=float, default=1e-3, help="constant; the model is random (default: 0.001)")
    add("--only", nargs="+", default=[], metavar="NAME", help="measure only these contenders")
    add("--skip", nargs="+", default=[], metavar="NAME", help="do not measure these contenders")
    add("--threads", type=int, default=len(os.sched_getaffinity(0)), help="threads of each run (default: all cores)")
    add("--keep", type=Path, metavar="DIR", help="keep model, pictures, environments and runs here, and reuse them")
    add("--no-tuning", action="store_true", help="do not look for the fastest batch and workers of the peers")
    return parser


if __name__ == "__main__":
    main()
