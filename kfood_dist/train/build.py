"""Build the parts of a run from its recipe: data, model, engine and log. Restore them from the newest checkpoint."""

import math
from functools import partial
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
from kfood_dist.estimate.utilisation import build_utilisation
from kfood_dist.model.adapters import load_adapter, read_adapter_facts
from kfood_dist.model.family import family_of
from kfood_dist.model.files import base_folder
from kfood_dist.model.identity import fingerprint, read_config
from kfood_dist.model.load import DTYPES, compute_type, load_base
from kfood_dist.model.objective.base import Objective
from kfood_dist.model.objective.table import build_objective
from kfood_dist.model.parts import apply_parts, parameter_groups, recompute_activations
from kfood_dist.model.processor import build_template
from kfood_dist.model.tower import speed_up_tower
from kfood_dist.system import gpus
from kfood_dist.system.words import plural
from kfood_dist.system.world import World, set_collective_timeouts
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
    """Build all parts, and resume from `newest` if there is one. Returns the trainer and the step to start with."""
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
    utilisation = build_utilisation(module.model, accelerator.device, DTYPES[recipe.model.precision], world)
    groups = _parameter_groups(recipe, module)
    engine = _build_engine(recipe, accelerator, module, groups)

    how = _how_it_runs(recipe, accelerator, world)
    start = _resume(recipe, plan, engine, newest) if newest else 0
    best = world.all_gather(checkpoint.best(recipe.run.dir / "checkpoints"))[0]
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
        run_facts={**how, **_what_it_trains(recipe, plan, module), **utilisation.facts()},
        utilisation=utilisation,
        stop=stop,
        unevaluated=newest if newest and newest.record().validation is None else None,
        skips=SkipWatch(
            limit=recipe.train.max_skipped_steps,
            start=start,
            max_steps=max_steps,
            key=collator.shards.key,
            checkpoints=checkpoints,
            world=world,
            log=log,
        ),
    )
    _announce(trainer, start)
    return trainer, start


def _require_agreement(world: World, plan: Plan, newest: Checkpoint | None) -> None:
    """Raise CheckpointError unless all ranks see the same checkpoint, batch cut and data order. A collective."""
    mine = {
        "newest checkpoint": f"step {newest.step}" if newest else "none",
        "micro-batch": plan.micro_batch,
        "accumulation": plan.accumulation,
        "data order": plan.order.fingerprint,
    }
    first, *others = world.all_gather(mine)
    for rank, other in enumerate(others, 1):
        differing = [f"{what} {other[what]} there, {first[what]} here" for what in mine if other[what] != first[what]]
        if differing:
            raise CheckpointError(
                f"rank {rank} sees another run than rank 0: {'; '.join(differing)}",
                "put run.dir and the shards on a file system that all nodes share, and start again",
            )


def _how_it_runs(recipe: Recipe, accelerator: Accelerator, world: World) -> dict[str, Any]:
    """Return what a checkpoint records about the run that wrote it, besides its recipe."""
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
    """Return facts for run.json. They are read from the running objects if possible."""
    return {
        "global_batch": plan.global_batch,
        "gradient_accumulation_steps": plan.accumulation,
        "quantization": recipe.model.quantization,
        "precision": recipe.model.precision,
        "objective": recipe.objective.name,
        "parts": recipe.parts.train_modes(),
        **model_facts(module.model),
        **machine_facts(),
    }


def _resume(recipe: Recipe, plan: Plan, engine: Engine, newest: Checkpoint) -> int:
    """Check plan and base model against the checkpoint, load the engine from it, and return the step to resume at."""
    start = plan.resume(newest.record().data)
    require_same_base(newest, _loaded_folder(recipe), recipe.model.base)
    load_engine(engine, newest)
    return start


def build_module(recipe: Recipe, pictures: Pictures, device: torch.device) -> Objective:
    """Return the quantised base model with its trained parts, the same on every rank, before an engine wraps it."""
    model = recipe.model
    base = load_base(model.base, model.quantization, model.precision, model.attention, device)
    if model.fast_tower:
        speed_up_tower(base, family_of(base.config))
    if recipe.train.gradient_checkpointing:
        # Only on the language model: a frozen vision tower keeps no activations anyway.
        recompute_activations(base.get_submodule(family_of(base.config).language_model))
    torch.manual_seed(recipe.train.seed)
    return build_objective(recipe.objective.name, apply_parts(base, recipe.parts, recipe.lora).train(), pictures)


def _parameter_groups(recipe: Recipe, module: Objective) -> list[dict[str, Any]]:
    family = family_of(module.model.get_base_model().config)
    return parameter_groups(module, family, recipe.parts, recipe.optim.learning_rate)


def _build_engine(recipe: Recipe, accelerator: Accelerator, module: Objective, groups: list[dict[str, Any]]) -> Engine:
    optimizer = build_optimizer(groups, recipe.optim)
    family = family_of(module.model.get_base_model().config)
    dtype_of = partial(compute_type, family=family, precision=recipe.model.precision)
    engine = build_engine(accelerator, module, optimizer, recipe.optim.max_grad_norm, dtype_of)
    set_collective_timeouts(collective_timeout(recipe))  # also for the groups that the engine made
    return engine


def load_engine(engine: Engine, newest: Checkpoint) -> None:
    """Load weights and optimiser state from the checkpoint. Raises CheckpointError if its files cannot be read."""
    try:
        engine.load(newest.engine)
    except CheckpointError:
        raise
    except Exception as error:  # torch and DeepSpeed report a damaged file in a dozen ways
        raise CheckpointError(
            f"checkpoint {newest.folder} cannot be loaded ({type(error).__name__}: {first_line(error)})",
            "delete that folder; the run then uses the checkpoint before it, or starts from the beginning",
        ) from error


def adapter_facts(recipe: Recipe, resize: str) -> dict[str, Any]:
    """Return the settings that evaluation and prediction must repeat exactly. They are saved with the adapter."""
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
        "parts": recipe.parts.train_modes(),
    }


def _announce(trainer: Trainer, start: int) -> None:
    facts, plan = trainer.run_facts, trainer.plan
    trainer.log.say(
        f"{plural(plan.order.num_samples, 'sample')}, {plural(trainer.max_steps, 'step')} of {plan.global_batch} "
        f"({plural(plan.ranks, 'rank')} × {plan.micro_batch} × accumulation {plan.accumulation}), "
        f"{facts['distributed_type']} ZeRO {facts['zero_stage']}, {facts['quantization']}, "
        f"{facts['trainable_parameters']:,} of {facts['total_parameters']:,} parameters trained, on {facts['device']}, "
        f"{trainer.utilisation.ceiling / plan.ranks / 1e12:.3g} TFLOP/s of matrix products measured on each rank"
    )
    if start:
        trainer.log.say(f"resumed after step {start}")
    elif adapter := trainer.recipe.model.adapter:
        known = {key: value for key, value in read_adapter_facts(adapter).items() if key in ("task", "step")}
        details = "".join(f", {key} {value}" for key, value in known.items())
        trainer.log.say(f"starts from the adapter {adapter}{details}")
