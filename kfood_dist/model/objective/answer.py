"""The module that is trained: pictures and tokens in, the summed loss of the answers out.

    patches ──► normalise (device) ──► frozen tower, no_grad ──► image features ─┐
    input_ids ───────────────────────────────────────────────────────────────────┴──► language model ──► hidden
    hidden at the positions that predict a label ──► head ──► cross-entropy, summed

Always holds: only positions with a label reach the head (full logits would be 152k wide for every token); the sum is
not divided here, because only the caller knows how many labels the whole global batch has.
"""

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from kfood_dist.data.batch.collate import Batch
from kfood_dist.data.batch.template import IGNORED
from kfood_dist.data.picture.patches import VisionSpec
from kfood_dist.model.family import VISION_TOWER
from kfood_dist.model.parts import freeze_forward


def normalise_patches(patches: torch.Tensor, vision: VisionSpec) -> torch.Tensor:
    """uint8 patches (n, p·p·3) → pixel_values (n, 3·T·p·p) float32, normalised and repeated T times in time.

    Equals transformers' Qwen2VLImageProcessor, which rescales by 1/255, then takes (x - mean) / std per channel.
    Pixel values that a model's own processor made (float32) are returned as they are.
    """
    if patches.is_floating_point():
        return patches
    p, t = vision.patch_size, vision.temporal_patch_size
    mean = torch.tensor(vision.mean, device=patches.device).view(1, 3, 1, 1)
    std = torch.tensor(vision.std, device=patches.device).view(1, 3, 1, 1)
    pixels = (patches.view(-1, p * p, 3).permute(0, 2, 1).unsqueeze(2).float() / 255 - mean) / std
    return pixels.expand(-1, -1, t, -1).reshape(-1, 3 * t * p * p)


class AnswerLoss(nn.Module):
    """A PeftModel with its loss, as one module for DeepSpeed and DDP to wrap."""

    def __init__(self, model: Any, vision: VisionSpec):
        super().__init__()
        self.model = model
        self.vision = vision
        freeze_forward(model.get_base_model().get_submodule(VISION_TOWER))

    def forward(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(loss, hits, losses): the summed cross-entropy of all label tokens, float32 scalar; for each label token,
        in row order, whether it is the most likely one, bool (num_label_tokens,); and each sample's own part of the
        sum, float32 (B,) without a graph.
        """
        base = self.model.get_base_model()
        hidden = base.model(
            input_ids=batch.input_ids,
            attention_mask=batch.attention_mask,
            mm_token_type_ids=batch.mm_token_type_ids,
            image_grid_thw=batch.image_grid_thw,
            pixel_values=normalise_patches(batch.patches, self.vision),
            use_cache=False,
        ).last_hidden_state
        targets = batch.labels[:, 1:]  # position i predicts token i + 1
        labelled = targets != IGNORED
        logits = base.lm_head(hidden[:, :-1][labelled]).float()
        each = F.cross_entropy(logits, targets[labelled], reduction="none")
        rows = labelled.nonzero()[:, 0]
        losses = torch.zeros(len(labelled), device=each.device).index_add_(0, rows, each.detach())
        return each.sum(), logits.detach().argmax(-1) == targets[labelled], losses


def exact_matches(hits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Which samples have every label token right, bool (B,); those without labels count as wrong.

    Equals exact match of greedy generation: greedy decoding writes the answer and its end token if and only if each
    is the most likely token after the ones before it.
    """
    labelled = labels[:, 1:] != IGNORED
    rows = labelled.nonzero()[:, 0]
    right = torch.zeros(len(labels), device=hits.device).index_add_(0, rows, hits.float())
    count = labelled.sum(1)
    return (right == count) & (count > 0)
