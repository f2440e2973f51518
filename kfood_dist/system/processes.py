"""Ranks and what they tell each other. `World` is the only reader of the launcher's rank variables.

environment of accelerate launch ──► World.from_environment ──► rank, size ──► all_sum, gather, barrier
"""

import ctypes
import logging
import os
import resource
import signal
import sys
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kfood_dist.errors import CheckpointError, KfoodError, LaunchError

# Where our launcher puts its process id, for the ranks it starts.
LAUNCHER_PID = "KFOOD_LAUNCHER_PID"

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class World:
    """Who this process is among all processes of the run. A process started alone is rank 0 of 1."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] | None = None) -> "World":
        """Read RANK, WORLD_SIZE and LOCAL_RANK as torchrun and accelerate set them (all or none)."""
        env = os.environ if environment is None else environment
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
        try:
            rank, size, local_rank = (
                int(env.get(name, default)) for name, default in zip(names, (0, 1, 0), strict=True)
            )
        except ValueError:
            raise LaunchError(
                f"RANK, WORLD_SIZE or LOCAL_RANK is not a number: {[env.get(n) for n in names]}",
                "unset them, or start through launch/train.sh",
            ) from None
        if not 0 <= rank < size:
            raise LaunchError(f"RANK {rank} lies outside WORLD_SIZE {size}", "start through launch/train.sh")
        return cls(rank, size, local_rank)

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def all_sum(self, values: "torch.Tensor") -> "torch.Tensor":
        """The element-wise sum of `values` over all ranks, in place; a no-op for one rank."""
        if self.size > 1:
            import torch.distributed as dist

            dist.all_reduce(values)
        return values

    def all_max(self, values: "torch.Tensor") -> "torch.Tensor":
        """The element-wise maximum of `values` over all ranks, in place; a no-op for one rank."""
        if self.size > 1:
            import torch.distributed as dist

            dist.all_reduce(values, op=dist.ReduceOp.MAX)
        return values

    def gather(self, item: Any) -> list[Any] | None:
        """Every rank's picklable `item`, by rank, on rank 0; None elsewhere."""
        if self.size == 1:
            return [item]
        import torch.distributed as dist

        items: list[Any] | None = [None] * self.size if self.is_main else None
        dist.gather_object(item, items)
        return items

    def share(self, item: Any) -> list[Any]:
        """Every rank's picklable `item`, by rank, on every rank."""
        if self.size == 1:
            return [item]
        import torch.distributed as dist

        items: list[Any] = [None] * self.size
        dist.all_gather_object(items, item)
        return items

    def barrier(self) -> None:
        """Return once every rank is here."""
        if self.size > 1:
            import torch
            import torch.distributed as dist

            # NCCL would have to guess this rank's device, and a wrong guess hangs.
            on_gpu = dist.get_backend() == dist.Backend.NCCL
            dist.barrier(device_ids=[torch.cuda.current_device()] if on_gpu else None)


def limit_waits(timeout: timedelta) -> None:
    """Let every process group there is wait so long in a collective, and no longer.

    A library's own groups have c10d's default otherwise: ten minutes on NCCL, whatever the first group was given.
    """
    from torch.distributed import distributed_c10d as c10d

    for group in c10d._world.pg_map:
        c10d._set_pg_timeout(timeout, group)


def run_rank(world: World, verb: str, work: Callable[[], int]) -> int:
    """Do this rank's part of `work`, in which ranks wait for each other; its exit status.

    A mistake that this rank met is told here and now, since no other can tell and the launcher then ends them all.
    An error of a library goes on up, and Python prints it at once: nothing on the way may wait for another rank.
    """
    try:
        return work()
    except KfoodError as error:
        if not world.is_main:  # whose mistakes are told by `cli.main`
            print(f"kfood {verb}: rank {world.rank}: {str(error).splitlines()[0]}", file=sys.stderr, flush=True)
        raise
    except RuntimeError as error:
        if not lost_a_peer(error):
            raise
        print(f"rank {world.rank}: another rank is gone", file=sys.stderr, flush=True)
        time.sleep(2)  # so that the launcher meets that one first, which says why
        return 1


def lost_a_peer(error: RuntimeError) -> bool:
    """Whether a collective failed because another rank ended, as gloo and NCCL put it."""
    words = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "remote process exited")
    return any(word in str(error) for word in words)


def write_whole(path: Path, text: str) -> None:
    """Put `text` in the place of a file of the run directory, so that a kill leaves the old one or the new one.

    Bytes of a path that are no UTF-8 become the escapes by which JSON gives them back.
    Raises CheckpointError where it cannot be written.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        with open(partial, "w", encoding="utf-8", errors="backslashreplace") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        raise CheckpointError(
            f"{path} cannot be written ({error.strerror})", "make room there, or make it writable"
        ) from None


def require_folder_possible(folder: Path | None, option: str) -> None:
    """Raise KfoodError, without making it, if an output folder could not be made or written to."""
    if folder is None:
        return
    try:
        nearest = next(
            path for path in (folder.absolute(), *folder.absolute().parents) if path.exists() or path.is_symlink()
        )
    except (OSError, ValueError) as error:  # a name too long, a folder that may not be looked into, a NUL
        why = getattr(error, "strerror", None) or error
        raise KfoodError(f"{option} {folder!s} cannot be used ({why})", "name another folder") from None
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        fault = "is not a folder" if not nearest.is_dir() else "may not be written to"
        raise KfoodError(f"{option} {folder}: {nearest} {fault}", "name another folder")


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
