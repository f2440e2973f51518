"""Where patches and tokens of pictures are in a Qwen-VL model. It depends on shapes only, so loaders compute it.

    grids ──► tower_layout ──► position of each patch, order of the windows, boundaries of pictures and windows
    grids, image tokens of the rows ──► mrope_positions ──► time, height and width of each token

A grid is (time, height, width) of a picture in patches. Time is always 1. `merge` × `merge` patches become one token.
The results equal those of transformers' vision_utils.py and get_rope_index, which would make a GPU's host wait.
"""

from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np


class TowerLayout(NamedTuple):
    """The layout of all pictures of a batch, which are one sequence of N patches and N / merge² tokens."""

    positions: np.ndarray  # (N, 2) int64, row and column of each patch in its picture
    pictures: np.ndarray  # (pictures + 1,) int32, the boundaries of the pictures in patches
    window_order: np.ndarray  # (N / merge²,) int64, the tokens sorted by window; empty without windows
    windows: np.ndarray  # (windows + 1,) int32, the boundaries of the windows in patches; empty without windows


def tower_layout(grids: np.ndarray, merge: int, window: int) -> TowerLayout:
    """Return the layout for grids, int64 (pictures, 3). `window` is a window's side in tokens, 0 without windows."""
    parts = [_of_picture(int(rows), int(columns), merge, window) for _, rows, columns in grids]
    sizes = [len(part.positions) for part in parts]
    starts = np.cumsum([0, *sizes])
    order = [part.order + start // merge**2 for part, start in zip(parts, starts, strict=False)]
    return TowerLayout(
        positions=np.concatenate([part.positions for part in parts]),
        pictures=starts.astype(np.int32),
        window_order=np.concatenate(order),
        windows=np.cumsum([0, *(n for part in parts for n in part.windows)]).astype(np.int32)
        if window
        else np.empty(0, np.int32),
    )


class _Picture(NamedTuple):
    positions: np.ndarray
    order: np.ndarray
    windows: tuple[int, ...]  # the patches of each window


@lru_cache(maxsize=256)
def _of_picture(rows: int, columns: int, merge: int, window: int) -> _Picture:
    """Return the layout of one picture of `rows` × `columns` patches."""
    places = np.stack(np.meshgrid(np.arange(rows), np.arange(columns), indexing="ij"), axis=-1)
    blocks = places.reshape(rows // merge, merge, columns // merge, merge, 2)
    positions = blocks.transpose(0, 2, 1, 3, 4).reshape(-1, 2)
    order, lengths = [], []
    tokens = np.arange(rows * columns // merge**2).reshape(rows // merge, columns // merge)
    for top in range(0, len(tokens), window) if window else ():
        for left in range(0, tokens.shape[1], window):
            inside = tokens[top : top + window, left : left + window].ravel()
            order.append(inside)
            lengths.append(len(inside) * merge**2)
    return _Picture(positions, np.concatenate([np.empty(0, np.int64), *order]), tuple(lengths))


def mrope_positions(is_image: np.ndarray, lengths: Sequence[int], grids: np.ndarray, merge: int) -> np.ndarray:
    """Return the positions of tokens for multimodal RoPE (Qwen2-VL, arXiv 2409.12191), int64 (3, B, L).

    `is_image`, (B, L), is 1 at image tokens. Row i has `lengths[i]` tokens and is padded on the right. `grids`,
    (pictures, 3), are in reading order.
    """
    positions = np.zeros((3, *is_image.shape), dtype=np.int64)
    left = iter(grids)
    for row, length in enumerate(lengths):
        kinds = is_image[row, :length]
        edges = [0, *(np.flatnonzero(np.diff(kinds)) + 1), length]
        position = 0
        for begin, end in pairwise(edges):
            here = positions[:, row, begin:end]
            if kinds[begin]:
                _, height, width = (int(side) // merge for side in next(left))
                here[...] = position + _grid_positions(height, width)
                position += max(height, width)
            else:
                here[...] = position + np.arange(end - begin)
                position += end - begin
    return positions


@lru_cache(maxsize=256)
def _grid_positions(height: int, width: int) -> np.ndarray:
    """Return time, height and width of a picture's tokens, int64 (3, height · width)."""
    return np.stack([np.zeros((height, width), np.int64), *np.mgrid[:height, :width]]).reshape(3, -1)


class QwenLayout(NamedTuple):
    """What a Qwen-VL model computes from grids by itself, unless its inputs have it."""

    merge: int
    window: int  # a window's side in tokens; 0 without windows

    def arrange(
        self, facts: dict[str, np.ndarray], is_image: np.ndarray, lengths: Sequence[int]
    ) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Return the model's inputs for a batch with `facts["image_grid_thw"]`, under transformers' names.

        The first ones are for the device. The second ones stay on the host, which needs their values.
        """
        grids = facts["image_grid_thw"]
        layout = tower_layout(grids, self.merge, self.window)
        moved = {
            **{name: value for name, value in facts.items() if name != "image_grid_thw"},
            "position_ids": mrope_positions(is_image, lengths, grids, self.merge),
            "image_position_ids": layout.positions,
        }
        kept: dict[str, Any] = {
            "image_grid_thw": grids,
            "image_cu_seqlens": layout.pictures,
            "image_max_seqlen": int(np.diff(layout.pictures).max()),
        }
        if self.window:
            moved["image_window_index"] = layout.window_order
            kept["image_cu_window_seqlens"] = layout.windows
            kept["image_max_window_seqlen"] = int(np.diff(layout.windows).max())
        return moved, kept
