"""`python -m kfood_dist.launch.ranks …`: `accelerate launch …`, which says in one line how a rank failed.

torchrun answers a failed rank with a long trace of its own, after the rank has said what was wrong; here its exit
status is passed on, and a rank that could not say anything is named.
"""

import logging
import os
import signal
import subprocess
import sys
from pathlib import Path

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from kfood_dist.system import console
from kfood_dist.system.processes import LAUNCHER_PID, how_it_ended
from kfood_dist.system.utf8 import settle_names
from kfood_dist.train.run.stop import is_ignored

# How torchrun reads its option from the environment: `PET_` and the name (torch/distributed/argparse_util.py).
HANDLED = "PET_SIGNALS_TO_HANDLE"


def main() -> int:
    """Run accelerate's launcher; exit status 2 if a rank found a mistake to mend, 1 if one failed, else 0.

    A signal that ends a rank or this process gives 128 and its number, as in a shell.
    """
    settle_names(None)
    console.best_effort(waits=False)
    if console.LOG_VARIABLE in os.environ:
        console.keep_in(Path(os.environ[console.LOG_VARIABLE]))
    from accelerate.commands.launch import main as accelerate_launch

    os.environ[LAUNCHER_PID] = str(os.getpid())  # a rank that starts when this has ended shall notice
    os.environ[HANDLED] = ",".join(handled_signals())
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    try:
        accelerate_launch()
    except subprocess.CalledProcessError as error:  # a single process, started without torchrun
        return 128 - error.returncode if error.returncode < 0 else error.returncode
    except SignalException as error:
        print(f"ended by {error.sigval.name}", file=sys.stderr)
        return 128 + error.sigval
    except ChildFailedError as error:
        if any(failure.exitcode == 2 for failure in error.failures.values()):
            return 2
        rank, failure = error.get_first_failure()
        print(f"rank {rank} failed first, {how_it_ended(failure.exitcode)}", file=sys.stderr)
        return 1
    return 0


def handled_signals() -> list[str]:
    """What torchrun's agent ends its ranks at: none of the signals that this process was started to ignore.

    `nohup` ignores SIGHUP, kfood_dist.launch.supervise the requests to stop.
    """
    requests = [number for number in (signal.SIGTERM, signal.SIGHUP) if not is_ignored(number)]
    return [number.name for number in (signal.SIGINT, signal.SIGQUIT, *requests)]


if __name__ == "__main__":
    raise SystemExit(main())
