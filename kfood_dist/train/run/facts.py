"""`run.json`: what actually ran. It is read from the running objects, not from the recipe."""

import json
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from kfood_dist.model.adapters import adapted_modules
from kfood_dist.model.family import family_of
from kfood_dist.model.parts import count_parameters, linear_types
from kfood_dist.system.files import write_atomically
from kfood_dist.system.packages import all_versions
from kfood_dist.train.engine.optim import state_dtypes


def git_commit() -> str | None:
    """Return the commit of the checkout that this package runs from, or None, for example if git is not installed."""
    where = Path(__file__).resolve().parents[3]
    try:
        done = subprocess.run(["git", "-C", str(where), "rev-parse", "HEAD"], capture_output=True, check=False)
    except OSError:
        return None
    return done.stdout.decode("ascii").strip() if done.returncode == 0 else None


def model_facts(model: Any) -> dict[str, Any]:
    """Return facts about a PeftModel: its linear layers by part and type, its adapted modules and parameter counts."""
    trainable, total = count_parameters(model)
    base = model.get_base_model()
    family = family_of(base.config)
    dtypes: dict[str, set[str]] = {part: set() for part in family.paths}
    for name, parameter in base.named_parameters():
        if (part := family.part_of(name)) is not None:
            dtypes[part].add(str(parameter.dtype).removeprefix("torch."))
    return {
        "linear_layers": linear_types(base, family),
        "parameter_dtypes": {part: sorted(names) for part, names in dtypes.items()},
        "adapted_modules": len(adapted_modules(base)),
        "trainable_parameters": trainable,
        "total_parameters": total,
        "trainable_share": trainable / total,
    }


def optimizer_facts(optimizer: Any) -> dict[str, Any]:
    """Return the optimiser's class and the current dtypes of its moments."""
    inner = getattr(optimizer, "optimizer", optimizer)
    return {
        "optimizer": f"{type(inner).__module__}.{type(inner).__qualname__}",
        "optimizer_state_dtypes": state_dtypes(inner),
    }


def machine_facts() -> dict[str, Any]:
    """Return the device that trains, the versions of packages, the commit, and the command that started the run."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"cpu ({platform.machine()})"
    return {"device": device, "versions": all_versions(), "git_commit": git_commit(), "command": sys.argv}


def add_to_run_json(folder: Path, facts: dict[str, Any]) -> None:
    """Add facts to `run.json`. If it cannot be read, write a new one.

    Raises CheckpointError if it cannot be written.
    """
    try:
        known = dict(json.loads((folder / "run.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        known = {}
    write_run_json(folder, {**known, **facts})


def write_run_json(folder: Path, facts: dict[str, Any]) -> None:
    """Write `run.json`. Raises CheckpointError if it cannot be written."""
    write_atomically(folder / "run.json", json.dumps(facts, indent=2, ensure_ascii=False) + "\n")
