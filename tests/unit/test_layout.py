"""The layout of pictures: equal to what transformers' own functions compute from the same grids."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bases import write_qwen2_vl
from transformers import AutoModelForImageTextToText
from transformers.vision_utils import get_vision_cu_seqlens, get_vision_position_ids, get_vision_window_index

from kfood_dist.data.picture.layout import mrope_positions, tower_layout
from kfood_dist.model.base import load_config

MERGE, WINDOW = 2, 4
# Height and width in patches: squares, sides that no window divides, one token, and a wide and a high picture.
GRIDS = [(16, 16), (16, 16), (10, 14), (2, 2), (6, 34), (30, 4), (8, 8)]


def grids_of(sides: list[tuple[int, int]]) -> np.ndarray:
    return np.array([(1, height, width) for height, width in sides])


@pytest.mark.parametrize("sides", [GRIDS, GRIDS[:2], GRIDS[3:4]], ids=["mixed", "squares", "one token"])
def test_the_layout_of_the_tower_is_that_of_transformers(sides: list[tuple[int, int]]) -> None:
    grids = grids_of(sides)
    layout, given = tower_layout(grids, MERGE, WINDOW), torch.from_numpy(grids)
    order, windows = get_vision_window_index(given, MERGE, window_size=112, patch_size=14)
    assert layout.positions.tolist() == get_vision_position_ids(given, MERGE).tolist()
    assert layout.pictures.tolist() == get_vision_cu_seqlens(given).tolist()
    assert layout.window_order.tolist() == order.tolist()
    assert layout.windows.tolist() == windows.tolist()


def test_a_tower_without_windows_has_none() -> None:
    layout = tower_layout(grids_of(GRIDS), MERGE, 0)
    assert layout.window_order.size == layout.windows.size == 0


@pytest.fixture(scope="module")
def qwen2_vl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("qwen2_vl")
    write_qwen2_vl(folder)
    return folder


@pytest.fixture(params=["qwen2_5_vl", "qwen2_vl"])
def model(request: pytest.FixtureRequest, tiny_model: Path, qwen2_vl: Path) -> Any:
    folder = tiny_model if request.param == "qwen2_5_vl" else qwen2_vl
    with torch.device("meta"):
        return AutoModelForImageTextToText.from_config(load_config(str(folder))).model


def test_mrope_positions_are_those_of_transformers(model: Any) -> None:
    """Rows with one picture and several, text before, between and after them, padding, and pictures of all shapes."""
    rows = [[0], [1, 2], [3, 4, 5], [6]]  # the pictures of each row
    kinds = []
    for number, pictures in enumerate(rows):
        row = [0] * (number * 3)  # the last rows start with text, the first one with its picture
        for picture in pictures:
            height, width = GRIDS[picture]
            row += [1] * (height * width // MERGE**2) + [0] * (picture + 1)
        kinds.append(row)
    length = max(map(len, kinds))
    is_image = np.array([row + [0] * (length - len(row)) for row in kinds])
    mask = np.array([[1] * len(row) + [0] * (length - len(row)) for row in kinds])
    expected, _ = model.get_rope_index(
        torch.zeros(is_image.shape, dtype=torch.int64),
        mm_token_type_ids=torch.from_numpy(is_image),
        image_grid_thw=torch.from_numpy(grids_of(GRIDS)),
        attention_mask=torch.from_numpy(mask),
    )
    positions = mrope_positions(is_image, [len(row) for row in kinds], grids_of(GRIDS), MERGE)
    assert positions.tolist() == expected.tolist()
