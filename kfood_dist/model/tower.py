"""A Qwen-VL vision tower in fewer and larger operations. Its features are the same up to rounding.

    speed_up_tower ──► attention: one call for all pictures or windows of one length
                  └──► patch embedding: one linear layer, because the patches of its convolution do not overlap

transformers calls attention once for each picture or window, and most convolution kernels are slow at this shape.
"""

from collections.abc import Sequence
from functools import lru_cache, partial
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from kfood_dist.model.family import Family

# With "flash" in the name, transformers passes the boundaries of the segments. Otherwise it splits the tensors itself.
_ATTENTION = "flash_by_length"


def speed_up_tower(model: Any, family: Family) -> None:
    """Let the vision tower of `model` compute in larger operations, if its family packs pictures into one sequence.

    Eager attention stays as it is, because it is the reference.
    """
    if not family.packs_pictures:
        return
    tower = model.get_submodule(family.tower)
    for module in tower.modules():
        if isinstance(module, nn.Conv3d) and module.stride == module.kernel_size and not any(module.padding):
            module.forward = partial(_as_linear, module)  # type: ignore[method-assign]
    if tower.config._attn_implementation != "eager":
        from transformers import AttentionInterface

        AttentionInterface.register(_ATTENTION, attend_by_length)
        tower.config._attn_implementation = _ATTENTION


def _as_linear(convolution: nn.Conv3d, patches: torch.Tensor) -> torch.Tensor:
    """Apply a convolution to patches (n, channels, *kernel), which are exactly as large as its kernel."""
    weight = convolution.weight.flatten(1)
    return F.linear(patches.flatten(1), weight, convolution.bias)[:, :, None, None, None]


def attend_by_length(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: None,
    scaling: float,
    cu_seq_lens_q: torch.Tensor,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Attend within segments of a sequence, with one call for all segments of one length.

    The states are (1, heads, N, head_dim), with key and value heads equal to query heads. `cu_seq_lens_q` has the
    boundaries of the segments, int32 (segments + 1,), on the host. Returns (1, N, heads, head_dim).
    """
    states = [state[0].transpose(0, 1) for state in (query, key, value)]  # (N, heads, head_dim)
    lengths = cu_seq_lens_q.diff().tolist()
    if len(set(lengths)) == 1:
        return _attend(states, lengths[0], scaling)[None], None
    sorting = _sort_by_length(tuple(lengths), query.device)
    parts = zip(*(state[sorting.order].split(sorting.sizes) for state in states), strict=True)
    attended = [_attend(part, length, scaling) for part, length in zip(parts, sorting.lengths, strict=True)]
    return torch.cat(attended)[sorting.back][None], None


def _attend(states: Sequence[torch.Tensor], length: int, scaling: float) -> torch.Tensor:
    """Attend within segments of one length. The states and the result are (n · length, heads, head_dim)."""
    query, key, value = (state.unflatten(0, (-1, length)).transpose(1, 2) for state in states)
    return F.scaled_dot_product_attention(query, key, value, scale=scaling).transpose(1, 2).flatten(0, 1)


class _Sorting(NamedTuple):
    """The order that puts segments of one length next to each other."""

    lengths: list[int]  # the different lengths
    sizes: list[int]  # the places of all segments of each length
    order: torch.Tensor  # (N,) the places, sorted by length
    back: torch.Tensor  # (N,) where each place is in `order`


@lru_cache(maxsize=8)  # a batch needs two, for its pictures and its windows, in every layer
def _sort_by_length(lengths: tuple[int, ...], device: torch.device) -> _Sorting:
    places = torch.arange(sum(lengths)).split(lengths)
    different = sorted(set(lengths))
    groups = [torch.cat([p for p in places if len(p) == length]) for length in different]
    order = torch.cat(groups)
    return _Sorting(different, list(map(len, groups)), order.to(device), order.argsort().to(device))
