"""What the uninterrupted runs are that others are held against; tests/conftest.py makes them."""

from collections.abc import Callable
from pathlib import Path

WHOLE_STEPS = 12

Whole = Callable[[int, int], Path]  # of ranks and ZeRO stage: the run directory
