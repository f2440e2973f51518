"""The peers as contenders: a script of tests/bench/peers in an environment of its own, and its result."""

import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path

from kfood_dist.config.recipe import load_recipe
from kfood_dist.system.words import plural
from training.environments import Environment, EnvironmentFailed, make
from training.job import Job, Measured, Start
from training.materials import SHIPPED

SCRIPTS = Path(__file__).resolve().parents[1] / "peers"


@dataclass(frozen=True)
class Way:
    """The settings of a peer that do not change what it learns."""

    recompute: bool
    batch: int = 0  # samples per micro-step; 0: the global batch
    workers: int = 0  # loader processes

    def __str__(self) -> str:
        return f"batch {self.batch}, {plural(self.workers, 'worker')}"


@dataclass(frozen=True)
class Peer:
    """Another trainer. If it is `tuned`, the benchmark looks for its fastest batch and workers before the rounds.

    `compared_with` is the contender of ours that weighs the label tokens as this peer does.
    """

    name: str
    title: str
    script: str
    environment: Environment
    way: Way
    tuned: bool = False
    compared_with: str = "ours"

    def threads_used(self, available: int) -> int:
        return available

    def fitted(self, global_batch: int) -> "Peer":
        """Return this peer with a number for its batch."""
        return replace(self, way=replace(self.way, batch=self.way.batch or global_batch))

    def candidates(self, global_batch: int) -> Iterator["Peer"]:
        """Yield this peer with each micro-batch size to try: the global batch and its half and quarter."""
        for parts in (1, 2, 4):
            if global_batch % parts == 0:
                yield replace(self, way=replace(self.way, batch=global_batch // parts))

    def with_workers(self) -> Iterator["Peer"]:
        """Yield this peer with each number of loader processes to try, besides its own."""
        for workers in (1, 2):
            yield replace(self, way=replace(self.way, workers=workers))

    def start(self, job: Job) -> Start:
        """Write the settings of the run, and return its command. Raises EnvironmentFailed if it cannot be installed."""
        python = _made(self.environment, job.environments)
        if isinstance(python, EnvironmentFailed):
            raise python
        settings = job.folder / "settings.json"
        settings.write_text(json.dumps(self._settings(job), ensure_ascii=False, indent=1), encoding="utf-8")
        kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        variables = {"OMP_NUM_THREADS": str(job.threads), "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
        return Start([str(python), str(SCRIPTS / self.script), str(settings)], kept | variables)

    def _settings(self, job: Job) -> dict[str, object]:
        shared = job.materials
        recipe = load_recipe(SHIPPED)
        names = "|".join(recipe.lora.target_modules)
        return {
            "model": str(shared.model),
            "rows": str(shared.rows),
            "out": str(job.folder / "result.json"),
            "steps": job.steps,
            "batch": self.way.batch,
            "accumulation": shared.global_batch // self.way.batch,
            "workers": self.way.workers,
            "recompute": self.way.recompute,
            "dropout": recipe.lora.dropout if job.dropout is None else job.dropout,
            "r": recipe.lora.r,
            "alpha": recipe.lora.alpha,
            "target_modules": rf"model\.language_model\.layers\.\d+\.\w+\.({names})",
            "learning_rate": shared.learning_rate,
            "max_grad_norm": recipe.optim.max_grad_norm,
            "seed": recipe.train.seed,
            "system": shared.system,
            "prompt": shared.prompt,
        }

    def read(self, job: Job) -> Measured:
        """Read the result of a finished run, and compare its tokens with those of our template."""
        result = json.loads((job.folder / "result.json").read_text(encoding="utf-8"))
        steps = result["steps"]
        expected = [asdict(step)["digest"] for step in job.materials.steps[: len(steps)]]
        slots = sum(step["num_slots"] for step in steps)
        return Measured(
            step_ends=result["step_ends"],
            losses=result["losses"],
            num_label_tokens=[step["num_label_tokens"] for step in steps],
            padding_share=1 - sum(step["num_tokens"] for step in steps) / slots,
            same_tokens=[step["digest"] for step in steps] == expected,
            facts={name: result[name] for name in ("num_trained", "trained_dtypes", "threads")},
        )


@cache  # also a failure, so that it is not tried again for the next run
def _made(environment: Environment, folder: Path) -> Path | EnvironmentFailed:
    try:
        return make(environment, folder)
    except EnvironmentFailed as error:
        return error
