"""Fixtures of many tests (a tiny real Qwen2.5-VL, packed pictures, uninterrupted runs), and settings of the suite."""

import os
import shutil
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
from asking import adapted
from filelock import FileLock
from hypothesis import settings
from orders import plain_order
from running import kill_launches, train, write_recipe
from whole import WHOLE_STEPS, Whole

from kfood_dist.cli import main
from kfood_dist.config.sections import Data
from kfood_dist.data.batch.collate import StreamingCollator
from kfood_dist.data.plan.plan import MicroBatch
from kfood_dist.data.shards.reader import open_split
from kfood_dist.data.task.dish import DishTask
from kfood_dist.model.adapters import save_adapter
from kfood_dist.model.objective.answer import AnswerLoss
from kfood_dist.model.processor import build_template
from kfood_dist.practice.pictures import DISHES, write_pictures
from kfood_dist.practice.tiny_model import write_model

# No deadline: an example may be slow because the machine is busy. pytest's own time limit ends a test that hangs.
# By default the examples are the same every time, so that a new failure is caused by the change.
settings.register_profile("default", deadline=None, derandomize=True)
settings.register_profile("sweep", deadline=None, max_examples=1000)

# A suite started in the background may ignore Ctrl-C, and all processes that it starts inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)

# One thread, like the ranks that tests fork: threads that wait for each other on a busy machine cost minutes.
torch.set_num_threads(1)

NUM_DISHES = 4
PER_DISH = 12


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--sweep", action="store_true", help="run all cases; the default runs one of each kind")


def pytest_configure(config: pytest.Config) -> None:
    settings.load_profile("sweep" if config.getoption("--sweep") else "default")


# The slowest tests begin first, so that at the end no worker waits long for another.
FIRST = ("tests/slurm/", "tests/distributed/test_quickstart.py", "tests/distributed/", "tests/parity/", "")


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist reads the groups
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Drop the sweep unless --sweep is given. With -n, keep tests that share a fixture or a Slurm on one worker."""
    if not config.getoption("--sweep"):
        left_out = [item for item in items if item.get_closest_marker("sweep")]
        items[:] = [item for item in items if not item.get_closest_marker("sweep")]
        config.hook.pytest_deselected(items=left_out)
    items.sort(key=lambda item: [item.nodeid.startswith(start) for start in FIRST].index(True))
    for item in items:
        if group := _group(item):
            item.add_marker(pytest.mark.xdist_group(group))


def _folder(nodeid: str) -> str:
    return nodeid.split("/")[1]


def _group(item: pytest.Item) -> str:
    """Return the group of a test, or "" for none. The tests of one group run one after the other in one process."""
    if _folder(item.nodeid) == "slurm":
        return "slurm"
    fixtures = item._fixtureinfo.name2fixturedefs.values()  # type: ignore[attr-defined]
    shares = any(fixture.scope in ("module", "class") for found in fixtures for fixture in found)
    return item.nodeid.split("::")[0] if shares else ""


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print where the time went: the ten slowest tests with their fixtures, and the sum of each folder."""
    tests: Counter[str] = Counter()
    for reports in terminalreporter.stats.values():
        for report in reports:
            if isinstance(report, pytest.TestReport):
                tests[report.nodeid.split("@")[0]] += report.duration
    folders: Counter[str] = Counter()
    for nodeid, took_s in tests.items():
        folders[_folder(nodeid)] += took_s
    terminalreporter.section("where the time went")
    for nodeid, took_s in tests.most_common(10):
        terminalreporter.write_line(f"{took_s:7.1f} s  {nodeid}")
    for folder, took_s in folders.most_common():
        terminalreporter.write_line(f"{took_s:7.1f} s  all of tests/{folder}")
    terminalreporter.write_line(f"{folders.total():7.1f} s  all tests, several of them at once with -n")


