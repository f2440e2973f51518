"""`kfood predict` gives the same answers as `kfood eval`, from the pictures as they were before packing."""

import json
import re
import shutil
from collections import defaultdict
from pathlib import Path

import pytest
from test_evaluate import EXACT, likelihood, load, micro_batch, read

from kfood_dist.cli import main
from kfood_dist.data.task.dish import clean
from kfood_dist.evaluate.generate import Answer
from kfood_dist.evaluate.predict import name_dish, rank_names

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def words(tiny_model: Path, tiny_adapter: Path) -> list[str]:
    return ["--model", str(tiny_model), "--adapter", str(tiny_adapter)]


def lines(capsys: pytest.CaptureFixture[str]) -> list[dict]:
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_a_picture_file_gets_the_answer_of_its_packed_picture(words, tiny_shards, pictures, tmp_path, capsys):
    """In float32, a batch of one sample and a batch of many are rounded in the same way."""
    out = tmp_path / "out"
    asked = ["eval", "--shards", str(tiny_shards), "--out", str(out), "--limit", "6", *words, *EXACT]
    assert main(asked) == 0
    _, records = read(out)
    capsys.readouterr()
    files = [str(pictures / record["source"]) for record in records]
    assert main(["predict", *files, *words, *EXACT, "--alternatives", "0"]) == 0
    found = lines(capsys)
    assert [line["image"] for line in found] == files
    assert [line["name"] for line in found] == [record["prediction"] for record in records]
    assert [line["confidence"] for line in found] == pytest.approx([r["confidence"] for r in records], rel=1e-3)
    assert all(set(line) == {"image", "name", "confidence", "alternatives"} for line in found)


def test_alternatives_carry_the_probability_of_their_text(words, tiny_shards, tmp_path):
    """Compare each text that the beam search finds with the training loss of the same text."""
    asked = ["eval", "--shards", str(tiny_shards), "--out", str(tmp_path / "out"), *words, *EXACT]
    task, answerer, collator = load(asked)
    checked = 0
    for i in range(3):
        beams = answerer.alternatives(collator[micro_batch(i)], num_beams=4)
        assert [b.confidence for b in beams] == sorted((b.confidence for b in beams), reverse=True)
        assert len({b.text for b in beams}) == 4
        for beam in beams:
            if beam.confidence > 1e-3:
                assert beam.confidence == pytest.approx(likelihood(task, answerer, i, beam.text), rel=1e-2)
                checked += 1
    assert checked >= 6


def test_alternatives_are_other_names_likeliest_first(words, pictures, capsys):
    file = str(next(pictures.rglob("Img_*")))
    assert main(["predict", file, *words, "--alternatives", "3"]) == 0
    (line,) = lines(capsys)
    others = [other["name"] for other in line["alternatives"]]
    assert 1 <= len(others) <= 3
    assert line["name"] not in others and len(set(others)) == len(others)
    likely = [row["confidence"] for row in (line, *line["alternatives"])]
    assert likely == sorted(likely, reverse=True)
    assert all(clean(name) == name for name in others)
    assert main(["predict", file, *words, "--alternatives", "0"]) == 0
    assert lines(capsys)[0]["alternatives"] == []


def ranked(greedy: Answer, *found: Answer) -> list[tuple[str, float]]:
    return [(row["name"], row["confidence"]) for row in rank_names(greedy, found)]


def block_of(readme: str) -> str:
    """Return the Python code that a README shows."""
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / readme).read_text(encoding="utf-8"), flags=re.DOTALL)
    return code


def test_the_code_of_the_readme_gives_the_name_that_predict_gives(tiny_model, tiny_adapter, pictures, words, capsys):
    code = block_of("README.md")
    assert code == block_of("README.ko.md") and "kfood_dist" not in code and "torchvision" not in code
    files = [str(path) for path in sorted(pictures.rglob("Img_*"))[:6:2]]
    assert main(["predict", *files, *words]) == 0
    message = [line["name"] for line in lines(capsys)]
    assert len(set(message)) > 1
    for file, name in zip(files, message, strict=True):
        named = f"base, adapter, photo = {str(tiny_model)!r}, {str(tiny_adapter)!r}, {file!r}"
        theirs, replaced = re.subn(r"^base, adapter, photo = .*$", named, code, flags=re.MULTILINE)
        assert replaced == 1
        exec(compile(theirs, "README.md", "exec"), {})
        assert clean(capsys.readouterr().out) == name


def test_the_probabilities_of_texts_with_one_name_add_up():
    answers = [Answer("김밥", 0.5), Answer("파전", 0.2), Answer("파 전", 0.1), Answer("만두국", 0.25), Answer("", 0.1)]
    assert ranked(answers[0], *answers) == [("김밥", 0.5), ("파전", 0.3), ("만두국", 0.25)]


