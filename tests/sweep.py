"""What only `bash launch/test.sh --sweep` runs: of each kind, the cases that the default leaves out."""

from collections.abc import Iterable
from typing import Any

import pytest


def swept(cases: Iterable[Any]) -> list[Any]:
    """The cases as parameters of a test, each a tuple or one value, marked for the sweep."""
    return [pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=pytest.mark.sweep) for case in cases]
