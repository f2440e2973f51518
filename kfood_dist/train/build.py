"""Builds a run's parts from its recipe: data, model, engine, log; and puts them where the newest checkpoint was."""

import math
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from kfood_dist.config.sections import Recipe
from kfood_dist.data.batch.collate import StreamingCollator
from kfood_dist.data.mix import open_mixture
from kfood_dist.data.picture.protocol import Pictures
from kfood_dist.data.plan.plan import Plan
from kfood_dist.data.shards.reader import open_split
from kfood_dist.data.task.table import build_task
from kfood_dist.errors import CheckpointError, first_line
from kfood_dist.model.adapters import load_adapter, read_adapter_facts
from kfood_dist.model.family import family_of
from kfood_dist.model.files import base_folder
from kfood_dist.model.identity import fingerprint, read_config
from kfood_dist.model.load import load_base
from kfood_dist.model.objective.base import Objective
from kfood_dist.model.objective.table import build_objective
from kfood_dist.model.parts import apply_parts, parameter_groups, recompute_activations
from kfood_dist.model.processor import build_template
from kfood_dist.system import gpus
from kfood_dist.system.words import plural
from kfood_dist.system.world import World, limit_waits
from kfood_dist.train.engine.base import Engine
from kfood_dist.train.engine.build import build_accelerator, build_engine, collective_timeout
from kfood_dist.train.engine.optim import build_optimizer
from kfood_dist.train.loop import Trainer
from kfood_dist.train.preflight import num_steps
from kfood_dist.train.resume import require_same_base
from kfood_dist.train.run import checkpoint
from kfood_dist.train.run.checkpoint import Checkpoint
from kfood_dist.train.run.facts import machine_facts, model_facts
from kfood_dist.train.run.monitor import RunLog
from kfood_dist.train.run.skips import SkipWatch
from kfood_dist.train.run.stop import StopRequest
from kfood_dist.train.run.watchdog import Watch
from kfood_dist.train.saving import Saver
from kfood_dist.train.validate import Validator


def build_trainer(
    recipe: Recipe, plan: Plan, world: World, newest: Checkpoint | None, stop: StopRequest
) -> tuple[Trainer, int]:
    """Build everything and resume from `newest`; returns the trainer and the step to begin with."""
    gpus.require_usable()
    accelerator = build_accelerator(recipe, plan, world)
    _require_agreement(world, plan, newest)
    template = build_template(recipe.model.base, recipe.data)
    samples = open_mixture(recipe.data, "train")
    task = build_task(recipe.data.task, recipe.data.system, recipe.data.prompt, samples.classes)
    collator = StreamingCollator(samples, template, task, unreadable="replace")
    module = build_module(recipe, template.pictures, accelerator.device)
    if recipe.model.adapter and not newest:
        load_adapter(module.model, recipe.model.adapter)
    groups = _parameter_groups(recipe, module)
    engine = _build_engine(recipe, accelerator, module, groups)

    how = _how_it_runs(recipe, accelerator, world)
    start = _resume(recipe, plan, engine, newest) if newest else 0
    best = world.share(checkpoint.best(recipe.run.dir / "checkpoints"))[0]
    max_steps = num_steps(recipe, plan)
    log = RunLog(recipe.run.dir, world, start, max_steps, recipe.run.log_every_steps)
    watch = Watch(world, recipe.train.stall_timeout_s, recipe.run.dir)
    checkpoints = recipe.run.dir / "checkpoints"
    validator = None
    if recipe.eval.every_steps is not None:
        validation = open_split(recipe.data.shards, recipe.eval.split)
        validator = Validator(
            recipe=recipe,
            world=world,
            device=accelerator.device,
            collator=StreamingCollator(validation, template, task, unreadable="refuse"),
            module=module,
            engine=engine,
            log=log,
            watch=watch,
            stop=stop,
        )
    saver = Saver(
        folder=checkpoints,
        every_steps=recipe.train.save_every_steps,
        keep=recipe.train.keep_checkpoints,
        world=world,
        plan=plan,
        module=module,
        engine=engine,
        log=log,
        watch=watch,
        adapter_facts=adapter_facts(recipe, samples.manifest.resize),
        run_facts=how,
        bad=dict(newest.record().bad) if newest else {},
        best_score=best[1].score if best else -math.inf,
    )
    trainer = Trainer(
        recipe=recipe,
        world=world,
        device=accelerator.device,
        plan=plan,
        collator=collator,
        validator=validator,
        saver=saver,
        module=module,
        engine=engine,
        log=log,
        watch=watch,
        max_steps=max_steps,
        peaks={group["name"]: group["lr"] for group in groups},
        run_facts={**how, **_what_it_trains(recipe, plan, module)},
        stop=stop,
        unmeasured=newest if newest and newest.record().validation is None else None,
        skips=SkipWatch(
            limit=recipe.train.max_skipped_steps,
            start=start,
            key=collator.shards.key,
            checkpoints=checkpoints,
            world=world,
            log=log,
        ),
    )
    _announce(trainer, start)
    return trainer, start


