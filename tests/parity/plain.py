"""The same training in plain PyTorch, without engine and loss module. All ways to train are compared with it."""

from functools import partial
from pathlib import Path

import torch
from asking import model_inputs
from bitsandbytes.optim import AdamW8bit
from torch.nn import functional as F
from torch.optim import AdamW

from kfood_dist.config.recipe import load_recipe
from kfood_dist.data.batch.collate import StreamingCollator
from kfood_dist.data.batch.template import IGNORED
from kfood_dist.data.shards.reader import open_split
from kfood_dist.data.task.table import build_task
from kfood_dist.model.load import DTYPES, load_base
from kfood_dist.model.parts import apply_parts
from kfood_dist.model.processor import build_template
from kfood_dist.train.engine.optim import learning_rate_at
from kfood_dist.train.preflight import preflight


def plain_losses(path: Path) -> list[float]:
    """Return the loss of each step when one process trains a recipe."""
    recipe = load_recipe(path)
    plan, steps = preflight(recipe, world_size=1), recipe.train.max_steps
    template = build_template(recipe.model.base, recipe.data)
    samples = open_split(recipe.data.shards, "train")
    task = build_task(recipe.data.task, recipe.data.system, recipe.data.prompt, samples.classes)
    collator = StreamingCollator(samples, template, task)
    base = load_base(recipe.model.base, recipe.model.quantization, recipe.model.precision, "sdpa", torch.device("cpu"))
    torch.manual_seed(recipe.train.seed)
    model = apply_parts(base, recipe.parts, recipe.lora).train()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    masters = {name: torch.nn.Parameter(p.detach().clone()) for name, p in trained.items()}  # float32
    for parameter in trained.values():
        parameter.data = parameter.data.to(DTYPES[recipe.model.precision])
    optim = recipe.optim
    peaks = [optim.learning_rate, recipe.parts.connector.learning_rate or optim.learning_rate]
    groups = [{"params": [p for name, p in masters.items() if (".lora_" in name) == lora]} for lora in (True, False)]
    # Every tensor in 8 bits. By default, bitsandbytes keeps the moments of tensors under 4,096 numbers in 32 bits.
    kind = {"adamw8bit": partial(AdamW8bit, min_8bit_size=1), "adamw": AdamW}[optim.name]
    optimizer = kind(groups, betas=(optim.beta1, optim.beta2), eps=optim.eps, weight_decay=optim.weight_decay)
    losses = []
    torch.set_num_threads(1)
    for step in range(steps):
        batches = [collator[micro_batch] for micro_batch in plan.micro_batches(0, step, step + 1)]
        num_answers = sum(len(batch.ids) for batch in batches)
        num_labels = sum(batch.num_label_tokens for batch in batches)
        total = 0.0
        for batch in batches:
            # Rows are padded on the right of a causal model. A mask would change only the rounding (test_loss.py).
            logits = model(**model_inputs(batch, template.pictures) | {"attention_mask": None}).logits
            answers = logits[:, :-1].flatten(0, 1).float(), batch.labels[:, 1:].flatten()
            if recipe.objective.name == "answer_mean":
                each = F.cross_entropy(*answers, ignore_index=IGNORED, reduction="none").view(len(logits), -1)
                loss = (each.sum(1) / (batch.labels != IGNORED).sum(1)).sum() / num_answers
            else:
                loss = F.cross_entropy(*answers, ignore_index=IGNORED, reduction="sum") / num_labels
            loss.backward()
            total += loss.item()
            for name, parameter in trained.items():
                masters[name].grad = sum_of(masters[name].grad, parameter.grad)
                parameter.grad = None
        torch.nn.utils.clip_grad_norm_(masters.values(), optim.max_grad_norm)
        for group, peak in zip(optimizer.param_groups, peaks, strict=True):
            group["lr"] = learning_rate_at(step, steps, optim, peak)
        optimizer.step()
        optimizer.zero_grad()
        for name, parameter in trained.items():
            parameter.data.copy_(masters[name].detach())
        losses.append(total)
    return losses


def sum_of(total: torch.Tensor | None, gradient: torch.Tensor) -> torch.Tensor:
    """Return the sum in float32."""
    return gradient.float() if total is None else total + gradient.float()
