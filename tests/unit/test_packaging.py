"""Version ranges exclude known silent faults, the pins fit them, and pyproject.toml holds only build and lint rules."""

import configparser
import re
import tomllib
from pathlib import Path

from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[2]

# The last version of each package with a fault that nothing would report. CHANGELOG.md describes the faults.
FAULTY = {"transformers": "5.5.3", "deepspeed": "0.19.2", "bitsandbytes": "0.49.9", "webdataset": "0.2.111"}


def requirements() -> list[Requirement]:
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg", encoding="utf-8")
    lists = [setup["options"]["install_requires"], *setup["options.extras_require"].values()]
    lines = (line.strip() for text in lists for line in text.splitlines())
    return [Requirement(line) for line in lines if line and not line.startswith("#")]


def pins() -> dict[str, str]:
    lines = (ROOT / "launch/constraints.txt").read_text(encoding="utf-8").splitlines()
    pairs = (line.split("==") for line in lines if "==" in line)
    return {name.lower().replace("_", "-"): version for name, version in pairs}


def test_faulty_versions_are_refused() -> None:
    ranges = {r.name: r.specifier for r in requirements()}
    for name, version in FAULTY.items():
        assert not ranges[name].contains(version), name


def test_every_runtime_dependency_has_a_floor_and_a_ceiling() -> None:
    for requirement in requirements():
        if requirement.name.startswith("types-"):
            continue
        operators = {specifier.operator for specifier in requirement.specifier}
        assert {">=", "<"} <= operators, requirement


def test_the_tested_pins_are_in_the_ranges() -> None:
    pinned = pins()
    for requirement in requirements():
        if requirement.name == "torchvision":  # extra [gpu]: the tests have no CPU build of it
            continue
        assert requirement.specifier.contains(Version(pinned[requirement.name.lower().replace("_", "-")])), requirement


def test_pyproject_holds_only_the_build_system_and_lint_rules() -> None:
    tree = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert tree.keys() == {"build-system", "tool"}
    assert tree["tool"].keys() == {"ruff"}


def test_imports_run_one_way() -> None:
    """Each part imports only from parts before it in this list. `practice` has the level of `config`."""
    below = (("errors",), ("system",), ("config",), ("data",), ("pack", "model"), ("estimate",))
    floors = (*below, ("train", "evaluate"), ("doctor",), ("launch",), ("cli",), ("__main__",))
    floor_of = {part: number for number, floor in enumerate(floors) for part in floor}
    floor_of["practice"] = floor_of["config"]
    package = ROOT / "kfood_dist"
    assert {path.name.removesuffix(".py") for path in package.iterdir()} - {"__init__", "__pycache__"} == set(floor_of)
    for path in sorted(package.rglob("*.py")):
        part = path.relative_to(package).parts[0].removesuffix(".py")
        for name in re.findall(r"^\s*from kfood_dist\.(\w+)", path.read_text(encoding="utf-8"), re.MULTILINE):
            if name != part:
                assert floor_of[name] < floor_of[part], f"{path} imports {name}"
