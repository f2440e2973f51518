"""Resizing a plane gives exactly the result of its filter, and a result close to Pillow's."""

import numpy as np
import pytest
from PIL import Image

from kfood_dist.data.picture.resample import _UNIT, _bands, resample

# Smaller than the result, equal to it, a little and much larger, and wider than one strip.
SHAPES = [(100, 150), (224, 224), (450, 600), (480, 640), (233, 1500), (3000, 260)]


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    """Draw black and white pixels at random, the hardest case for rounding and clipping."""
    return np.random.default_rng(seed).choice([0, 255], (height, width)).astype(np.uint8)


def smooth(height: int, width: int) -> np.ndarray:
    coarse = np.random.default_rng(1).integers(0, 256, (9, 12), dtype=np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))


def in_whole_numbers(plane: np.ndarray, side: int, start: float, stop: float) -> np.ndarray:
    """Compute one pass in 64-bit integers, which are exact."""
    matrix = np.zeros((side, plane.shape[0]), dtype=np.int64)
    for rows, used, weights in _bands(plane.shape[0], side, start, stop):
        matrix[rows, used] = np.round(weights.astype(np.float64) * _UNIT)
    return np.clip((matrix @ plane.astype(np.int64) + _UNIT // 2) // _UNIT, 0, 255).astype(np.uint8)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("part", [(0.0, 1.0), (0.13, 0.71)])
def test_every_value_is_exact_and_equal_on_every_processor(shape, part):
    plane = noise(*shape)
    height, width = shape
    box = (part[0] * width, part[0] * height, part[1] * width, part[1] * height)
    upright = in_whole_numbers(plane, 224, box[1], box[3])
    expected = in_whole_numbers(np.ascontiguousarray(upright.T), 224, box[0], box[2]).T
    assert (resample(plane, 224, box) == expected).all()


@pytest.mark.parametrize("shape", SHAPES)
def test_a_smooth_plane_is_close_to_pillows_lanczos(shape):
    plane = smooth(*shape)
    expected = np.asarray(Image.fromarray(plane).resize((224, 224), Image.Resampling.LANCZOS))
    difference = np.abs(resample(plane, 224).astype(int) - expected)
    assert difference.max() <= 2  # Pillow resizes the rows first, and both round between the two passes
    assert (difference > 1).mean() < 0.001


@pytest.mark.parametrize("level", [0, 1, 128, 254, 255])
def test_a_uniform_plane_does_not_change(level):
    assert (resample(np.full((333, 517), level, dtype=np.uint8), 112) == level).all()


def test_pixels_outside_the_box_have_no_effect():
    plane = np.full((300, 400), 255, dtype=np.uint8)
    plane[50:250, 100:300] = 7
    assert (resample(plane, 64, (100.0, 50.0, 300.0, 250.0)) == 7).all()
    assert (resample(plane, 64) == 255).any()
