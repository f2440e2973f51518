"""The second row of each table: another family, task, trained part and loss, and two pictures in one sample.

Each follows the loss curve of a plain PyTorch loop: in one process, in two with DDP, and with ZeRO. Each run ends with
an adapter that the evaluation can load.
"""

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from asking import model_inputs
from bases import write_llava
from plain import plain_losses
from running import metrics, train, write_recipe
from safetensors.torch import load_file
from sweep import swept
from transformers import AutoModelForImageTextToText

from kfood_dist.cli import main
from kfood_dist.config.recipe import load_recipe
from kfood_dist.config.sections import Parts
from kfood_dist.data.batch.collate import StreamingCollator
from kfood_dist.data.mix import open_mixture
from kfood_dist.data.plan.plan import MicroBatch
from kfood_dist.data.shards.reader import open_split
from kfood_dist.data.task.table import build_task
from kfood_dist.model.adapters import load_adapter
from kfood_dist.model.load import load_base
from kfood_dist.model.parts import apply_parts
from kfood_dist.model.processor import build_template

STEPS = 8
NEAR = 1e-5  # relative difference, in float32 with float32 moments, because roundings do not spread there
# ZeRO stage, ranks, accumulation
WAYS = {"one-rank": (0, 1, 4), "ddp": (0, 2, 2), "zero2": (2, 2, 2), "zero3": (3, 2, 2)}


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llava")
    write_llava(folder)
    return folder


