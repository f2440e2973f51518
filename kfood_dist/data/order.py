"""`kfood order`: print which rank reads which sample in which step, also in a resumed run."""

import argparse
import sys

import numpy as np

from kfood_dist.config.recipe import build_data
from kfood_dist.data.mix import Mixture, build_data_order, open_mixture
from kfood_dist.data.plan.plan import EMPTY, Plan
from kfood_dist.errors import RecipeError
from kfood_dist.system.words import plural

# The most samples that a micro-step of all ranks may hold: their array takes 128 MiB.
_MAX_SLOTS = 2**24


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("shards", help="folder or URL that `kfood pack` wrote")
    parser.add_argument("--split", default="train", help="which split (default: train)")
    parser.add_argument("--seed", type=int, default=0, help="train.seed of the recipe (default: 0)")
    parser.add_argument("--epoch", type=int, default=0, help="which pass over the data, from 0 (default: 0)")
    parser.add_argument("--ranks", type=int, default=1, help="processes that train (default: 1)")
    parser.add_argument("--micro-batch", type=int, default=1, help="samples per rank and micro-step (default: 1)")
    parser.add_argument("--accumulation", type=int, default=1, help="micro-steps per optimiser step (default: 1)")
    parser.add_argument("--start", type=int, default=0, metavar="N", help="begin at step N of the epoch (default: 0)")
    parser.add_argument("--steps", type=int, metavar="N", help="print at most N steps (default: to the epoch's end)")
    parser.add_argument("--window", type=int, metavar="N", help="data.shuffle_window of the recipe")
    parser.add_argument(
        "--class-balance", type=float, default=0.0, metavar="X", help="data.class_balance of the recipe"
    )
    parser.add_argument(
        "--mix", action="append", default=[], metavar="DIR=WEIGHT", help="one entry of data.mix; may be repeated"
    )


def run(args: argparse.Namespace) -> int:
    """Print a header and one line `step, micro_step, rank, key` for each sample, in reading order per rank."""
    _require_numbers(args)
    recipe = {"shards": args.shards, "shuffle_window": args.window, "class_balance": args.class_balance}
    data = build_data(recipe | {"mix": [_mixed_in(text) for text in args.mix]}, "the arguments")
    mixture = open_mixture(data, args.split)
    plan = Plan(build_data_order(mixture, data), args.seed, args.ranks, args.micro_batch, args.accumulation)
    if args.start >= plan.steps_per_epoch:
        raise RecipeError(
            f"--start {args.start} is beyond the epoch, which has {plural(plan.steps_per_epoch, 'step')}",
            f"begin at 0 to {plan.steps_per_epoch - 1}, or raise --epoch",
        )
    stop = plan.steps_per_epoch if args.steps is None else min(args.start + args.steps, plan.steps_per_epoch)
    _print_steps(plan, mixture, args.epoch * plan.steps_per_epoch, args.start, stop)
    return 0


def _print_steps(plan: Plan, mixture: Mixture, first: int, start: int, stop: int) -> None:
    """Print the steps `start` to `stop` - 1 of the epoch that begins with step `first`."""
    write = sys.stdout.write
    write("step, micro_step, rank, key\n")
    for step, slots in plan.slots(first + start, first + stop):
        taken = slots != EMPTY
        keys = map(mixture.key, slots[taken].tolist())
        for (micro_step, rank, _), key in zip(np.argwhere(taken).tolist(), keys, strict=True):
            write(f"{step - first}, {micro_step}, {rank}, {key}\n")


def _require_numbers(args: argparse.Namespace) -> None:
    steps = 0 if args.steps is None else args.steps
    if min(args.ranks, args.micro_batch, args.accumulation) < 1 or min(args.epoch, args.start, steps) < 0:
        raise RecipeError(
            "--ranks, --micro-batch and --accumulation must be at least 1; --epoch, --start, --steps at least 0",
            "correct the arguments",
        )
    if args.ranks * args.micro_batch > _MAX_SLOTS:
        raise RecipeError(f"--ranks × --micro-batch may be at most {_MAX_SLOTS:,}", "correct the arguments")
    if not 0 <= args.seed < 2**32 or args.epoch >= 2**32:
        raise RecipeError("--seed and --epoch must be 0 to 4,294,967,295, like train.seed", "correct the arguments")


def _mixed_in(text: str) -> dict[str, str]:
    where, equals, weight = text.rpartition("=")
    if not equals:
        raise RecipeError(f"--mix {text} has no weight", "write it as --mix DIR=WEIGHT, such as --mix shards/more=0.5")
    return {"shards": where, "weight": weight}
