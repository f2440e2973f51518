"""What a process asks of the system: to end with its parent, cores, memory, open files, quiet libraries."""

import ctypes
import logging
import os
import resource
import signal
import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING

# Where our launcher puts its process id, for the ranks it starts.
LAUNCHER_PID = "KFOOD_LAUNCHER_PID"

if TYPE_CHECKING:
    pass


def end_with_launcher(environment: Mapping[str, str] | None = None) -> None:
    """Let this rank end when `accelerate launch` does, however that ends.

    The launcher puts ranks into sessions of their own, so a launcher that is killed leaves them training, and writing
    where a second start writes too. A process that was not started by it is left alone.
    """
    env = os.environ if environment is None else environment
    if has_launcher(env):
        end_with_parent(int(env.get(LAUNCHER_PID, os.getppid())))


def has_launcher(env: Mapping[str, str]) -> bool:
    """Whether `accelerate launch` started the process that has this environment."""
    by_torchrun = "TORCHELASTIC_RUN_ID" in env  # accelerate's launcher of several processes, and of DeepSpeed
    by_accelerate = "ACCELERATE_MIXED_PRECISION" in env and "ACCELERATE_DYNAMO_BACKEND" in env  # of a single one
    return by_torchrun or by_accelerate


def end_with_parent(pid: int, by: int = signal.SIGKILL) -> None:
    """Let the kernel send this process the signal `by`, at once, when its parent `pid` ends, or ended already.

    The thread that started this process counts as its parent.
    """
    pr_set_pdeathsig = 1  # prctl(2), linux/prctl.h
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, by, 0, 0, 0)
    if os.getppid() != pid:
        os.kill(os.getpid(), by)


def how_it_ended(exitcode: int) -> str:
    """A process's exit status in words, negative for a signal."""
    return f"killed by {signal.Signals(-exitcode).name}" if exitcode < 0 else f"with exit status {exitcode}"


def keep_freed_memory() -> None:
    """Let malloc keep what a picture took for the next one; nothing where the C library is not glibc.

    Arrays of over 128 KiB otherwise go back to the kernel each time, and come anew page by page: on a loader process
    that cost as much as decoding. Up to 256 MiB of freed memory stay with the process (mallopt(3)).
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        m_trim_threshold, m_top_pad, m_mmap_threshold = -1, -2, -3  # malloc.h
        mallopt(m_mmap_threshold, 32 << 20)
        mallopt(m_trim_threshold, 256 << 20)
        mallopt(m_top_pad, 16 << 20)


def raise_open_file_limit() -> None:
    """Allow as many open files as the system grants: a process keeps the shards open that it reads."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def quiet_loggers() -> None:
    """Keep the libraries' warnings a user can do nothing about out of the console; their errors stay.

    DeepSpeed sets its logger's level when it is imported, which the filter outlasts.
    """
    for library in ("DeepSpeed", "bitsandbytes", "accelerate", "torch.distributed"):
        logger = logging.getLogger(library)
        logger.setLevel(logging.ERROR)
        logger.addFilter(_is_error)


def _is_error(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.ERROR


def quiet_libraries() -> None:
    """Keep notices a user can do nothing about out of a run's console; warnings of our own and errors stay."""
    import transformers

    quiet_loggers()
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    for library in ("torch", "transformers", "deepspeed", "peft"):
        warnings.filterwarnings("ignore", category=FutureWarning, module=library)
        warnings.filterwarnings("ignore", category=DeprecationWarning, module=library)


def available_cores() -> int:
    """The cores this process may use, which in a Slurm job or a container are fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
