"""Python environments for the peers: one folder each, with the versions of launch/constraints.txt.

    packages ──► python -m venv ──► pip install ──► without torchvision ──► stamp: complete, and for which packages

Always holds: no peer enters the environment of this project. A complete environment is used again. A failed one is made
again by the next run.
"""

import hashlib
import importlib.util
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
CONSTRAINTS = ROOT / "launch/constraints.txt"
STAMP = "complete.txt"
# What every peer trains with: the versions are those of this project.
COMMON = ("torch", "transformers", "accelerate", "peft", "bitsandbytes", "pillow", "numpy", "safetensors")
INSTALL_TIMEOUT_S = 1800


class EnvironmentFailed(Exception):
    """An environment that cannot be installed. The text says why, in one line."""


@dataclass(frozen=True)
class Environment:
    """The packages of a peer, besides COMMON, and the module that must import."""

    name: str
    packages: tuple[str, ...]
    module: str


HUGGING_FACE = Environment("huggingface", ("trl==1.16.0", "datasets"), "trl")
SWIFT = Environment("ms-swift", ("ms-swift==4.6.0",), "swift")
LLAMA_FACTORY = Environment("llama-factory", ("llamafactory==0.9.5",), "llamafactory")


def make(environment: Environment, cache: Path) -> Path:
    """Return the Python of the environment under `cache`. Makes the environment if it is missing or outdated.

    Raises EnvironmentFailed if the packages do not fit the constraints, or if the peer cannot be imported.
    """
    folder = cache / environment.name
    python, stamp = folder / "bin/python", folder / STAMP
    wanted = hashlib.sha256(repr(environment).encode() + CONSTRAINTS.read_bytes()).hexdigest()
    if stamp.is_file() and stamp.read_text() == wanted:
        return python
    print(f"making the environment {environment.name} in {folder}", flush=True)
    _run(sys.executable, "-m", "venv", "--clear", str(folder))
    pip = (str(python), "-m", "pip")
    _run(*pip, *_install(environment))
    if importlib.util.find_spec("torchvision") is None:
        # A torchvision for another build of torch breaks every import of a model. All train without it, as here.
        _run(*pip, "uninstall", "--yes", "--quiet", "torchvision")
    _run(str(python), "-c", f"import torch, transformers, peft, bitsandbytes, {environment.module}")
    stamp.write_text(wanted)
    return python


def why_absent(environment: Environment, cache: Path) -> str:
    """Return why a trainer without a script in tests/bench/peers is absent. Resolves its packages, installs none."""
    folder = cache / environment.name
    try:
        _run(sys.executable, "-m", "venv", "--clear", str(folder))
        _run(str(folder / "bin/python"), "-m", "pip", *_install(environment), "--dry-run")
    except EnvironmentFailed as error:
        return f"{environment.packages[0]} does not fit the versions of launch/constraints.txt: {error}"
    return f"{environment.packages[0]} can be installed, but tests/bench/peers has no script for it"


def _install(environment: Environment) -> tuple[str, ...]:
    return ("install", "--constraint", str(CONSTRAINTS), *COMMON, *environment.packages)


def versions(python: Path) -> dict[str, str]:
    """Return the version of every package of an environment."""
    listed = json.loads(_run(str(python), "-m", "pip", "list", "--format", "json"))
    return {package["name"]: package["version"] for package in listed}


def _run(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=INSTALL_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        raise EnvironmentFailed(f"not installed within {INSTALL_TIMEOUT_S} s") from None
    if done.returncode:
        raise EnvironmentFailed(_reason(done.stdout + done.stderr))
    return done.stdout


def _reason(output: str) -> str:
    """Return what pip says of a conflict of versions, else its errors, else its last line."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    _, _, after = output.partition("The conflict is caused by:")
    conflict = [line.strip() for line in after.splitlines() if " depends on " in line or "The user requested" in line]
    errors = [line for line in lines if line.startswith("ERROR")]
    return "; ".join(conflict or errors or lines[-1:] or ["it gave no reason"])[:400]
