"""`kfood order`: who reads what, and what a resumed run will read."""

import argparse
import sys
from pathlib import Path

from kfood_dist.data.plan import Plan
from kfood_dist.data.shards import open_split
from kfood_dist.errors import RecipeError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("shards", type=Path, help="folder that `kfood pack` wrote")
    parser.add_argument("--split", default="train", help="which split (default: train)")
    parser.add_argument("--seed", type=int, default=0, help="train.seed of the recipe (default: 0)")
    parser.add_argument("--epoch", type=int, default=0, help="which pass over the data, from 0 (default: 0)")
    parser.add_argument("--ranks", type=int, default=1, help="processes that train (default: 1)")
    parser.add_argument("--micro-batch", type=int, default=1, help="samples per rank and micro-step (default: 1)")
    parser.add_argument("--accumulation", type=int, default=1, help="micro-steps per optimiser step (default: 1)")
    parser.add_argument("--start", type=int, default=0, metavar="N", help="begin at step N of the epoch (default: 0)")


def run(args: argparse.Namespace) -> int:
    """Print a header and one line `step, micro_step, rank, key` for each sample, in reading order per rank."""
    if min(args.ranks, args.micro_batch, args.accumulation) < 1 or min(args.seed, args.epoch, args.start) < 0:
        raise RecipeError(
            "--ranks, --micro-batch and --accumulation must be at least 1, --seed, --epoch and --start at least 0",
            "mend the arguments",
        )
    shards = open_split(args.shards, args.split)
    plan = Plan(len(shards), args.seed, args.ranks, args.micro_batch, args.accumulation)
    first = args.epoch * plan.steps_per_epoch
    keys = shards.index["key"]
    out = sys.stdout
    out.write("step, micro_step, rank, key\n")
    for step, slots in plan.slots(first + args.start, first + plan.steps_per_epoch):
        for micro_step, ranks in enumerate(slots):
            for rank, ids in enumerate(ranks):
                out.writelines(f"{step - first}, {micro_step}, {rank}, {keys[i].decode()}\n" for i in ids[ids >= 0])
    return 0
