"""A micro-step reads no values of tensors that would be on a GPU, because the host would wait for each of them.

The test runs on a CPU. It counts the operations that make a GPU's host wait: those that return a number to Python, and
those whose result has a shape that depends on values.
"""

import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from asking import adapted, asking_dishes
from bases import write_llava, write_qwen2_vl
from torch.utils._python_dispatch import TorchDispatchMode

from kfood_dist.data.plan.plan import MicroBatch
from kfood_dist.model.family import family_of
from kfood_dist.model.objective.answer import AnswerLoss
from kfood_dist.model.parts import recompute_activations
from kfood_dist.model.tower import speed_up_tower
from kfood_dist.train.engine.plain import PlainEngine

_WAITING = {
    "_local_scalar_dense", "nonzero", "equal", "unique_consecutive", "_unique2", "masked_select", "is_nonzero",
    "repeat_interleave", "bincount",
}  # fmt: skip
_INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_"}


class Waits(TorchDispatchMode):
    """Counts the operations that make a GPU's host wait, by operation and line of code."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.split("::")[1]
        by_mask = name in _INDEXING and any(i is not None and i.dtype == torch.bool for i in args[1])
        if name in _WAITING or by_mask:
            stack = (f for f in reversed(traceback.extract_stack()) if "/torch/" not in f.filename)
            frame = next(f for f in stack if f.filename != __file__)
            self.found[f"{name} in {frame.filename}:{frame.lineno}"] += 1
        return func(*args, **(kwargs or {}))


def waits_of(base: Path, shards: Path, monkeypatch: pytest.MonkeyPatch, fast: bool = True, **options: Any) -> Waits:
    """Return the waits of forward and backward of a micro-batch, with activations recomputed."""
    model = adapted(base, dropout=0.05, **options).train()
    bare = model.get_base_model()
    if fast:
        speed_up_tower(bare, family_of(bare.config))
    recompute_activations(bare.get_submodule(family_of(bare.config).language_model))
    collator = asking_dishes(base, shards)
    module, waits = AnswerLoss(model, collator.template.pictures), Waits()
    optimizer = torch.optim.SGD([p for p in module.parameters() if p.requires_grad])
    engine = PlainEngine(Accelerator(cpu=True), module, optimizer, 1.0, lambda _: torch.bfloat16)
    batch = collator[MicroBatch(0, 0, (0, 1, 2, 3), 0)]
    as_list = torch.Tensor.tolist
    on_host = {id(value) for value in batch.shapes.values()}

    def counted(tensor: torch.Tensor) -> Any:
        waits.found["tolist"] += id(tensor) not in on_host
        return as_list(tensor)

    monkeypatch.setattr(torch.Tensor, "tolist", counted)
    with waits:
        engine.micro_step(batch, scale=1.0, last=False)
    monkeypatch.undo()
    return waits


def test_the_counter_finds_waits() -> None:
    waits, values = Waits(), torch.tensor([1, 0, 2])
    with waits:
        values[values > 0], values.sum().item(), values.nonzero(), bool(values[0])
    assert sum(waits.found.values()) == 4


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_a_micro_step_of_a_qwen_waits_at_most_five_times(
    tiny_model: Path, tiny_shards: Path, monkeypatch: pytest.MonkeyPatch, quantization: str
) -> None:
    """Two are transformers' checks of the number of image tokens. `tolist` reads lengths that stay on the host."""
    waits = waits_of(tiny_model, tiny_shards, monkeypatch, quantization=quantization, precision="bf16")
    assert sum(waits.found.values()) <= 5, waits.found
    plain = waits_of(tiny_model, tiny_shards, monkeypatch, fast=False, quantization="none", precision="bf16")
    assert sum(plain.found.values()) > 5, "the unchanged tower splits its tensors in each block"


@pytest.mark.parametrize("write", [write_qwen2_vl, write_llava])
def test_a_micro_step_of_other_families_waits_at_most_five_times(
    tmp_path: Path, tiny_shards: Path, monkeypatch: pytest.MonkeyPatch, write: Callable[[Path], None]
) -> None:
    write(tmp_path)
    waits = waits_of(tmp_path, tiny_shards, monkeypatch, quantization="none", precision="bf16")
    assert sum(waits.found.values()) <= 5, waits.found
