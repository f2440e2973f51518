"""Dropout for LoRA that draws its mask quickly on a CPU: four elements from each random word of 64 bits.

torch draws one number at a time there. Forward and backward together take two thirds of the time of torch's dropout. On
a GPU, torch's own kernel is used.
"""

from typing import Any

import torch
from torch import nn

_LEVELS = 2**16  # a quarter of a word


class FastDropout(nn.Dropout):
    """torch's Dropout, whose probability on a CPU is rounded to a multiple of 1 / 65,536.

    It draws from torch's generator. So a seed determines the mask, and recomputed activations get the same mask.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.device.type != "cpu" or not self.training:
            return super().forward(x)
        dropped = round(self.p * _LEVELS)
        words = torch.randint(-(2**63), 2**63 - 1, (-(-x.numel() // 4),))
        kept = words.view(torch.int16)[: x.numel()].view(x.shape) >= dropped - _LEVELS // 2
        return torch.where(kept, x, 0.0).mul_(_LEVELS / (_LEVELS - dropped))


def speed_up_dropout(model: Any) -> None:
    """Let the LoRA layers of a PeftModel use FastDropout."""
    for module in model.modules():
        for name, layer in getattr(module, "lora_dropout", {}).items():
            if isinstance(layer, nn.Dropout):
                module.lora_dropout[name] = FastDropout(layer.p)
