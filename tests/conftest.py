"""What many tests share: a tiny real Qwen2.5-VL, a few drawn pictures, and those pictures packed."""

from pathlib import Path

import pytest

from kfood_dist.cli import main
from kfood_dist.practice.pictures import DISHES, write_pictures
from kfood_dist.practice.tiny_model import write_model

NUM_DISHES = 4
PER_DISH = 12


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random Qwen2.5-VL of some 4 million parameters, its tokenizer and image processor."""
    folder = tmp_path_factory.mktemp("model")
    write_model(folder, seed=0)
    return folder


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """48 drawn pictures of 4 dishes in the AI-Hub layout."""
    folder = tmp_path_factory.mktemp("pictures")
    list(write_pictures(folder, DISHES[-NUM_DISHES:], PER_DISH, seed=0))
    return folder


@pytest.fixture(scope="session")
def tiny_shards(tmp_path_factory: pytest.TempPathFactory, pictures: Path) -> Path:
    """The pictures packed: 24 to train, 8 to validate, 16 to test, or nearly so."""
    out = tmp_path_factory.mktemp("packed") / "shards"
    assert main(["pack", str(pictures), str(out), "--split", "0.5,0.2,0.3"]) == 0
    return out
