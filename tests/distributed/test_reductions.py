"""Ranks exchange the gradients of an adapter once per optimiser step, however many micro-batches it has."""

import json
from pathlib import Path
from typing import Any

import pytest
from forked import run_verb
from running import training, write_recipe
from sweep import swept

STEPS, MOST = 3, 1000  # a message of more numbers is not a metric


def count_messages(words: list[str]) -> int:
    """Train as this rank, and print for each kind of collective how many large messages it sent."""
    import torch.distributed as dist

    sent: dict[str, int] = {}

    def counted(name: str) -> Any:
        send = getattr(dist, name)

        def run(*args: Any, **options: Any) -> Any:
            tensors = [arg for arg in (*args, *options.values()) if hasattr(arg, "numel")]
            sent[name] = sent.get(name, 0) + (max((t.numel() for t in tensors), default=0) > MOST)
            return send(*args, **options)

        return run

    for name in ("all_reduce", "reduce", "reduce_scatter_tensor", "reduce_scatter"):
        setattr(dist, name, counted(name))
    status = run_verb(words)
    print("SENT", json.dumps(sent), flush=True)
    return status


def messages(folder: Path, model: Path, shards: Path, stage: int, accumulation: int) -> int:
    """Return the large messages with gradients of a run of two ranks."""
    folder.mkdir()
    section = {"zero_stage": stage, "gradient_accumulation_steps": accumulation, "max_steps": STEPS}
    recipe = write_recipe(folder / "recipe.yaml", model, shards, train=section)
    with training(recipe, 2, work=count_messages) as ranks:
        ended = ranks.wait(300)
    assert ended.status == 0, ended.output
    [sent] = [json.loads(line.partition("SENT ")[2]) for line in ended.outputs[0].splitlines() if "SENT " in line]
    return sum(sent.values())


@pytest.mark.parametrize("stage", [0, 2, *swept([1])])
def test_four_micro_batches_cost_as_many_messages_as_one(
    tmp_path: Path, tiny_model: Path, tiny_shards: Path, stage: int
) -> None:
    one, four = (messages(tmp_path / str(n), tiny_model, tiny_shards, stage, n) for n in (1, 4))
    assert one == four > 0
    if stage == 0:
        assert one == STEPS