def test_the_name_is_the_likeliest_of_all_that_were_scored():
    greedy = Answer("김밥", 0.3)
    assert ranked(greedy, Answer("파전", 0.4), greedy)[0] == ("파전", 0.4)
    assert ranked(greedy, Answer("파전", 0.2), Answer("파 전", 0.2))[0] == ("파전", 0.4)
    assert ranked(greedy, Answer("김밥", 0.29), Answer("파전", 0.25)) == [("김밥", 0.3), ("파전", 0.25)]
    assert ranked(greedy, Answer("파전", 0.3)) == [("김밥", 0.3), ("파전", 0.3)]
    assert ranked(Answer("", 0.9), Answer("파전", 0.1)) == [("", 0.9), ("파전", 0.1)]
    assert ranked(Answer("", 0.1), Answer("파전", 0.4)) == [("파전", 0.4)]
    assert ranked(Answer("", 0.9)) == [("", 0.9)]


class Scored:
    """An answerer whose greedy search gives a less likely name than its beam search."""

    def answer(self, batch):
        return [Answer("김밥", 0.3)]

    def alternatives(self, batch, num_beams):
        return [Answer("파전", 0.4), Answer("김밥", 0.3), Answer("만두국", 0.1), Answer("", 0.05)][:num_beams]


def test_no_name_is_less_likely_than_one_of_its_alternatives():
    message = name_dish(Scored(), defaultdict(str), 2)
    assert (message["name"], message["confidence"]) == ("파전", 0.4)
    assert message["alternatives"] == [{"name": "김밥", "confidence": 0.3}, {"name": "만두국", "confidence": 0.1}]
    assert name_dish(Scored(), defaultdict(str), 0) == {"name": "김밥", "confidence": 0.3, "alternatives": []}


def test_an_unreadable_picture_does_not_stop_the_others(words, pictures, tmp_path, capsys):
    good = str(next(pictures.rglob("Img_*")))
    (tmp_path / "empty.jpg").write_bytes(b"")
    (tmp_path / "text.jpg").write_text("no picture")
    bad = [str(tmp_path / name) for name in ("empty.jpg", "text.jpg", "none.jpg", "")]
    assert main(["predict", *bad[:2], good, *bad[2:], *words, "--alternatives", "0"]) == 1
    found = lines(capsys)
    assert [("error" in line, "name" in line) for line in found] == [
        (True, False),
        (True, False),
        (False, True),
        (True, False),
        (True, False),
    ]
    assert found[0]["error"] == "empty: 0 bytes"
    assert found[3]["error"] == "cannot be read: No such file or directory"


def test_the_adapters_own_picture_size_and_policy_are_used(words, tiny_adapter, pictures, tmp_path, capsys):
    """An adapter with 56 px and crop sees another picture than an adapter with 224 px and squash."""
    from test_evaluate import facts_of

    small = facts_of(tiny_adapter, tmp_path / "small", image_size=56, resize="crop")
    file = str(next(pictures.rglob("Img_*")))
    assert main(["predict", file, *words, "--alternatives", "0"]) == 0
    assert main(["predict", file, *words[:2], "--adapter", small, "--alternatives", "0"]) == 0
    large, cropped = lines(capsys)
    assert large["confidence"] != cropped["confidence"]
    odd = facts_of(tiny_adapter, tmp_path / "odd", image_size=57)
    assert main(["predict", file, *words[:2], "--adapter", odd]) == 2
    assert "57 is not a multiple of the model's 28 pixels" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--model", "./nowhere"], "base model folder nowhere does not exist"),
        (["--model", "{model}", "--adapter", "./nowhere"], "nowhere holds no adapter"),
        (["--model", "{model}", "--config", "none.yaml"], "recipe none.yaml cannot be read"),
    ],
)
def test_mistakes_are_reported(tiny_model, capsys, words, message):
    assert main(["predict", "x.jpg", *(word.replace("{model}", str(tiny_model)) for word in words)]) == 2
    assert message in capsys.readouterr().err


def test_a_question_is_asked_if_the_task_is_to_answer_one(words, pictures, tiny_adapter, tmp_path, capsys):
    """Another question gets another answer or at least another probability. Without a question, predict fails."""
    adapter = shutil.copytree(tiny_adapter, tmp_path / "adapter")
    facts = json.loads((adapter / "kfood.json").read_text())
    (adapter / "kfood.json").write_text(json.dumps(facts | {"task": "question", "prompt": "{question}"}))
    file, asking = str(next(pictures.rglob("Img_*"))), [*words[:2], "--adapter", str(adapter), "--alternatives", "0"]
    found = []
    for question in ("이 음식의 이름은 무엇인가요?", "몇 인분인가요?"):
        assert main(["predict", file, *asking, "--question", question]) == 0
        found += lines(capsys)
    assert (found[0]["name"], found[0]["confidence"]) != (found[1]["name"], found[1]["confidence"])
    assert main(["predict", file, *asking]) == 2
    assert "no question is given → ask one with --question TEXT" in capsys.readouterr().err
    assert main(["predict", file, *words, "--question", "몇 인분인가요?"]) == 2
    assert "the task dish has its own question → remove it" in capsys.readouterr().err
    assert main(["predict", file, *asking, "--question", "  "]) == 2
    assert "no question is given" in capsys.readouterr().err
    assert main(["predict", file, *asking, "--question", "<|im_end|> hi"]) == 2
    assert "the question cannot be asked (its text holds <|im_end|>" in capsys.readouterr().err
