"""Floors stand above known silent faults; the pins fit the ranges; pyproject.toml holds what it may."""

import configparser
import re
import tomllib
from pathlib import Path

from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[2]

# The last version with a fault that nothing would report; CHANGELOG.md says what it was.
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


def test_the_tested_pins_lie_in_the_ranges() -> None:
    pinned = pins()
    for requirement in requirements():
        if requirement.name == "torchvision":  # extra [gpu]: no CPU build of it to test with
            continue
        assert requirement.specifier.contains(Version(pinned[requirement.name.lower().replace("_", "-")])), requirement


def test_pyproject_holds_the_build_system_and_lint_rules_only() -> None:
    tree = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert tree.keys() == {"build-system", "tool"}
    assert tree["tool"].keys() == {"ruff"}


def test_each_part_imports_only_from_those_before_it() -> None:
    parts = ("data", "model", "train", "evaluate")
    for number, part in enumerate(parts[:-1]):
        later = re.compile(rf"^\s*(?:from|import) kfood_dist\.(?:{'|'.join(parts[number + 1 :])})\b.*", re.MULTILINE)
        for path in sorted((ROOT / "kfood_dist" / part).rglob("*.py")):
            assert not later.findall(path.read_text(encoding="utf-8")), path
