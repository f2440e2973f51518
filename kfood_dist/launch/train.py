"""`kfood train`: trains in this process; several recipes, or `--processes`, start ranks of their own."""

import argparse

from kfood_dist.errors import LaunchError
from kfood_dist.system.world import World
from kfood_dist.train import main as training

add_arguments = training.add_arguments


def run(args: argparse.Namespace) -> int:
    """Train, here or in ranks that are started for each recipe; exit status as launch/train.sh gives it."""
    if len(args.recipes) <= 1 and not args.processes:
        return training.run(args)
    training.require_recipe(args)
    if World.from_environment().size > 1:
        raise LaunchError("a rank trains one recipe", "start through launch/train.sh")
    from kfood_dist.launch import start  # a rank need not pay for it

    processes = ["--processes", args.processes] if args.processes else []
    return start.main([*training.words_of(args, args.recipes, args.set), *processes])
