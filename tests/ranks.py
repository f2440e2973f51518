"""Ranks for a test, without a launcher: processes of a server that has imported torch and the like once."""

import functools
import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

_IMPORTED = ["torch", "transformers", "peft", "accelerate", "deepspeed", "bitsandbytes", "kfood_dist.train.build"]


class Ended(NamedTuple):
    """How a rank ended, and what it printed."""

    status: int | None
    output: str


@functools.cache
def _server() -> Any:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_IMPORTED)
    return context


def run_ranks(
    folder: Path, function: Callable[..., Any], *words: Any, size: int = 2, zero: bool = False
) -> list[Ended]:
    """Call `function(*words)`, of a test's module, in `size` ranks; its exit status is what it returns, or 1.

    `folder` takes what they print. Every rank must end within two minutes.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    outputs = [folder / f"rank-{rank}.txt" for rank in range(size)]
    ranks = [
        _server().Process(target=_rank, args=(output, rank, size, port, zero, function, words))
        for rank, output in enumerate(outputs)
    ]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(120)
    hanging = [rank.kill() for rank in ranks if rank.exitcode is None]
    assert not hanging, [output.read_text() for output in outputs]
    return [Ended(rank.exitcode, output.read_text()) for rank, output in zip(ranks, outputs, strict=True)]


def _rank(
    output: Path, rank: int, size: int, port: int, zero: bool, function: Callable[..., Any], words: tuple[Any, ...]
) -> None:
    import torch

    torch.set_num_threads(1)
    for descriptor in (1, 2):
        os.dup2(os.open(output, os.O_CREAT | os.O_WRONLY | os.O_APPEND), descriptor)
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu",
        "ACCELERATE_USE_DEEPSPEED": str(zero).lower(),
    }  # fmt: skip
    try:
        status = function(*words)
    except BaseException:
        traceback.print_exc()
        status = 1
    os._exit(status or 0)
