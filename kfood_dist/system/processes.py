"""Settings of a process: ending with its parent, cores, memory, open files, quiet libraries."""

import ctypes
import logging
import os
import resource
import signal
import warnings
from collections.abc import Mapping

# Our launcher puts its process id here, for the ranks that it starts.
LAUNCHER_PID = "KFOOD_LAUNCHER_PID"


def end_with_launcher(environment: Mapping[str, str] | None = None) -> None:
    """Make this rank end when `accelerate launch` ends, in any way.

    The launcher puts each rank into a separate session. So the ranks of a killed launcher would continue to train, and
    would write to the same files as a second start. Does nothing in a process that `accelerate launch` did not start.
    """
    env = os.environ if environment is None else environment
    if has_launcher(env):
        end_with_parent(int(env.get(LAUNCHER_PID, os.getppid())))


def has_launcher(env: Mapping[str, str]) -> bool:
    """Return whether `accelerate launch` started the process that has this environment."""
    by_torchrun = "TORCHELASTIC_RUN_ID" in env  # accelerate uses it for several processes and for DeepSpeed
    by_accelerate = "ACCELERATE_MIXED_PRECISION" in env and "ACCELERATE_DYNAMO_BACKEND" in env  # for one process
    return by_torchrun or by_accelerate


def end_with_parent(pid: int, by: int = signal.SIGKILL) -> None:
    """Make the kernel send this process the signal `by` as soon as its parent `pid` ends. Sends it now if it has ended.

    The kernel counts the thread that started this process as the parent.
    """
    pr_set_pdeathsig = 1  # prctl(2), linux/prctl.h
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, by, 0, 0, 0)
    if os.getppid() != pid:
        os.kill(os.getpid(), by)


def describe_exit(exitcode: int) -> str:
    """Return a process's exit code in words. A negative code is a signal."""
    return f"killed by {signal.Signals(-exitcode).name}" if exitcode < 0 else f"with exit status {exitcode}"


def keep_freed_memory() -> None:
    """Make malloc keep the freed memory of one picture for the next. Does nothing if the C library is not glibc.

    Otherwise, arrays of over 128 KiB go back to the kernel each time, and the kernel gives new memory page by page. In
    a loader process that took as long as decoding. The process keeps up to 256 MiB of freed memory (mallopt(3)).
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        m_trim_threshold, m_top_pad, m_mmap_threshold = -1, -2, -3  # malloc.h
        mallopt(m_mmap_threshold, 32 << 20)
        mallopt(m_trim_threshold, 256 << 20)
        mallopt(m_top_pad, 16 << 20)


def raise_open_file_limit() -> None:
    """Allow as many open files as the system permits, because a process keeps open the shards that it reads."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def quiet_loggers() -> None:
    """Hide the libraries' warnings that a user can do nothing about. Their errors stay.

    DeepSpeed sets its logger's level when it is imported, so a filter is needed too.
    """
    for library in ("DeepSpeed", "bitsandbytes", "accelerate", "torch.distributed"):
        logger = logging.getLogger(library)
        logger.setLevel(logging.ERROR)
        logger.addFilter(_is_error)


def _is_error(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.ERROR


def quiet_libraries() -> None:
    """Hide the libraries' notices that a user can do nothing about. Our own warnings and all errors stay."""
    import transformers

    quiet_loggers()
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    for library in ("torch", "transformers", "deepspeed", "peft"):
        warnings.filterwarnings("ignore", category=FutureWarning, module=library)
        warnings.filterwarnings("ignore", category=DeprecationWarning, module=library)


def available_cores() -> int:
    """Return how many cores this process may use. In a Slurm job or a container, the machine may have more."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
