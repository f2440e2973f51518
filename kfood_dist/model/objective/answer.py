"""The loss of the answers: from pictures and tokens to the summed cross-entropy of all label tokens.

    pixels ──► to_model (device) ──► tower ──► connector ──► image features ─┐
    input_ids ───────────────────────────────────────────────────────────────┴──► language model ──► hidden
    hidden at the positions that predict a label ──► head ──► cross-entropy, summed

Always holds: only positions with a label reach the head, because full logits would be 152k wide for every token.
Nothing here reads a value of a tensor on the device, because the host would wait for it.
"""

from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch.nn import functional as F

from kfood_dist.data.batch.collate import Batch
from kfood_dist.data.batch.template import IGNORED
from kfood_dist.data.picture.protocol import Pictures
from kfood_dist.model.family import family_of
from kfood_dist.model.objective.base import Objective


class _Tokens(NamedTuple):
    """For each label token, in row order: its loss with a graph, its row, and whether it is the most likely one."""

    losses: torch.Tensor
    rows: torch.Tensor
    hits: torch.Tensor


class AnswerLoss(Objective):
    """The loss in which every label token counts the same, so a long answer counts more than a short one."""

    def __init__(self, model: Any, pictures: Pictures):
        super().__init__(model)
        self.pictures = pictures
        self._head = family_of(model.get_base_model().config).head

    def weight(self, batch: Batch) -> int:
        return batch.num_label_tokens

    def forward(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        tokens = self._label_tokens(batch)
        each = torch.zeros(len(batch.labels), device=tokens.losses.device)
        each = each.index_add_(0, tokens.rows, tokens.losses.detach())
        return tokens.losses.sum(), each, _all_hit(tokens, batch)

    def _label_tokens(self, batch: Batch) -> _Tokens:
        base = self.model.get_base_model()
        hidden = base.model(
            input_ids=batch.input_ids,
            attention_mask=None,  # the model is causal and the padding is on the right, so no token attends to it
            **self.pictures.to_model(batch.pixels, batch.facts | batch.shapes, batch.is_image),
            use_cache=False,
        ).last_hidden_state
        predicting = hidden.flatten(0, 1).index_select(0, batch.predicting)
        logits = base.get_submodule(self._head)(predicting).float()
        losses = F.cross_entropy(logits, batch.targets, reduction="none")
        return _Tokens(losses, batch.target_rows, logits.detach().argmax(-1) == batch.targets)


class MeanAnswerLoss(AnswerLoss):
    """The loss in which every answer counts the same: the sum over samples of their mean loss per label token.

    It is for answers of free text. They are seldom right to the last token, so the lowest loss makes the best
    checkpoint.
    """

    best: ClassVar[Literal["accuracy", "loss"]] = "loss"

    def weight(self, batch: Batch) -> int:
        return int((batch.labels != IGNORED).any(1).sum())

    def forward(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        tokens = self._label_tokens(batch)
        counts = (batch.labels != IGNORED).sum(1)
        shares = tokens.losses / counts[tokens.rows]
        each = torch.zeros(len(batch.labels), device=shares.device).index_add_(0, tokens.rows, shares.detach())
        return shares.sum(), each, _all_hit(tokens, batch)


def _all_hit(tokens: _Tokens, batch: Batch) -> torch.Tensor:
    """Return which samples have every label token right, bool (B,). Samples without labels count as wrong.

    This equals the exact match of greedy generation: greedy decoding writes the answer and its end token if and only if
    each is the most likely token after the ones before it.
    """
    count = (batch.labels != IGNORED).sum(1)
    right = torch.zeros(len(count), device=tokens.hits.device).index_add_(0, tokens.rows, tokens.hits.float())
    return (right == count) & (count > 0)
