"""Our trainer as a contender: launch/train.sh with the shipped recipe, and the metrics that it writes."""

import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from training.job import Job, Measured, Start

ROOT = Path(__file__).resolve().parents[3]


@dataclass(frozen=True)
class Ours:
    """Our trainer. A lever is an override of the recipe (`sets`, as for --set) or a variable of the environment.

    `threads` is of each rank. None takes that of the job, for all ranks together.
    """

    name: str
    title: str
    sets: Sequence[str] = ()
    variables: Mapping[str, str] = field(default_factory=dict)
    ranks: int = 1
    threads: int | None = None

    def threads_used(self, available: int) -> int:
        """Return the threads of all ranks together."""
        return self.ranks * self.threads if self.threads else available

    def start(self, job: Job) -> Start:
        """Write the recipe of the run, and return its command: what a user would run."""
        tree = job.materials.recipe(job.folder / "run", job.steps, self.ranks)
        recipe = job.folder / "recipe.yaml"
        recipe.write_text(yaml.safe_dump(tree, allow_unicode=True), encoding="utf-8")
        sets = [*self.sets, *([] if job.dropout is None else [f"lora.dropout={job.dropout}"])]
        command = ["bash", str(ROOT / "launch/train.sh"), str(recipe), "--processes", str(self.ranks)]
        command += [word for text in sets for word in ("--set", text)]
        variables = {
            "KFOOD_VENV": sys.prefix,
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": str(self.threads or max(1, job.threads // self.ranks)),
            **self.variables,
        }
        return Start(command, os.environ | variables)

    def read(self, job: Job) -> Measured:
        """Read the metrics of a finished run."""
        lines = (job.folder / "run/metrics.jsonl").read_text(encoding="utf-8").splitlines()
        rows = [json.loads(line) for line in lines]
        facts = json.loads((job.folder / "run/run.json").read_text(encoding="utf-8"))
        return Measured(
            step_ends=[row["time"] for row in rows],
            losses=[row["loss"] for row in rows],
            num_label_tokens=[round(row["label_tokens_per_second"] * row["step_seconds"]) for row in rows],
            padding_share=sum(row["padding_share"] for row in rows) / len(rows),
            same_tokens=None,
            facts={name: facts.get(name) for name in ("trainable_parameters", "zero_stage", "optimizer")},
        )
