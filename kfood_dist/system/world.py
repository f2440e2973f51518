"""Ranks and the values that they exchange. Only `World` reads the launcher's rank variables.

environment of accelerate launch ──► World.from_environment ──► rank, size ──► all_sum, gather, barrier
"""

import os
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from kfood_dist.errors import KfoodError, LaunchError

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class World:
    """The rank of this process among all processes of the run. A single process is rank 0 of 1.

    `local_rank` and `local_size` are those among the processes on this machine.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] | None = None) -> "World":
        """Read the variables that torchrun and accelerate set. Without LOCAL_WORLD_SIZE there is one machine."""
        env = os.environ if environment is None else environment
        defaults = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": env.get("WORLD_SIZE", 1)}
        try:
            rank, size, local_rank, local_size = (int(env.get(name, default)) for name, default in defaults.items())
        except ValueError:
            raise LaunchError(
                f"RANK, WORLD_SIZE or LOCAL_RANK is not a number: {[env.get(name) for name in defaults]}",
                "unset them, or start through launch/train.sh",
            ) from None
        if not 0 <= rank < size:
            raise LaunchError(f"RANK {rank} is outside WORLD_SIZE {size}", "start through launch/train.sh")
        return cls(rank, size, local_rank, local_size)

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def all_sum(self, values: "torch.Tensor") -> "torch.Tensor":
        """Replace `values` in place by the element-wise sum over all ranks, and return it. A no-op for one rank."""
        if self.size > 1:
            import torch.distributed as dist

            dist.all_reduce(values)
        return values

    def all_max(self, values: "torch.Tensor") -> "torch.Tensor":
        """Replace `values` in place by the element-wise maximum over all ranks, and return it. A no-op for one rank."""
        if self.size > 1:
            import torch.distributed as dist

            dist.all_reduce(values, op=dist.ReduceOp.MAX)
        return values

    def gather(self, item: Any) -> list[Any] | None:
        """Return every rank's picklable `item`, by rank, on rank 0. Returns None on the other ranks."""
        if self.size == 1:
            return [item]
        import torch.distributed as dist

        items: list[Any] | None = [None] * self.size if self.is_main else None
        dist.gather_object(item, items)
        return items

    def all_gather(self, item: Any) -> list[Any]:
        """Return every rank's picklable `item`, by rank, on every rank."""
        if self.size == 1:
            return [item]
        import torch.distributed as dist

        items: list[Any] = [None] * self.size
        dist.all_gather_object(items, item)
        return items

    def barrier(self) -> None:
        """Wait until every rank has called this."""
        if self.size > 1:
            import torch
            import torch.distributed as dist

            # Without device_ids, NCCL guesses this rank's device, and a wrong guess hangs.
            on_gpu = dist.get_backend() == dist.Backend.NCCL
            dist.barrier(device_ids=[torch.cuda.current_device()] if on_gpu else None)


def set_collective_timeouts(timeout: timedelta) -> None:
    """Set the longest time that every existing process group waits in a collective.

    Otherwise, the groups that a library makes keep c10d's default: ten minutes on NCCL, even if the first group has
    another timeout.
    """
    from torch.distributed import distributed_c10d as c10d

    for group in c10d._world.pg_map:
        c10d._set_pg_timeout(timeout, group)


def run_rank(world: World, verb: str, work: Callable[[], int]) -> int:
    """Do this rank's part of `work`, in which ranks wait for each other, and return its exit status.

    Prints a KfoodError of this rank at once, because no other rank knows it and the launcher then ends all ranks. A
    library's error passes through, and Python prints it at once: nothing on its way up may wait for another rank.
    """
    try:
        return work()
    except KfoodError as error:
        if not world.is_main:  # `cli.main` prints the errors of rank 0
            print(f"kfood {verb}: rank {world.rank}: {str(error).splitlines()[0]}", file=sys.stderr, flush=True)
        raise
    except RuntimeError as error:
        if not lost_a_peer(error):
            raise
        print(f"rank {world.rank}: another rank is gone", file=sys.stderr, flush=True)
        time.sleep(2)  # so that the launcher sees the other rank's failure first, which says why
        return 1


def lost_a_peer(error: RuntimeError) -> bool:
    """Return whether a collective failed because another rank ended, from the messages of gloo and NCCL."""
    words = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "remote process exited")
    return any(word in str(error) for word in words)
