"""The cases that only `bash launch/test.sh --sweep` runs. The default runs one case of each kind."""

from collections.abc import Iterable
from typing import Any

import pytest


def swept(cases: Iterable[Any]) -> list[Any]:
    """Return the cases as parameters of a test, marked for the sweep. Each case is a tuple or one value."""
    return [pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=pytest.mark.sweep) for case in cases]
