"""The training run again in plain PyTorch, without engine or loss module: what all ways to train are held against."""

from pathlib import Path

import torch
from bitsandbytes.optim import AdamW8bit
from torch.nn import functional as F
from torch.optim import AdamW

from kfood_dist.config.recipe import load_recipe
from kfood_dist.data.batch.collate import StreamingCollator
from kfood_dist.data.batch.template import IGNORED
from kfood_dist.data.shards.reader import open_split
from kfood_dist.model.adapters import attach_lora
from kfood_dist.model.load import load_base
from kfood_dist.model.objective.answer import normalise_patches
from kfood_dist.model.processor import build_template
from kfood_dist.train.engine.optim import learning_rate_at
from kfood_dist.train.preflight import preflight


def plain_losses(path: Path) -> list[float]:
    """The loss of each step of a recipe in bf16, as one process takes them."""
    recipe = load_recipe(path)
    plan, steps = preflight(recipe, world_size=1), recipe.train.max_steps
    template = build_template(recipe.model.base, recipe.data)
    collator = StreamingCollator(open_split(recipe.data.shards, "train"), template)
    base = load_base(recipe.model.base, recipe.model.quantization, "bf16", "sdpa", torch.device("cpu"))
    torch.manual_seed(recipe.train.seed)
    model = attach_lora(base, recipe.lora).train()
    weights = [p for p in model.parameters() if p.requires_grad]
    optim = recipe.optim
    kind = {"adamw8bit": AdamW8bit, "adamw": AdamW}[optim.name]
    optimizer = kind(weights, betas=(optim.beta1, optim.beta2), eps=optim.eps, weight_decay=optim.weight_decay)
    losses = []
    torch.set_num_threads(1)
    for step in range(steps):
        batches = [collator[micro_batch] for micro_batch in plan.micro_batches(0, step, step + 1)]
        num_labels = sum(batch.num_label_tokens for batch in batches)
        total = 0.0
        for batch in batches:
            with torch.autocast("cpu", torch.bfloat16):
                logits = model(
                    input_ids=batch.input_ids,
                    attention_mask=batch.attention_mask,
                    mm_token_type_ids=batch.mm_token_type_ids,
                    image_grid_thw=batch.image_grid_thw,
                    pixel_values=normalise_patches(batch.patches, template.vision),
                ).logits
            answers = logits[:, :-1].flatten(0, 1).float(), batch.labels[:, 1:].flatten()
            loss = F.cross_entropy(*answers, ignore_index=IGNORED, reduction="sum") / num_labels
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(weights, optim.max_grad_norm)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate_at(step, steps, optim)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
    return losses
