"""`kfood train` trains in this process. With several recipes or `--processes`, it starts ranks instead."""

import argparse

from kfood_dist.errors import LaunchError
from kfood_dist.system.world import World
from kfood_dist.train import main as training

add_arguments = training.add_arguments


def run(args: argparse.Namespace) -> int:
    """Train in this process, or in ranks that are started for each recipe. Returns launch/train.sh's exit status."""
    if len(args.recipes) <= 1 and not args.processes:
        return training.run(args)
    training.require_recipe(args)
    if World.from_environment().size > 1:
        raise LaunchError("a rank trains one recipe and starts no processes", "start through launch/train.sh")
    from kfood_dist.launch import start  # imported only here, because a rank does not need it

    processes = ["--processes", args.processes] if args.processes else []
    return start.main([*training.command_words(args, args.recipes, args.set), *processes])
