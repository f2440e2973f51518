"""`python -m kfood_dist.launch.ranks …` runs `accelerate launch …` and says in one line how a rank failed.

When a rank fails, it says itself what is wrong, and then torchrun prints a long trace. Here the exit status of the rank
is passed on instead. The first rank that failed is named, unless a rank reported a mistake of the user.
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
from kfood_dist.system.processes import LAUNCHER_PID, describe_exit
from kfood_dist.system.utf8 import ensure_utf8
from kfood_dist.train.run.stop import is_ignored

# torchrun reads its option from this environment variable: `PET_` and the name (torch/distributed/argparse_util.py).
HANDLED = "PET_SIGNALS_TO_HANDLE"


def main() -> int:
    """Run accelerate's launcher. Returns 2 if a rank reported a mistake of the user, 1 if a rank failed, else 0.

    If a signal ends this process, or a single rank without torchrun, returns 128 plus its number, as a shell does.
    """
    ensure_utf8(None)
    console.best_effort(waits=False)
    if console.LOG_VARIABLE in os.environ:
        console.keep_in(Path(os.environ[console.LOG_VARIABLE]))
    from accelerate.commands.launch import main as accelerate_launch

    os.environ[LAUNCHER_PID] = str(os.getpid())  # so a rank that starts after this process has ended notices that
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
        print(f"rank {rank} failed first, {describe_exit(failure.exitcode)}", file=sys.stderr)
        return 1
    return 0


def handled_signals() -> list[str]:
    """Return the signals at which torchrun's agent ends its ranks: none that this process was started to ignore.

    `nohup` makes this process ignore SIGHUP. kfood_dist.launch.supervise makes it ignore the requests to stop.
    """
    requests = [number for number in (signal.SIGTERM, signal.SIGHUP) if not is_ignored(number)]
    return [number.name for number in (signal.SIGINT, signal.SIGQUIT, *requests)]


if __name__ == "__main__":
    raise SystemExit(main())