def shared(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], None]) -> Path:
    """Return the folder that `make` fills once for all processes of the suite. No test may change it afterwards."""
    root = factory.getbasetemp()
    folder = (root.parent if "PYTEST_XDIST_WORKER" in os.environ else root) / "shared" / name
    folder.parent.mkdir(exist_ok=True)
    made = folder.with_name(f"{name}.made")
    with FileLock(f"{folder}.lock"):
        if not made.exists():
            shutil.rmtree(folder, ignore_errors=True)  # of a worker that was killed, or whose `make` failed
            folder.mkdir()
            make(folder)
            made.touch()
    return folder


@pytest.fixture(autouse=True)
def no_launch_outlives_its_test() -> Iterator[None]:
    """Kill the launchers that a test started and did not wait for. Their ranks end with them."""
    yield
    kill_launches()


@pytest.fixture
def one_in(request: pytest.FixtureRequest) -> Callable[[int], int]:
    """Return the stride through many cases of a kind: `one_in(13)` is 13, or 1 in a sweep."""
    sweep = request.config.getoption("--sweep")
    return lambda stride: 1 if sweep else stride


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a random Qwen2.5-VL of about 4 million parameters, its tokenizer and image processor."""
    return shared(tmp_path_factory, "model", partial(write_model, seed=0))


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with 48 drawn pictures of 4 dishes in the AI-Hub layout."""

    def draw(folder: Path) -> None:
        list(write_pictures(folder, DISHES[-NUM_DISHES:], PER_DISH, seed=0))

    return shared(tmp_path_factory, "pictures", draw)


@pytest.fixture(scope="session")
def tiny_shards(tmp_path_factory: pytest.TempPathFactory, pictures: Path) -> Path:
    """Return the packed pictures: about 24 to train, 8 to validate and 16 to test."""

    def pack(folder: Path) -> None:
        assert main(["pack", str(pictures), str(folder / "shards"), "--split", "0.5,0.2,0.3"]) == 0

    return shared(tmp_path_factory, "packed", pack) / "shards"


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, tiny_shards: Path) -> Whole:
    """Return a function that gives the uninterrupted run of a rank count and a ZeRO stage.

    Tests compare runs that were stopped, killed, trained on copied shards or hindered with it.
    """

    def get(ranks: int, zero_stage: int) -> Path:
        def run(folder: Path) -> None:
            section = {"max_steps": WHOLE_STEPS, "zero_stage": zero_stage}
            train(write_recipe(folder / "recipe.yaml", tiny_model, tiny_shards, train=section), ranks)

        return shared(tmp_path_factory, f"whole-{ranks}-ranks-zero{zero_stage}", run) / "run"

    return get


@pytest.fixture(scope="session")
def tiny_adapter(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, tiny_shards: Path) -> Path:
    """Return an adapter of the tiny model that answers with dish names, not always with the right ones."""
    return shared(tmp_path_factory, "adapter", partial(_tune, tiny_model, tiny_shards))


def _tune(tiny_model: Path, tiny_shards: Path, folder: Path) -> None:
    data = Data(shards=str(tiny_shards))
    shards = open_split(tiny_shards, "train")
    task = DishTask(data.system, data.prompt, shards.classes)
    collator = StreamingCollator(shards, build_template(str(tiny_model), data), task)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = adapted(tiny_model, dropout=0.0)
        module = AnswerLoss(model, collator.template.pictures)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
        for step in range(20):
            ids = tuple(int(i) for i in plain_order(len(shards)).ids(0, step, 0, 8))
            batch = collator[MicroBatch(step, 0, ids, filler=0)]
            loss, _, _ = module(batch)
            (loss / batch.num_label_tokens).backward()
            optimizer.step()
            optimizer.zero_grad()
    facts = data.model_dump(include={"system", "prompt", "image_size", "max_length"})
    facts |= {"resize": "squash", "quantization": "nf4", "precision": "bf16", "attention": "sdpa"}
    save_adapter(model, folder, facts | {"base": str(tiny_model)})
