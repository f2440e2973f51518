"""Ranks and what they tell each other. `World` is the only reader of the launcher's rank variables.

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
