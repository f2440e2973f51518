"""What many tests share: a tiny real Qwen2.5-VL, a few drawn pictures, and those pictures packed."""

import signal
from pathlib import Path

import pytest
import torch
from hypothesis import settings
from orders import plain_order

from kfood_dist.cli import main
from kfood_dist.config import Data, Lora
from kfood_dist.data.collate import StreamingCollator
from kfood_dist.data.plan import MicroBatch
from kfood_dist.data.shards import open_split
from kfood_dist.data.template import Template
from kfood_dist.model.adapters import attach_lora, save_adapter
from kfood_dist.model.base import load_config, load_tokenizer, load_vision_spec
from kfood_dist.model.load import load_base
from kfood_dist.model.loss import AnswerLoss
from kfood_dist.practice.pictures import DISHES, write_pictures
from kfood_dist.practice.tiny_model import write_model

# A busy machine is no fault of an example; pytest's own time limit ends what hangs.
# The same examples every time, so that what fails is the change's fault; `--hypothesis-profile=explore` looks for more.
settings.register_profile("kfood", deadline=None, derandomize=True)
settings.register_profile("explore", deadline=None)
settings.load_profile("kfood")

# A suite that was started in the background may have been told to ignore Ctrl-C, and with it all that it starts.
signal.signal(signal.SIGINT, signal.default_int_handler)

# As the ranks that tests fork: threads that wait for each other on a busy machine cost minutes.
torch.set_num_threads(1)

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


@pytest.fixture(scope="session")
def tiny_adapter(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, tiny_shards: Path) -> Path:
    """An adapter of the tiny model that has learned to answer with dish names, if not always the right ones."""
    data = Data(shards=str(tiny_shards))
    vision = load_vision_spec(str(tiny_model), load_config(str(tiny_model)), 224)
    shards = open_split(tiny_shards, "train")
    template = Template(load_tokenizer(str(tiny_model)), vision, data.system, data.prompt, data.max_length)
    collator = StreamingCollator(shards, template)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = attach_lora(load_base(str(tiny_model), "none", "fp32", "sdpa", torch.device("cpu")), Lora(dropout=0.0))
        module = AnswerLoss(model, vision)
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
    folder = tmp_path_factory.mktemp("adapter")
    save_adapter(model, folder, facts | {"base": str(tiny_model)})
    return folder
