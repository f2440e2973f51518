"""The useful floating-point operations (FLOPs) of a training step. Their rate over a device's peak is the MFU.

    model with its adapter ──► read_coefficients ──► Coefficients: the FLOPs of one token, one attended pair, one patch…
    batch ──► count_batch (counts.py) ──► Counts ──► Coefficients.cost

Model FLOPs utilisation (MFU) is defined in PaLM, arXiv 2204.02311, appendix B. The usual 6 × parameters × tokens would
flatter a LoRA run, because frozen weights have no gradients. So each linear layer is counted as it trains.

Always holds: only matrix products count, a product of (m, k) and (k, n) as 2 m k n. Recomputation, dequantisation,
norms, activations, softmax and the optimiser count as nothing. A quantised or sharded layer counts by its logical size.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from typing import Any

from torch import nn

from kfood_dist.estimate.counts import Counts
from kfood_dist.model.family import CONNECTOR, HEAD, LANGUAGE_MODEL, TOWER, Family, family_of
from kfood_dist.model.parts import linear_types


@dataclass(frozen=True)
class Cost:
    """FLOPs of the forward and of the backward pass."""

    forward: int = 0
    backward: int = 0

    @property
    def total(self) -> int:
        return self.forward + self.backward

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(self.forward + other.forward, self.backward + other.backward)

    def __mul__(self, times: int) -> "Cost":
        return Cost(self.forward * times, self.backward * times)


@dataclass(frozen=True)
class Coefficients:
    """FLOPs of one unit of `Counts`, over all layers that it passes."""

    token: Cost = Cost()  # the language model's linear layers
    causal_pair: Cost = Cost()  # its attention
    patch: Cost = Cost()  # the tower's patch embedding
    tower_token: Cost = Cost()  # the tower's linear layers
    window_pair: Cost = Cost()  # the tower's layers that attend within windows
    full_pair: Cost = Cost()  # the tower's other layers
    image_token: Cost = Cost()  # the connector
    label: Cost = Cost()  # the head, which runs only at positions that predict a label

    def by_part(self, counts: Counts) -> dict[str, Cost]:
        """Return the FLOPs of what was counted, by the part of the model."""
        return {
            TOWER: self.patch * counts.num_patches
            + self.tower_token * counts.num_tower_tokens
            + self.window_pair * counts.num_window_pairs
            + self.full_pair * counts.num_full_pairs,
            CONNECTOR: self.image_token * counts.num_image_tokens,
            LANGUAGE_MODEL: self.token * counts.num_tokens + self.causal_pair * counts.num_causal_pairs,
            HEAD: self.label * counts.num_labels,
        }

    def cost(self, counts: Counts) -> Cost:
        """Return the FLOPs of what was counted, over all parts."""
        return sum(self.by_part(counts).values(), Cost())


# In the order of the forward pass, with the unit of their linear layers.
_UNITS = {TOWER: "tower_token", CONNECTOR: "image_token", LANGUAGE_MODEL: "token", HEAD: "label"}
# Linear layers with one input in common. All others of a layer run one after the other.
_BRANCHES = {"q_proj": "qkv", "k_proj": "qkv", "v_proj": "qkv", "gate_proj": "gate_up", "up_proj": "gate_up"}


def read_coefficients(model: Any) -> Coefficients:
    """Count the FLOPs of each unit for a model whose parameters say by `requires_grad` what trains.

    `model` is a PeftModel or a plain base, on any device, the meta device included. All layers of the tower count, also
    those after the features that a LLaVA uses, because transformers computes them. Raises ModelError if a linear layer
    belongs to no part.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    family = family_of(base.config)
    linear_types(base, family)  # raises the error
    sums: dict[str, Cost] = {}
    for unit, cost in _costs(base, family):
        sums[unit] = sums.get(unit, Cost()) + cost
    return Coefficients(**sums)


def _costs(base: Any, family: Family) -> Iterator[tuple[str, Cost]]:
    """Yield the unit and the cost of each matrix product of the model, in the order of the forward pass.

    A product's input needs a gradient if anything before it trains. Modules are registered in the order in which they
    run, except for the norms of a layer. These train only in a part that trains in full, and its embedding comes first.
    """
    trains = False  # whether anything so far trains
    inputs: dict[str, bool] = {}  # whether an input needs a gradient
    for part, unit in _UNITS.items():
        for name, module in base.named_modules():
            if family.part_of(name) != part:
                continue
            if isinstance(module, nn.Linear):
                yield unit, _linear_cost(module, inputs.setdefault(_input_of(name), trains))
            elif isinstance(module, nn.Conv2d | nn.Conv3d):
                yield "patch", _patch_cost(module)
            elif hasattr(module, "q_proj") or hasattr(module, "qkv"):
                yield _pair_of(name, part, base.config), _attention_cost(module, trains)
            trains = trains or _trains(module, recurse=False)


def _input_of(name: str) -> str:
    """Return a key for the input of a linear layer. Layers with the same input have the same key."""
    layer = name.removesuffix(".base_layer").partition(".lora_A.")[0]
    parent, _, leaf = layer.rpartition(".")
    return f"{parent}.{_BRANCHES.get(leaf, leaf)}"


def _trains(module: nn.Module, recurse: bool = True) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters(recurse))


def _linear_cost(layer: nn.Linear, input_needs_gradient: bool) -> Cost:
    """Return the FLOPs of a linear layer for one row of its input."""
    product = 2 * layer.in_features * layer.out_features
    return Cost(product, product * (input_needs_gradient + layer.weight.requires_grad))


def _patch_cost(convolution: nn.Conv2d | nn.Conv3d) -> Cost:
    """Return the FLOPs of a patch embedding for one patch. Its input, the pixels, never needs a gradient."""
    inputs = convolution.in_channels // convolution.groups * prod(convolution.kernel_size)
    product = 2 * inputs * convolution.out_channels
    return Cost(product, product * convolution.weight.requires_grad)


def _attention_cost(attention: Any, input_needs_gradient: bool) -> Cost:
    """Return the FLOPs of one attended pair in all heads of a layer: 2 × heads × head size for each of its products.

    Forward, these are q kᵀ and scores × v. Backward, there is one for the gradient of each: v, scores, q and k. A fused
    layer `qkv` makes all three.
    """
    fused = hasattr(attention, "qkv")
    product = 2 * (attention.qkv.out_features // 3 if fused else attention.q_proj.out_features)
    layers = [attention.qkv] * 3 if fused else [attention.q_proj, attention.k_proj, attention.v_proj]
    query, key, value = (input_needs_gradient or _trains(layer) for layer in layers)
    return Cost(2 * product, product * (query + key + value + (query or key)))


def _pair_of(name: str, part: str, config: Any) -> str:
    """Return the unit of an attention layer. In a Qwen2.5-VL, a few layers of the tower attend to the whole picture."""
    if part == LANGUAGE_MODEL:
        return "causal_pair"
    full = getattr(config.vision_config, "fullatt_block_indexes", None)
    numbers = re.findall(r"\.(\d+)\.", name)
    return "full_pair" if full is None or int(numbers[0]) in full else "window_pair"
