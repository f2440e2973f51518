"""Resize one plane of a picture with the Lanczos filter: Pillow's weights, applied as matrix products.

    plane (h, w) uint8 ──► columns by a banded (side, h) matrix ──► rows by a banded (side, w) one ──► (side, side)

Pillow resizes a plane value by value. BLAS does it three times as fast. The weights are integer multiples of 2⁻¹⁴, so
every sum is exact in float32 in any order of adding: the result is the same on every processor and BLAS.
"""

import math
from functools import lru_cache
from typing import Literal

import numpy as np

_SUPPORT = 3.0  # Lanczos with three lobes
_UNIT = 1 << 14
# Only a few rows share a matrix, because a larger one would be mostly zeros. Only a few columns are resized at once, so
# that everything stays in the processor's cache and BLAS starts no threads: packing already has a process per core.
_ROWS, _ROWS_OF_STEEP = 16, 4
_STEEP = 4.0
_COLUMNS = 640

Band = tuple[slice, slice, np.ndarray]


def resample(plane: np.ndarray, side: int, box: tuple[float, float, float, float] | None = None) -> np.ndarray:
    """Resize a plane (h, w) uint8 to (side, side) uint8.

    With a `box` (left, top, right, bottom in pixels of the plane), resizes only that part.
    """
    height, width = plane.shape
    left, top, right, bottom = box or (0.0, 0.0, float(width), float(height))
    upright = _resize_columns(plane, side, _bands(height, side, top, bottom))
    return _resize_columns(upright.T, side, _bands(width, side, left, right)).T


def _resize_columns(plane: np.ndarray, side: int, bands: tuple[Band, ...]) -> np.ndarray:
    """Resize the columns of a plane: (h, w) uint8 to (side, w) uint8.

    The result is stored by columns if the plane is, so that transposing it copies nothing.
    """
    order: Literal["C", "F"] = "C" if plane.flags.c_contiguous else "F"
    out = np.empty((side, plane.shape[1]), dtype=np.uint8, order=order)
    for start in range(0, plane.shape[1], _COLUMNS):
        strip = plane[:, start : start + _COLUMNS].astype(np.float32)
        values = np.empty((side, strip.shape[1]), dtype=np.float32, order=order)
        for rows, used, weights in bands:
            np.matmul(weights, strip[used], out=values[rows])
        values += np.float32(0.5)
        out[:, start : start + _COLUMNS] = np.clip(values, 0, 255, out=values)
    return out


@lru_cache(maxsize=256)  # about 40 KB each
def _bands(size: int, side: int, start: float, stop: float) -> tuple[Band, ...]:
    """Return the (side, size) matrix that resizes `start` to `stop` to `side` pixels.

    It comes as bands: (its rows, the columns that they use, weights).
    """
    scale = (stop - start) / side
    width = max(scale, 1.0)
    centres = start + (np.arange(side) + 0.5) * scale
    least, end = math.floor(start), min(size, math.ceil(stop))
    begins = np.maximum(least, np.floor(centres - _SUPPORT * width)).astype(np.int64)
    num_taps = math.ceil(2 * _SUPPORT * width) + 1
    taps = begins[:, None] + np.arange(num_taps)
    weights = _lanczos((begins + 0.5 - centres) / width, np.arange(num_taps) / width)
    weights[taps >= end] = 0.0
    whole = np.rint(weights / weights.sum(1, keepdims=True) * _UNIT)
    whole[np.arange(side), whole.argmax(1)] += _UNIT - whole.sum(1)

    num_rows = _ROWS if scale <= _STEEP else _ROWS_OF_STEEP
    firsts = np.arange(0, side, num_rows)
    lefts = begins[firsts].repeat(num_rows)[:side]
    matrix = np.zeros((side, int((taps[:, -1] - lefts).max()) + 1), dtype=np.float32)
    matrix[np.arange(side)[:, None], taps - lefts[:, None]] = whole / _UNIT
    bands = []
    for first in firsts.tolist():
        rows = slice(first, min(first + num_rows, side))
        left, right = int(begins[first]), min(end, int(taps[rows.stop - 1, -1]) + 1)
        bands.append((rows, slice(left, right), matrix[rows, : right - left]))
    return tuple(bands)


def _lanczos(begins: np.ndarray, steps: np.ndarray) -> np.ndarray:
    """Return Lanczos' window sinc(x) · sinc(x/3) at begins[:, None] + steps.

    Uses the formula for sin(a + b), so that only a few sines are computed.
    """
    x = np.pi * (begins[:, None] + steps)
    a, b = np.pi * begins[:, None], np.pi * steps
    sine = np.sin(a) * np.cos(b) + np.cos(a) * np.sin(b)
    a, b = a / _SUPPORT, b / _SUPPORT
    slow_sine = np.sin(a) * np.cos(b) + np.cos(a) * np.sin(b)
    at_centre = np.abs(x) < 1e-6
    x[at_centre] = 1.0
    window = _SUPPORT * sine * slow_sine / (x * x)
    window[at_centre] = 1.0
    window[np.abs(x) >= np.pi * _SUPPORT] = 0.0
    return window
