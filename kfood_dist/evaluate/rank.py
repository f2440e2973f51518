"""This rank's share of an evaluation: its batches, answered.

    positions ──► batches by position ──► dealt to ranks whole ──► greedy answers ──► Part, to be gathered

Always holds: which pictures share a batch does not depend on the number of ranks; a picture is among the records or
among those refused as too long.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

from kfood_dist.data.batch.collate import StreamingCollator
from kfood_dist.data.batch.template import Template
from kfood_dist.data.plan.plan import EMPTY, MicroBatch, deal
from kfood_dist.data.task.base import Columns, Task
from kfood_dist.evaluate.evaluation import Evaluation
from kfood_dist.evaluate.generate import Answerer, load_answerer
from kfood_dist.evaluate.metrics import Prediction
from kfood_dist.system.world import World

# Ranks meet only at the end; the first may have to wait for one that loads its weights from a slow disk.
_TIMEOUT = timedelta(hours=1)


@contextmanager
def process_group(world: World, device: torch.device) -> Iterator[None]:
    """The ranks connected, if there are several: over NCCL where each has its GPU, else over gloo.

    They part only if all went well: NCCL's parting waits for the other ranks, which wait for the one that failed.
    """
    if world.size == 1:
        yield
        return
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=_TIMEOUT)
    yield
    dist.destroy_process_group()


def any_rank(world: World, flag: bool, device: torch.device) -> bool:
    """Whether the flag is set on any rank; every rank asks."""
    return bool(world.all_sum(torch.tensor([int(flag)], device=device)).item())


@dataclass(frozen=True)
class Part:
    """What one rank found out: records by position in the index, refused positions, and the time it took."""

    records: dict[int, Prediction]
    refused: list[int]
    seconds: float


def my_batches(num_samples: int, batch_size: int, world: World) -> list[tuple[int, ...]]:
    """The batches of this rank: batch b of the split goes to rank b modulo the world size, whole.

    Every rank gets as many; where a rank has nothing left, its last one is empty.
    """
    slots = deal(np.arange(num_samples), world.size, batch_size)[:, world.rank]
    return [tuple(int(i) for i in ids if i != EMPTY) for ids in slots]


def answer_part(asked: Evaluation, template: Template, world: World, device: torch.device) -> Part:
    """Answer this rank's batches."""
    collator = StreamingCollator(asked.shards, template, asked.task, for_generation=True)
    answerer = load_answerer(asked.settings, template, asked.model, asked.adapter, device, asked.max_new_tokens)
    started = time.perf_counter()
    records: dict[int, Prediction] = {}
    refused: list[int] = []
    batches = my_batches(asked.num_samples, asked.batch_size, world)
    for ids in tqdm(batches, "answering", unit=" batches", disable=None if world.is_main else True):
        answered = answer_batch(collator, answerer, ids)
        records |= answered
        refused += [i for i in ids if i not in answered]
    return Part(records, refused, time.perf_counter() - started)


def answer_batch(collator: StreamingCollator, answerer: Answerer, ids: tuple[int, ...]) -> dict[int, Prediction]:
    """The records of one batch by position in the index; a picture refused as too long has none."""
    batch = collator[MicroBatch(step=0, micro_step=0, ids=ids, filler=0)]
    answers = answerer.answer(batch) if batch.ids else []  # otherwise it holds the filler alone
    return {
        i: make_record(collator.shards.key(i), columns, collator.task, answer.text, answer.confidence)
        for i, columns, answer in zip(batch.ids, batch.columns, answers, strict=True)
    }


def make_record(key: str, columns: Columns, task: Task, text: str, confidence: float) -> Prediction:
    """What becomes of a sample answered with `text`; no text, and so wrong, where it was refused."""
    return Prediction(
        key=key,
        source=columns["sources"][0],
        label=task.label(columns),
        prediction=task.clean(text),
        raw=text,
        correct=task.score(text, columns) == 1,
        confidence=confidence,
    )
