"""The fast vision tower: the same features and gradients as the unchanged one, with fewer calls of attention."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bases import write_llava, write_qwen2_vl
from torch.nn import functional as F

from kfood_dist.data.picture.layout import tower_layout
from kfood_dist.model.family import family_of
from kfood_dist.model.load import load_base
from kfood_dist.model.tower import speed_up_tower

SQUARES = [(1, 16, 16)] * 3
MIXED = [(1, 16, 16), (1, 10, 14), (1, 2, 2), (1, 6, 34), (1, 16, 16), (1, 30, 4)]


@pytest.fixture(scope="module")
def bases(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("bases")
    write_qwen2_vl(folder / "qwen2_vl")
    write_llava(folder / "llava")
    return {"qwen2_5_vl": tiny_model, "qwen2_vl": folder / "qwen2_vl", "llava": folder / "llava"}


def towers(base: Path, precision: str, attention: str = "sdpa") -> tuple[Any, Any]:
    """Return the unchanged tower and the fast one."""
    loaded = [load_base(str(base), "none", precision, attention, torch.device("cpu")) for _ in range(2)]
    family = family_of(loaded[0].config)
    speed_up_tower(loaded[1], family)
    plain, fast = (model.get_submodule(family.tower) for model in loaded)
    return plain, fast


def pixels_of(grids: list[tuple[int, int, int]]) -> torch.Tensor:
    torch.manual_seed(0)
    return torch.randn(sum(h * w for _, h, w in grids), 1176)


def features(tower: Any, pixels: torch.Tensor, grids: list[tuple[int, int, int]]) -> torch.Tensor:
    return tower(pixels.to(tower.dtype), grid_thw=torch.tensor(grids)).pooler_output


@pytest.mark.parametrize("grids", [SQUARES, MIXED], ids=["squares", "mixed"])
@pytest.mark.parametrize("kind", ["qwen2_5_vl", "qwen2_vl"])
def test_the_features_are_the_same_up_to_rounding(bases: dict[str, Path], kind: str, grids: list) -> None:
    """In float32 up to 1e-5. In bf16, the fast tower is as near to the float32 features as the unchanged one."""
    exact, fast = (features(tower, pixels_of(grids), grids) for tower in towers(bases[kind], "fp32"))
    assert torch.allclose(exact, fast, rtol=1e-5, atol=1e-5 * exact.abs().max())
    errors = [
        (features(tower, pixels_of(grids), grids).float() - exact).norm() for tower in towers(bases[kind], "bf16")
    ]
    assert errors[0] < 0.05 * exact.norm()
    assert errors[1] < 1.1 * errors[0]


@pytest.mark.parametrize("grids", [SQUARES, MIXED], ids=["squares", "mixed"])
def test_a_tower_that_trains_gets_the_same_gradients(bases: dict[str, Path], grids: list) -> None:
    gradients = []
    for tower in towers(bases["qwen2_5_vl"], "fp32"):
        tower.requires_grad_(True)
        features(tower, pixels_of(grids), grids).square().sum().backward()
        gradients.append({name: parameter.grad for name, parameter in tower.named_parameters()})
    for name, expected in gradients[0].items():
        assert torch.allclose(expected, gradients[1][name], rtol=1e-4, atol=1e-5 * expected.abs().max()), name


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The shapes of the queries of every call of attention."""
    shapes: list[tuple[int, ...]] = []
    attend: Callable[..., torch.Tensor] = F.scaled_dot_product_attention

    def counted(query: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
        shapes.append(tuple(query.shape))
        return attend(query, *args, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", counted)
    return shapes


def test_squares_take_one_call_of_attention_per_block(bases: dict[str, Path], calls: list) -> None:
    plain, fast = towers(bases["qwen2_5_vl"], "fp32")
    features(fast, pixels_of(SQUARES), SQUARES)
    assert calls == [(12, 4, 64, 32), (3, 4, 256, 32)]  # a block with windows, and one without
    calls.clear()
    features(plain, pixels_of(SQUARES), SQUARES)
    assert len(calls) == 15


def test_mixed_shapes_take_one_call_for_each_length(bases: dict[str, Path], calls: list) -> None:
    _, fast = towers(bases["qwen2_5_vl"], "fp32")
    features(fast, pixels_of(MIXED), MIXED)
    layout = tower_layout(np.array(MIXED), merge=2, window=4)
    lengths = [sorted(set(np.diff(boundaries))) for boundaries in (layout.windows, layout.pictures)]
    assert [shape[2] for shape in calls] == [*lengths[0], *lengths[1]]
    assert len(calls) < (len(layout.windows) + len(layout.pictures)) / 2


def test_eager_attention_and_other_families_stay_as_they_are(bases: dict[str, Path]) -> None:
    _, eager = towers(bases["qwen2_5_vl"], "fp32", attention="eager")
    assert eager.config._attn_implementation == "eager"
    plain, same = towers(bases["llava"], "fp32")
    assert same.config._attn_implementation == plain.config._attn_implementation == "sdpa"
    assert not any("forward" in vars(module) for module in same.modules())
