"""`python -m kfood_dist.ranks …`: `accelerate launch …`, which says in one line how a rank failed.

torchrun answers a failed rank with a long trace of its own, after the rank has said what was wrong; here its exit
status is passed on, and a rank that could not say anything is named.
"""

import logging
import os
import signal
import subprocess
import sys

from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from kfood_dist.runtime import LAUNCHER_PID
from kfood_dist.utf8 import settle_names


def main() -> int:
    """Run accelerate's launcher; exit status 2 if a rank found a mistake to mend, 1 if one failed, else 0."""
    settle_names(None)
    from accelerate.commands.launch import main as accelerate_launch

    os.environ[LAUNCHER_PID] = str(os.getpid())  # a rank that starts when this has ended shall notice
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    try:
        accelerate_launch()
    except subprocess.CalledProcessError as error:  # a single process, started without torchrun
        return error.returncode
    except ChildFailedError as error:
        if any(failure.exitcode == 2 for failure in error.failures.values()):
            return 2
        rank, failure = error.get_first_failure()
        print(f"rank {rank} failed first, {how(failure.exitcode)}", file=sys.stderr)
        return 1
    return 0


def how(exitcode: int) -> str:
    """An exit status in words."""
    return f"killed by {signal.Signals(-exitcode).name}" if exitcode < 0 else f"with exit status {exitcode}"


if __name__ == "__main__":
    raise SystemExit(main())
