"""This rank's share of an evaluation: its batches and their answers.

    positions ──► batches by position ──► each assigned to one rank ──► greedy answers ──► Part, to be gathered

Always holds: which pictures share a batch does not depend on the number of ranks. Each picture is either among the
records or among those refused as too long.
"""

import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

from kfood_dist.data.batch.collate import Batch, StreamingCollator
from kfood_dist.data.batch.loader import stream
from kfood_dist.data.batch.template import Template
from kfood_dist.data.plan.plan import EMPTY, MicroBatch, assign_slots
from kfood_dist.data.task.base import Columns, Task
from kfood_dist.evaluate.evaluation import Evaluation
from kfood_dist.evaluate.generate import Answerer, load_answerer
from kfood_dist.evaluate.metrics import Prediction
from kfood_dist.system.world import World

# Ranks meet only at the end. The first one may have to wait for one that loads its weights from a slow disk.
_TIMEOUT = timedelta(hours=1)


@contextmanager
def process_group(world: World, device: torch.device) -> Iterator[None]:
    """Connect the ranks, if there are several: over NCCL if they use GPUs, otherwise over gloo.

    They disconnect only if there was no error: in NCCL, a rank that disconnects waits for the other ranks, and these
    wait for the rank that failed.
    """
    if world.size == 1:
        yield
        return
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=_TIMEOUT)
    yield
    dist.destroy_process_group()


def any_rank(world: World, flag: bool, device: torch.device) -> bool:
    """Return whether the flag is set on any rank. Every rank must call this."""
    return bool(world.all_sum(torch.tensor([int(flag)], device=device)).item())


@dataclass(frozen=True)
class Part:
    """The result of one rank: records by position in the index, refused positions, and the time that it took."""

    records: dict[int, Prediction]
    refused: list[int]
    seconds: float


def my_batches(num_samples: int, batch_size: int, world: World) -> list[tuple[int, ...]]:
    """Return the batches of this rank: batch b of the split goes to rank b modulo the world size.

    Every rank gets the same number of batches. If there are too few batches, a rank's last one is empty.
    """
    slots = assign_slots(np.arange(num_samples), world.size, batch_size)[:, world.rank]
    return [tuple(int(i) for i in ids if i != EMPTY) for ids in slots]


def answer_part(evaluation: Evaluation, template: Template, world: World, device: torch.device) -> Part:
    """Answer this rank's batches."""
    collator = StreamingCollator(evaluation.shards, template, evaluation.task, for_generation=True)
    answerer = load_answerer(
        evaluation.settings, template, evaluation.model, evaluation.adapter, device, evaluation.max_new_tokens
    )
    started = time.perf_counter()
    records: dict[int, Prediction] = {}
    refused: list[int] = []
    batches = my_batches(evaluation.num_samples, evaluation.batch_size, world)
    micro_batches = (MicroBatch(0, number, ids, filler=0) for number, ids in enumerate(batches))
    # Loader processes read ahead while the model answers.
    reader = stream(collator, micro_batches, evaluation.num_workers, pin_memory=device.type == "cuda")
    shown = tqdm(batches, "answering", unit=" batches", disable=None if world.is_main else True)
    with closing(reader) as loaded:
        for ids, batch in zip(shown, loaded, strict=True):
            answered = answer_batch(collator, answerer, batch)
            records |= answered
            refused += [i for i in ids if i not in answered]
    return Part(records, refused, time.perf_counter() - started)


def answer_batch(collator: StreamingCollator, answerer: Answerer, batch: Batch) -> dict[int, Prediction]:
    """Return the records of a batch of `collator` by position in the index. A picture refused as too long has none."""
    answers = answerer.answer(batch) if batch.ids else []  # otherwise it holds only the filler
    return {
        i: make_record(collator.shards.key(i), columns, collator.task, answer.text, answer.confidence)
        for i, columns, answer in zip(batch.ids, batch.columns, answers, strict=True)
    }


def make_record(key: str, columns: Columns, task: Task, text: str, confidence: float) -> Prediction:
    """Return the record of a sample answered with `text`. A refused sample has an empty text, and so is wrong."""
    return Prediction(
        key=key,
        source=columns["sources"][0],
        label=task.label(columns),
        prediction=task.clean(text),
        raw=text,
        correct=task.score(text, columns) == 1,
        confidence=confidence,
    )
