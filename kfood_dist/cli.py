"""`kfood VERB …`: finds the verb's module, runs it, and turns a user's mistake into one clear message.

A verb's module has `add_arguments(parser)` and `run(args) -> exit status`. It is imported only when the verb is used,
so `kfood --help` and packing on a login node stay light.
"""

import argparse
import importlib
import sys

from kfood_dist import __version__
from kfood_dist.errors import KfoodError, LaunchError
from kfood_dist.system import console
from kfood_dist.system.utf8 import ensure_utf8
from kfood_dist.system.world import World

VERBS = {
    "mini": (
        "kfood_dist.practice.mini",
        "write a practice set in the AI-Hub layout and a tiny untrained model",
    ),
    "pack": ("kfood_dist.pack.pack", "pack a folder or a CSV of pictures into WebDataset shards"),
    "verify": ("kfood_dist.data.shards.verify", "check packed shards byte by byte"),
    "order": ("kfood_dist.data.order", "print which rank reads which sample at which step"),
    "train": (
        "kfood_dist.launch.train",
        "train with a recipe; resumes by itself (start it with launch/train.sh)",
    ),
    "eval": ("kfood_dist.evaluate.main", "evaluate a model on held-out pictures"),
    "compare": ("kfood_dist.evaluate.compare", "put reports side by side, such as base and tuned"),
    "predict": ("kfood_dist.evaluate.predict", "name the dish on single pictures"),
    "doctor": ("kfood_dist.doctor.checks", "print what this machine has, what is missing, and how to fix it"),
}
RESULTS = ("order", "predict")  # verbs whose standard output is their result


def build_parser(verb: str | None) -> argparse.ArgumentParser:
    """Return the parser of all verbs. Only `verb` gets its own arguments."""
    parser = argparse.ArgumentParser(prog="kfood", description="From a folder of dish photos to a tuned Qwen2.5-VL.")
    parser.add_argument("--version", action="version", version=f"kfood_dist {__version__}")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    for name, (module, summary) in VERBS.items():
        sub = verbs.add_parser(name, help=summary, description=summary[0].upper() + summary[1:] + ".")
        if name == verb:
            importlib.import_module(module).add_arguments(sub)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run one verb, and return its exit status.

    0: done. 1: the verb found faults. 2: the user has to correct a mistake. 130: interrupted. Without `argv` this is
    the complete program: it reads its own command line, and may restart itself in Python's UTF-8 mode.
    """
    try:
        ensure_utf8(argv)
    except LaunchError as error:
        print(f"kfood: {error}", file=sys.stderr)
        return error.exit_status
    argv = sys.argv[1:] if argv is None else argv
    verb = next((word for word in argv if word in VERBS), None)
    console.best_effort(waits=verb != "train")
    args = build_parser(verb).parse_args(argv)
    try:
        if args.verb in RESULTS:
            console.output_is_result()
        status = importlib.import_module(VERBS[args.verb][0]).run(args)
        sys.stdout.flush()
        return status
    except console.ReaderLeft:
        return 0
    except KfoodError as error:
        if World.from_environment().is_main:  # each rank finds the same mistake; one prints it
            print(f"kfood {args.verb}: {error}", file=sys.stderr)
        return error.exit_status
    except KeyboardInterrupt:
        print(f"kfood {args.verb}: interrupted", file=sys.stderr)
        return 130