def rows(pictures: Path) -> Iterator[dict[str, Any]]:
    """Yield two questions about each drawn picture, and one about each picture paired with one of the other half."""
    paths = sorted(path.relative_to(pictures).as_posix() for path in pictures.rglob("Img_*"))
    for path in paths:
        category, dish = path.split("/")[-3:-1]
        yield {"images": [path], "question": "이 음식의 이름은 무엇인가요?", "answer": dish}
        yield {"images": [path], "question": "어떤 종류인가요?", "answer": category}
    for one, other in zip(paths[: len(paths) // 2], paths[len(paths) // 2 :], strict=True):
        same = "예" if one.split("/")[-2] == other.split("/")[-2] else "아니요"
        yield {"images": [one, other], "question": "두 사진의 음식이 같은가요?", "answer": same}


@pytest.fixture(scope="module")
def questions(tmp_path_factory: pytest.TempPathFactory, pictures: Path) -> Path:
    """Return shards of those questions, packed from JSONL. A CSV of the same rows must pack to the same bytes."""
    folder = tmp_path_factory.mktemp("questions")
    listed = list(rows(pictures))
    lines = [json.dumps(row, ensure_ascii=False) for row in listed]
    (folder / "list.jsonl").write_text("\n".join(lines), encoding="utf-8")
    with (folder / "list.csv").open("w", encoding="utf-8", newline="") as file:
        table = csv.writer(file)
        table.writerow(["image_path", "question", "answer"])
        table.writerows(["|".join(row["images"]), row["question"], row["answer"]] for row in listed)
    for name in ("list.jsonl", "list.csv"):
        out = folder / name.replace(".", "-")
        words = ["pack", str(folder / name), str(out), "--image-root", str(pictures), "--split", "0.6,0.2,0.2"]
        assert main(words) == 0
    tars = [sorted((folder / name).glob("*.tar")) for name in ("list-jsonl", "list-csv")]
    assert [path.read_bytes() for path in tars[0]] == [path.read_bytes() for path in tars[1]]
    return folder / "list-jsonl"


class Rows:
    """The recipes of each row and their runs. Each run is made when it is first needed."""

    def __init__(self, folder: Path, model: Path, llava: Path, dishes: Path, questions: Path):
        whole = {"connector": {"train": "full", "learning_rate": 5e-4}}
        self.folder = folder
        self.of_row: dict[str, tuple[Path, Path, dict[str, Any]]] = {
            "llava": (llava, dishes, {}),
            "question": (model, questions, {"data": {"task": "question"}}),
            "connector": (model, dishes, {"parts": whole, "lora": {"r": 8}}),
            "llava connector": (llava, questions, {"parts": whole, "data": {"task": "question"}}),
            "mean": (model, dishes, {"objective": {"name": "answer_mean"}}),
        }
        self._plain: dict[str, list[float]] = {}

    def recipe(self, row: str, way: str, name: str = "") -> Path:
        stage, _, accumulation = WAYS[way]
        model, shards, sections = self.of_row[row]
        folder = self.folder / f"{row}-{way}{name}"
        folder.mkdir(exist_ok=True)
        section = {"zero_stage": stage, "gradient_accumulation_steps": accumulation, "max_steps": STEPS}
        sections = {**sections, "lora": {"dropout": 0.0, **sections.get("lora", {})}, "train": section}
        sections |= {"model": {"precision": "fp32"}, "optim": {"name": "adamw", "learning_rate": 1e-3}}
        return write_recipe(folder / "recipe.yaml", model, shards, **sections)

    def run(self, row: str, way: str) -> Path:
        recipe = self.recipe(row, way)
        if not (recipe.parent / "run" / "adapter").exists():
            train(recipe, WAYS[way][1])
        return recipe.parent / "run"

    def plain(self, row: str) -> list[float]:
        if row not in self._plain:
            self._plain[row] = plain_losses(self.recipe(row, "one-rank"))
        return self._plain[row]


@pytest.fixture(scope="module")
def table(tmp_path_factory, tiny_model: Path, llava: Path, tiny_shards: Path, questions: Path) -> Rows:
    return Rows(tmp_path_factory.mktemp("rows"), tiny_model, llava, tiny_shards, questions)


def apart(mine: list[float], plain: list[float]) -> float:
    """Return the largest relative difference between two curves."""
    return max(abs(a / b - 1) for a, b in zip(mine, plain, strict=True))


NAMES = ("llava", "question", "connector", "llava connector", "mean")
ALL = [(row, way) for row in NAMES for way in WAYS]
CASES = [("llava", "zero2"), ("question", "zero2"), ("connector", "zero2"), ("connector", "zero3")]
CASES += [("llava connector", "ddp"), ("mean", "one-rank")]


@pytest.mark.parametrize(("row", "way"), [*CASES, *swept(case for case in ALL if case not in CASES)])
def test_the_loss_curve_equals_that_of_plain_pytorch(table: Rows, row: str, way: str) -> None:
    mine, plain = [step["loss"] for step in metrics(table.run(row, way))], table.plain(row)
    assert plain[-1] < 0.9 * plain[0]
    print(f"{row} {way}: at most {apart(mine, plain):.1e}")
    assert apart(mine, plain) < NEAR


@pytest.mark.parametrize(("row", "way"), [("llava", "zero2"), ("question", "zero2"), ("connector", "zero3")])
def test_the_evaluation_loads_the_adapter(table: Rows, row: str, way: str, tmp_path: Path) -> None:
    run, (model, shards, _) = table.run(row, way), table.of_row[row]
    words = ["--shards", str(shards), "--model", str(model), "--adapter", str(run / "adapter"), "--split", "test"]
    assert main(["eval", *words, "--out", str(tmp_path)]) == 0
    records = [json.loads(line) for line in (tmp_path / "predictions.jsonl").read_text().splitlines()]
    samples = open_split(shards, "test")
    column = "answer" if row == "question" else "label"
    assert [r["label"] for r in records] == [samples.read(i).columns[column] for i in range(len(samples))]
    assert all(record["correct"] == (record["prediction"] == record["label"]) for record in records)
    if row == "question":
        assert 2 in {len(samples.read(i).pictures) for i in range(len(samples))}


@pytest.mark.parametrize(("row", "before", "after"), [("connector", "zero2", "one-rank"), ("llava", "zero3", "ddp")])
def test_a_run_resumes_with_another_engine_and_rank_count(table: Rows, row: str, before: str, after: str) -> None:
    """Each engine takes half of the steps. The rate is constant, because a longer run would stretch its decay."""
    recipe = table.recipe(row, before, name="-halved")
    stage, ranks, accumulation = WAYS[after]
    constant = "optim.schedule=constant"
    train(recipe, WAYS[before][1], [constant, f"train.max_steps={STEPS // 2}"])
    resumed = [f"train.zero_stage={stage}", f"train.gradient_accumulation_steps={accumulation}"]
    assert f"resumed after step {STEPS // 2}" in train(recipe, ranks, [constant, *resumed])
    whole = table.recipe(row, before, name="-whole")
    train(whole, WAYS[before][1], [constant])
    mine, other = ([step["loss"] for step in metrics(r.parent / "run")] for r in (recipe, whole))
    assert apart(mine, other) < NEAR


@pytest.mark.parametrize("way", ["zero3", *swept(["zero2", "ddp"])])
def test_a_run_starts_from_a_connector_trained_in_full(table: Rows, way: str) -> None:
    """The first loss is that of one process, under every engine."""
    adapter = table.run("connector", "zero2") / "adapter"
    start = [f"model.adapter={adapter}", "train.max_steps=1"]
    first = []
    for engine in ("one-rank", way):
        recipe = table.recipe("connector", engine, name="-started")
        assert f"starts from the adapter {adapter}, task dish, step {STEPS}" in train(recipe, WAYS[engine][1], start)
        first += [step["loss"] for step in metrics(recipe.parent / "run")]
    assert apart(first[1:], first[:1]) < NEAR
    assert first[0] < 0.9 * table.plain("connector")[0]


@pytest.mark.parametrize(("row", "way"), [("connector", "zero3"), ("llava connector", "ddp")])
def test_plain_peft_loads_a_fully_trained_connector(table: Rows, row: str, way: str) -> None:
    from peft import PeftModel

    recipe = load_recipe(table.recipe(row, way))
    adapter, base = table.run(row, way) / "adapter", recipe.model.base
    names = set(load_file(adapter / "adapter_model.safetensors"))
    whole = {name for name in names if ".lora_" not in name}
    assert whole and all(".merger." in name or ".multi_modal_projector." in name for name in whole)

    samples = open_mixture(recipe.data, "train")
    template = build_template(base, recipe.data)
    task = build_task(recipe.data.task, recipe.data.system, recipe.data.prompt, samples.classes)
    batch = StreamingCollator(samples, template, task)[MicroBatch(0, 0, (0, 1), 0)]
    inputs = model_inputs(batch, template.pictures)

    def logits(model: Any) -> torch.Tensor:
        with torch.no_grad():
            return model.eval()(**inputs).logits

    fresh = AutoModelForImageTextToText.from_pretrained(base, dtype=torch.float32)
    untrained = logits(fresh)
    plain = logits(PeftModel.from_pretrained(fresh, adapter))
    loaded = load_base(base, "none", "fp32", "sdpa", torch.device("cpu"))
    ours = apply_parts(loaded, recipe.parts, recipe.lora)
    load_adapter(ours, adapter)
    assert torch.allclose(plain, logits(ours), atol=1e-5)
    lora_alone = apply_parts(load_base(base, "none", "fp32", "sdpa", torch.device("cpu")), Parts(), recipe.lora)
    load_lora(lora_alone, adapter)
    assert (plain - logits(lora_alone)).abs().max() > 1e-3, "the connector's weights must change the logits"
    assert (plain - untrained).abs().max() > 1e-2


def load_lora(model: Any, adapter: Path) -> None:
    from peft import set_peft_model_state_dict

    weights = load_file(adapter / "adapter_model.safetensors")
    set_peft_model_state_dict(model, {name: weight for name, weight in weights.items() if ".lora_" in name})
