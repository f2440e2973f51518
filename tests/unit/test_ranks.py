"""Two ranks over gloo: how long they wait for each other, and how both end if one of them fails."""

import json
import os
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from forked import run_ranks
from running import environment, write_recipe
from safetensors.torch import load_file, save_file
from torch.distributed import distributed_c10d

from kfood_dist.system.world import World

STALL_S = 50
EXPECTED_S = 2 * STALL_S + 60


def timeouts() -> list[float]:
    """Return the timeout of every process group, in seconds."""
    groups = [group._get_backend(torch.device("cpu")) for group in distributed_c10d._world.pg_map]
    return [backend.options._timeout.total_seconds() for backend in groups]


def build_and_train(recipe_path: Path, damaged: str) -> None:
    """Build a trainer, load a damaged base beside it, take a step, and print what happened as one line of JSON."""
    from kfood_dist.config.recipe import load_recipe
    from kfood_dist.errors import ModelError
    from kfood_dist.model.load import load_base
    from kfood_dist.train.build import build_trainer
    from kfood_dist.train.preflight import preflight
    from kfood_dist.train.run.stop import StopRequest

    world, recipe = World.from_environment(), load_recipe(recipe_path)
    plan = preflight(recipe, world.size)
    recipe.run.dir.mkdir(exist_ok=True)
    trainer, start = build_trainer(recipe, plan, world, None, StopRequest(recipe.run.dir, world.is_main))
    built = timeouts()
    try:
        refused = str(load_base(damaged, "none", "bf16", "sdpa", torch.device("cpu")))
    except ModelError as error:
        refused = str(error)
    trainer.train(start)
    facts = {"stage": trainer.engine.stage, "built": built, "watched": timeouts(), "refused": refused}
    trainer.shut_down()
    print(json.dumps(facts), flush=True)


@pytest.fixture(scope="module")
def damaged(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """A base with one missing tensor, one extra tensor, and one tensor of another shape."""
    folder = tmp_path_factory.mktemp("damaged")
    for path in tiny_model.iterdir():
        os.link(path, folder / path.name)
    tensors = load_file(tiny_model / "model.safetensors")
    tensors["v_head.weight"] = tensors.pop("visual.blocks.1.attn.qkv.weight").clone()
    tensors["model.norm.weight"] = tensors["model.norm.weight"][:-1].clone()
    (folder / "model.safetensors").unlink()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.mark.parametrize("stage", [2, 3])
def test_every_process_group_waits_longer_than_the_watch(
    tmp_path: Path, tiny_model: Path, tiny_shards: Path, damaged: Path, stage: int
) -> None:
    """DeepSpeed makes its own group. With ZeRO stage 3, transformers would load the damaged base without a warning."""
    train = {"max_steps": 1, "zero_stage": stage, "stall_timeout_s": STALL_S}
    recipe = write_recipe(tmp_path / "recipe.yaml", tiny_model, tiny_shards, train=train)
    where = {"ranks": 2, "environment": environment(), "folder": tmp_path}
    ended = run_ranks(build_and_train, recipe, str(damaged), **where, deepspeed=True)
    assert ended.status == 0, ended.output
    for output in ended.outputs:
        (facts,) = (json.loads(line) for line in output.splitlines() if line.startswith("{"))
        assert facts["stage"] == stage
        assert len(facts["built"]) > 1 and set(facts["built"]) == {EXPECTED_S}
        assert min(facts["watched"]) > timedelta(days=300).total_seconds()
        assert "it lacks model.visual.blocks.1.attn.qkv.weight; " in facts["refused"]
        assert "norm.weight is (255,), not (256,); the config does not have v_head.weight" in facts["refused"]


def meet_late(run_dir: Path) -> None:
    """Start the watch in a group with a short timeout. Then one rank arrives much later, as if suspended."""
    from kfood_dist.train.run.watchdog import Watch

    world = World.from_environment()
    dist.init_process_group("gloo", timeout=timedelta(seconds=1))
    watch = Watch(world, 60, run_dir)
    watch.start()
    time.sleep(3 * world.rank)
    world.barrier()
    dist.destroy_process_group()
    watch.stop()


def test_watched_ranks_wait_longer_than_the_timeout_of_their_group(tmp_path: Path) -> None:
    ended = run_ranks(meet_late, tmp_path, ranks=2, environment=environment(), folder=tmp_path)
    assert ended.status == 0, ended.output


def evaluate(words: list[str]) -> int:
    """Run `kfood eval`, in which rank 1 runs out of memory.

    On NCCL, leaving the process group would wait for ever. Here the process exits with status 9 if it tries to.
    """
    from kfood_dist.cli import main
    from kfood_dist.evaluate.generate import Answerer

    def out_of_memory(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    if World.from_environment().rank == 1:
        Answerer.answer = out_of_memory  # type: ignore[assignment, method-assign]
    dist.destroy_process_group = lambda: os._exit(9)
    return main(["eval", *words])


def test_a_library_error_on_one_rank_is_reported_and_ends_all_ranks(
    tmp_path: Path, tiny_model: Path, tiny_shards: Path
) -> None:
    words = ["--shards", tiny_shards, "--model", tiny_model, "--out", tmp_path / "out"]
    where = {"ranks": 2, "environment": environment(), "folder": tmp_path}
    ended = run_ranks(evaluate, [*map(str, words), "--batch-size", "3"], **where, grace_s=120)
    assert ended.statuses == (1, 1), ended.output
    assert "rank 0: another rank is gone" in ended.outputs[0]
    assert "OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB" in ended.outputs[1]
    assert not (tmp_path / "out").exists()
