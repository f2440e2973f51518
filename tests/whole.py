"""The uninterrupted runs that other runs are compared with. tests/conftest.py makes them."""

from collections.abc import Callable
from pathlib import Path

WHOLE_STEPS = 12

Whole = Callable[[int, int], Path]  # from the number of ranks and the ZeRO stage to the run directory
