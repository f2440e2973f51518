"""One uninterrupted run of each kind, which what was stopped, killed, staged or hindered is held against."""

from pathlib import Path

import pytest
from running import train, write_recipe
from whole import WHOLE_STEPS, Whole


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, tiny_shards: Path) -> Whole:
    """The run directory of WHOLE_STEPS steps on so many ranks at a ZeRO stage, made when it is first asked for."""
    made: dict[tuple[int, int], Path] = {}

    def get(ranks: int, zero_stage: int) -> Path:
        if (ranks, zero_stage) not in made:
            folder = tmp_path_factory.mktemp("whole")
            section = {"max_steps": WHOLE_STEPS, "zero_stage": zero_stage}
            train(write_recipe(folder / "recipe.yaml", tiny_model, tiny_shards, train=section), ranks)
            made[ranks, zero_stage] = folder / "run"
        return made[ranks, zero_stage]

    return get
