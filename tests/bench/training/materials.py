"""What all contenders share: the model folder, the packed pictures, and the samples in the order of our plan.

    scaled_model ──► KEEP/model
    practice pictures ──► kfood pack ──► KEEP/shards, 224 px
    recipe, plan ──► the samples of each step ──► KEEP/pictures/ID.jpg (the packed bytes) and rows of a JSONL file

Always holds: a peer reads the same JPEG bytes, question and answer as our trainer, in the same order. `Step` has the
tokens that our template makes of them, so a peer's tokens can be compared.
"""

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from kfood_dist.config.recipe import load_recipe
from kfood_dist.data.plan.plan import refit_batch
from training.scaled_model import write_scaled_model

ROOT = Path(__file__).resolve().parents[3]
SHIPPED = ROOT / "launch/recipes/qwen2.5-vl-3b.yaml"
PER_CLASS = 40  # 400 practice pictures


@dataclass(frozen=True)
class Step:
    """The tokens of one optimiser step. `digest` is a SHA-256 over every sample's input ids and label ids, in order."""

    num_label_tokens: int
    num_tokens: int
    digest: str


@dataclass(frozen=True)
class Materials:
    """The shared inputs of all contenders. `steps` and `rows` are those of the longest run."""

    model: Path
    shards: Path
    rows: Path  # JSONL: image, answer
    global_batch: int
    learning_rate: float
    system: str
    prompt: str
    steps: tuple[Step, ...]

    def recipe(self, run_dir: Path, steps: int, ranks: int = 1) -> dict[str, Any]:
        """Return the shipped recipe with these inputs. Everything else stays as shipped.

        The loader has one worker instead of four, because the machine has few cores. The micro-batch is smaller if the
        global batch does not hold the shipped one.
        """
        micro_batch, _ = refit_batch(self.global_batch, load_recipe(SHIPPED).train.micro_batch_size, ranks)
        return {
            "extends": str(SHIPPED),
            "data": {"shards": str(self.shards), "num_workers": 1},
            "model": {"base": str(self.model)},
            "optim": {"learning_rate": self.learning_rate, "schedule": "constant", "warmup_ratio": 0.0},
            "train": {
                "micro_batch_size": micro_batch,
                "global_batch_size": self.global_batch,
                "max_steps": steps,
                "save_every_steps": 10**6,
            },
            "eval": {"every_steps": None},
            "run": {"dir": str(run_dir)},
        }


def prepare(keep: Path, global_batch: int, num_steps: int, learning_rate: float) -> Materials:
    """Make the shared inputs in `keep`, or use those that are there."""
    model, shards = keep / "model", keep / "shards"
    if not (model / "preprocessor_config.json").exists():  # written last
        write_scaled_model(model)
    if not (shards / "manifest.json").exists():
        _draw_and_pack(keep / "images", shards)
    return _export(keep, model, shards, global_batch, num_steps, learning_rate)


def _draw_and_pack(images: Path, shards: Path) -> None:
    from kfood_dist.practice.pictures import DISHES, write_pictures

    if not images.exists():
        for _ in write_pictures(images, DISHES, PER_CLASS, 0):
            pass
    command = [sys.executable, "-m", "kfood_dist", "pack", str(images), str(shards)]
    command += ["--classes", str(ROOT / "shards/kfood150.tsv"), "--split", "0.98,0.01,0.01", "--image-size", "224"]
    subprocess.run(command, check=True, env=os.environ | {"PYTHONPATH": str(ROOT)})


def _export(
    keep: Path, model: Path, shards: Path, global_batch: int, num_steps: int, learning_rate: float
) -> Materials:
    """Write the rows of `num_steps` steps for the peers, and count what our template makes of them."""
    from kfood_dist.data.batch.template import Template
    from kfood_dist.data.mix import open_mixture
    from kfood_dist.data.picture.images import decode_rgb
    from kfood_dist.data.task.table import build_task
    from kfood_dist.model.processor import build_template
    from kfood_dist.train.preflight import preflight

    rows_file = keep / "rows.jsonl"
    made = Materials(model, shards, rows_file, global_batch, learning_rate, "", "", ())
    recipe_file = keep / "order.yaml"
    recipe_file.write_text(yaml.safe_dump(made.recipe(keep / "order", num_steps), allow_unicode=True), encoding="utf-8")
    recipe = load_recipe(recipe_file)
    plan, data = preflight(recipe, world_size=1), recipe.data
    samples = open_mixture(data, "train")
    template: Template = build_template(str(model), data)
    task = build_task(data.task, data.system, data.prompt, samples.classes)
    (keep / "pictures").mkdir(exist_ok=True)
    rows, steps = [], []
    for step in range(num_steps):
        encoded = []
        for i in plan.ids(step).tolist():
            sample = samples.read(i)
            picture = keep / "pictures" / f"{i:06d}.jpg"
            picture.write_bytes(sample.pictures[0])
            rows.append({"image": str(picture), "answer": task.answer(sample.columns)})
            ids = [template.pictures.encode(decode_rgb(jpeg)).ids for jpeg in sample.pictures]
            made_of_it = template.encode(task.messages(sample.columns, 1), ids, rows[-1]["answer"])
            encoded.append((made_of_it.ids.tolist(), made_of_it.labels[made_of_it.labels >= 0].tolist()))
        steps.append(_count(encoded))
    rows_file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return Materials(model, shards, rows_file, global_batch, learning_rate, data.system, data.prompt, tuple(steps))


def _count(encoded: Sequence[tuple[list[int], list[int]]]) -> Step:
    digest = hashlib.sha256(json.dumps(encoded).encode()).hexdigest()
    return Step(sum(len(labels) for _, labels in encoded), sum(len(ids) for ids, _ in encoded), digest)
