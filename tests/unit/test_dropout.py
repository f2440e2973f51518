"""The fast dropout on a CPU: the distribution of torch's dropout, decided by the seed, replayed by recomputation."""

from pathlib import Path

import pytest
import torch
from asking import adapted
from torch import nn
from torch.utils.checkpoint import checkpoint

from kfood_dist.model.dropout import FastDropout


@pytest.mark.parametrize("p", [0.05, 0.3, 0.9])
def test_the_share_of_zeros_and_the_scale_are_those_of_dropout(p: float) -> None:
    torch.manual_seed(0)
    x = torch.ones(1000, 1001)
    out = FastDropout(p).train()(x)
    dropped = (out == 0).float()
    sigma = (p * (1 - p) / x.numel()) ** 0.5
    assert abs(dropped.mean().item() - p) < 4 * sigma + 2**-17
    assert out.max().item() == pytest.approx(1 / (1 - p), rel=1e-4)
    assert abs(out.mean().item() - 1) < 4 * sigma / (1 - p)


def test_elements_are_independent_also_within_a_word() -> None:
    """Neighbours share a word. The correlation of elements 1 to 8 apart stays within its noise."""
    torch.manual_seed(0)
    dropped = (FastDropout(0.3).train()(torch.ones(2**20)) == 0).double() - 0.3
    for apart in range(1, 9):
        correlation = (dropped[:-apart] * dropped[apart:]).mean() / (0.3 * 0.7)
        assert abs(correlation) < 5 * 2**-10, apart
    places = dropped.view(-1, 4).mean(0)  # each quarter of the words
    assert places.abs().max() < 5 * (0.3 * 0.7) ** 0.5 * 2**-9


def test_the_seed_decides_the_mask() -> None:
    layer, x, masks = FastDropout(0.3).train(), torch.ones(3, 5, 7), []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        masks.append(layer(x))
    assert torch.equal(masks[0], masks[1]) and not torch.equal(masks[0], masks[2])
    assert not torch.equal(layer(x), layer(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_gradient_passes_where_the_value_does_and_recomputation_repeats_the_mask(dtype: torch.dtype) -> None:
    layer, x = FastDropout(0.3).train(), torch.ones(64, 65, dtype=dtype, requires_grad=True)
    torch.manual_seed(0)
    out = checkpoint(layer, x, use_reentrant=False)
    torch.randn(10)  # the generator moves on before the backward pass
    out.sum().backward()
    assert x.grad is not None and out.dtype == dtype
    assert torch.equal(x.grad, out.detach())


def test_outside_training_nothing_is_dropped() -> None:
    x = torch.ones(4)
    assert torch.equal(FastDropout(0.5).eval()(x), x)


def test_an_adapter_uses_it(tiny_model: Path) -> None:
    layers = [m for m in adapted(tiny_model, dropout=0.05).modules() if isinstance(m, nn.Dropout) and m.p == 0.05]
    assert len(layers) == 28 and all(isinstance(layer, FastDropout) for layer in layers)
    without = adapted(tiny_model, dropout=0.0)
    assert not any(isinstance(module, FastDropout) for module in without.modules())