def _require_agreement(world: World, plan: Plan, newest: Checkpoint | None) -> None:
    """Raise CheckpointError unless all ranks see the same checkpoint and cut the batch alike. A collective."""
    resumed = f"step {newest.step}" if newest else "none"
    seen = world.share((resumed, plan.micro_batch, plan.accumulation, plan.order.fingerprint))
    for rank, (other, *cut) in enumerate(seen):
        if [other, *cut] != list(seen[0]):
            raise CheckpointError(
                f"rank {rank} sees another run than rank 0: newest checkpoint {other} there, {seen[0][0]} here",
                "let run.dir and the shards lie on a file system that all nodes share, and start again",
            )


def _how_it_runs(recipe: Recipe, accelerator: Accelerator, world: World) -> dict[str, Any]:
    """What a checkpoint says of the run that wrote it, besides its recipe."""
    folder = _loaded_folder(recipe)
    return {
        "base_fingerprint": fingerprint(folder),
        "base_config": read_config(folder),
        "world_size": world.size,
        "distributed_type": accelerator.distributed_type.value,
        "zero_stage": recipe.train.zero_stage,
    }


def _loaded_folder(recipe: Recipe) -> Path:
    folder = base_folder(recipe.model.base)
    assert folder is not None  # it was loaded just now
    return folder


def _what_it_trains(recipe: Recipe, plan: Plan, module: Objective) -> dict[str, Any]:
    """For run.json: read from the running objects where they tell."""
    return {
        "global_batch": plan.global_batch,
        "gradient_accumulation_steps": plan.accumulation,
        "quantization": recipe.model.quantization,
        "precision": recipe.model.precision,
        "objective": recipe.objective.name,
        "parts": recipe.parts.ways(),
        **model_facts(module.model),
        **machine_facts(),
    }


def _resume(recipe: Recipe, plan: Plan, engine: Engine, newest: Checkpoint) -> int:
    """Put plan and engine where the checkpoint was; returns the step to go on with."""
    start = plan.resume(newest.record().data)
    require_same_base(newest, _loaded_folder(recipe), recipe.model.base)
    load_engine(engine, newest)
    return start


def build_module(recipe: Recipe, pictures: Pictures, device: torch.device) -> Objective:
    """The quantised base with what is trained, the same on every rank, ready to be wrapped."""
    model = recipe.model
    base = load_base(model.base, model.quantization, model.precision, model.attention, device)
    if recipe.train.gradient_checkpointing:
        # On the language model alone: a frozen tower keeps nothing anyway.
        recompute_activations(base.get_submodule(family_of(base.config).language_model))
    torch.manual_seed(recipe.train.seed)
    return build_objective(recipe.objective.name, apply_parts(base, recipe.parts, recipe.lora).train(), pictures)


def _parameter_groups(recipe: Recipe, module: Objective) -> list[dict[str, Any]]:
    family = family_of(module.model.get_base_model().config)
    return parameter_groups(module, family, recipe.parts, recipe.optim.learning_rate)


def _build_engine(recipe: Recipe, accelerator: Accelerator, module: Objective, groups: list[dict[str, Any]]) -> Engine:
    optimizer = build_optimizer(groups, recipe.optim)
    engine = build_engine(accelerator, module, optimizer, recipe.optim.max_grad_norm, recipe.model.precision)
    limit_waits(collective_timeout(recipe))  # of groups that the engine made
    return engine


def load_engine(engine: Engine, newest: Checkpoint) -> None:
    """Put weights and optimiser where the checkpoint was. Raises CheckpointError if its files cannot be read."""
    try:
        engine.load(newest.engine)
    except CheckpointError:
        raise
    except Exception as error:  # torch and DeepSpeed say a damaged file in a dozen ways
        raise CheckpointError(
            f"checkpoint {newest.folder} cannot be loaded ({type(error).__name__}: {first_line(error)})",
            "delete that folder; the one before it is used then, or the run starts anew",
        ) from error


def adapter_facts(recipe: Recipe, resize: str) -> dict[str, Any]:
    """What evaluation and prediction must repeat exactly, kept with the adapter."""
    return {
        "base": recipe.model.base,
        "task": recipe.data.task,
        "system": recipe.data.system,
        "prompt": recipe.data.prompt,
        "image_size": recipe.data.image_size,
        "resize": resize,
        "max_length": recipe.data.max_length,
        "quantization": recipe.model.quantization,
        "precision": recipe.model.precision,
        "attention": recipe.model.attention,
        "parts": recipe.parts.ways(),
    }


def _announce(trainer: Trainer, start: int) -> None:
    facts, plan = trainer.run_facts, trainer.plan
    trainer.log.say(
        f"{plural(plan.order.num_samples, 'sample')}, {plural(trainer.max_steps, 'step')} of {plan.global_batch} "
        f"({plural(plan.ranks, 'rank')} × {plan.micro_batch} × accumulation {plan.accumulation}), "
        f"{facts['distributed_type']} ZeRO {facts['zero_stage']}, {facts['quantization']}, "
        f"{facts['trainable_parameters']:,} of {facts['total_parameters']:,} parameters trained, on {facts['device']}"
    )
    if start:
        trainer.log.say(f"resumed after step {start}")
    elif adapter := trainer.recipe.model.adapter:
        known = {key: value for key, value in read_adapter_facts(adapter).items() if key in ("task", "step")}
        told = "".join(f", {key} {value}" for key, value in known.items())
        trainer.log.say(f"starts from the adapter {adapter}{told}")
