"""In every language, the README's commands are those of the scripts, and every file that it names exists."""

import re
from pathlib import Path

import pytest

from kfood_dist.cli import VERBS, build_parser
from kfood_dist.train.resume import CHANGEABLE, CHANGEABLE_UNTIL_EVALUATED

ROOT = Path(__file__).resolve().parents[2]
READMES = ("README.md", "README.ko.md")


def commands(name: str) -> list[str]:
    """Return all commands of a README's bash blocks, without comments."""
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / name).read_text(encoding="utf-8"), flags=re.DOTALL)
    return [line.split("  #")[0].strip() for block in blocks for line in block.splitlines() if line.strip()]


def quickstart_commands() -> list[str]:
    """Return the commands of launch/quickstart.sh with its variables replaced."""
    text = (ROOT / "launch/quickstart.sh").read_text(encoding="utf-8").replace("\\\n", " ")
    variables = {**dict(re.findall(r"^(\w+)=(\S+)$", text, flags=re.MULTILINE))}
    lines = [line for line in text.splitlines() if line.startswith(("bash ", "$kfood "))]
    for _ in range(2):
        lines = [re.sub(r"\$(\w+)", lambda m: variables[m[1]], line) for line in lines]
    return [" ".join(line.split()) for line in lines]


@pytest.mark.parametrize("name", READMES)
def test_the_two_commands_come_first(name: str) -> None:
    assert commands(name)[:2] == ["bash launch/quickstart.sh", "bash launch/test.sh"]


@pytest.mark.parametrize("name", READMES)
def test_the_readme_steps_are_those_of_the_quickstart(name: str) -> None:
    steps = quickstart_commands()
    assert len(steps) == 7
    assert commands(name)[2:9] == steps


def test_both_languages_have_the_same_commands() -> None:
    assert commands("README.md") == commands("README.ko.md")


@pytest.mark.parametrize("name", READMES)
def test_every_named_verb_option_and_file_exists(name: str) -> None:
    for command in commands(name):
        words = command.split()
        for word in words:
            if word == "slurm/site.env":  # a user writes this file
                continue
            if word.startswith(("launch/", "ds_configs/", "slurm/")) or word == "shards/kfood150.tsv":
                assert (ROOT / word).is_file(), command
        if words[0] == ".venv/bin/kfood":
            assert words[1] in VERBS, command
            options = build_parser(words[1])._subparsers._group_actions[0].choices[words[1]]._option_string_actions
            assert all(w in options for w in words if w.startswith("--")), command


def test_every_verb_has_a_help_text(capsys: pytest.CaptureFixture[str]) -> None:
    for verb in VERBS:
        with pytest.raises(SystemExit) as left:
            build_parser(verb).parse_args([verb, "--help"])
        assert left.value.code == 0
        assert len(capsys.readouterr().out.splitlines()) >= 5


def test_the_readme_lists_the_keys_that_may_change_on_resume() -> None:
    section = (ROOT / "README.md").read_text(encoding="utf-8").split("## Resuming")[1].split("\n## ")[0]
    listed = {
        key for key in re.findall(r"`([a-z]+\.[a-z_]+)`", section.split("**What may change**")[1].split("Any other")[0])
    }
    assert listed == CHANGEABLE | CHANGEABLE_UNTIL_EVALUATED


def test_the_targets_of_links_exist() -> None:
    for readme in (*READMES, "ds_configs/README.md", "shards/README.md", "slurm/README.md"):
        folder = (ROOT / readme).parent
        for target in re.findall(r"\]\(([^)#:]+)\)", (ROOT / readme).read_text(encoding="utf-8")):
            assert (folder / target).exists(), f"{readme}: {target}"


def test_the_memory_table_follows_from_the_published_sizes() -> None:
    """The test computes the formula of each row of ds_configs/README.md from hidden size, layers and inner width."""
    text = (ROOT / "ds_configs/README.md").read_text(encoding="utf-8")
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]
    of_row = {row[0]: row[2:] for row in rows if len(row) == 6}
    needs = {(row[0], row[1]): int(row[2].split()[0]) for row in rows if len(row) == 5 and row[2].endswith(" GB")}
    key_values = {"3B": 256, "7B": 512, "32B": 1024, "72B": 1024}  # width of keys and of values: heads × head size
    for column, (model, of_keys) in enumerate(key_values.items()):
        sizes = re.findall(r"\d+", of_row["hidden × layers, inner width"][column])
        hidden, layers, inner = map(int, sizes)
        table = {name: float(cells[column]) for name, cells in of_row.items() if re.fullmatch(r"[\d.]+", cells[column])}
        linear = layers * (2 * hidden * hidden + 2 * hidden * of_keys + 3 * hidden * inner) / 1e9
        assert table["L"] == pytest.approx(linear, abs=0.001)
        rank = 16 * layers * (4 * hidden + 2 * (hidden + of_keys) + 3 * (hidden + inner)) / 1e6
        assert table["A"] == pytest.approx(rank, abs=0.5)
        others = table["E"] + table["V"]
        exact = {
            "weights, 4-bit": 0.516 * linear + 2 * others,
            "weights, bf16": 2 * (linear + others),
            "adapters": 14 * rank / 1e3,
            "activations": 2000 * (2 * hidden * layers + 4 * (10 * hidden + 5 * inner)) / 1e9,
            "unpacking": 4 * hidden * inner / 1e9,
        }
        for name, value in exact.items():
            assert table[name] == pytest.approx(value, abs=0.0501), (model, name)
        shared = exact["adapters"] + exact["activations"] + table["the rest"]
        assert needs[model, "4-bit"] == pytest.approx(exact["weights, 4-bit"] + exact["unpacking"] + shared, abs=0.55)
        assert needs[model, "bf16 LoRA"] == pytest.approx(exact["weights, bf16"] + shared, abs=0.55)
