"""Rank variables are read in one place, and a wrong one is a user's mistake, not a crash."""

import pytest

from kfood_dist.errors import LaunchError
from kfood_dist.runtime import World


def test_a_process_started_alone_is_rank_0_of_1() -> None:
    world = World.from_environment({})
    assert (world.rank, world.size, world.is_main) == (0, 1, True)
    assert world.gather("x") == ["x"]


def test_the_launchers_variables_are_read() -> None:
    world = World.from_environment({"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1"})
    assert world == World(rank=3, size=4, local_rank=1)
    assert not world.is_main


@pytest.mark.parametrize(
    "environment", [{"RANK": "a"}, {"RANK": "1"}, {"RANK": "4", "WORLD_SIZE": "4"}, {"RANK": "-1", "WORLD_SIZE": "2"}]
)
def test_impossible_ranks_are_refused(environment: dict[str, str]) -> None:
    with pytest.raises(LaunchError, match=r"launch/train\.sh"):
        World.from_environment(environment)
