"""`kfood compare` on reports of `kfood eval`: intact, damaged and about different pictures."""

import json
from pathlib import Path

import pytest

from kfood_dist.cli import main
from kfood_dist.evaluate.compare import in_order, parse_name
from kfood_dist.evaluate.metrics import Prediction, mcnemar_exact, wilson_95
from kfood_dist.evaluate.report import build_report, load_report, write_report

DISHES = ("김밥", "파전", "된장찌개")


def write(folder: Path, right: str, **facts: object) -> Path:
    """Write a report whose i-th picture is right if `right[i]` is "1". The dishes take turns."""
    message = ((f"{i}", DISHES[i % 3], c == "1") for i, c in enumerate(right))
    records = [
        Prediction(f"test-{i:>08}", f"{i}.jpg", dish, *(2 * [dish if is_right else "국"]), is_right, 0.5)
        for i, dish, is_right in message
    ]
    folder.mkdir(parents=True)
    defaults = {"split": "test", "index_hash": "a" * 64, "model": "m", "adapter": None, "settings": {"prompt": "?"}}
    write_report(folder, build_report(records, [], defaults | facts), records, "<p>page</p>")
    return folder


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return write(tmp_path / "base", "000000000110")


@pytest.fixture
def tuned(tmp_path: Path) -> Path:
    return write(tmp_path / "tuned", "111111111101")


def compare(*words: Path | str) -> int:
    return main(["compare", *map(str, words)])


def test_base_and_tuned_reports_are_compared(
    base: Path, tuned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    out = tmp_path / "made" / "here"
    assert compare(base, tuned / "report.json", "--out", out) == 0
    found = json.loads((out / "comparison.json").read_text(encoding="utf-8"))
    assert (found["base_accuracy"], found["tuned_accuracy"], found["test_images"]) == (2 / 12, 11 / 12, 12)
    assert found["tuned_wilson_95"] == list(wilson_95(11, 12))
    assert found["mcnemar"] == {"only_base_right": 1, "only_tuned_right": 10, "p_value": mcnemar_exact(1, 10)}
    assert found["per_class"]["김밥"] == {"images": 4, "base": 0.25, "tuned": 1.0, "delta": 0.75}
    assert found["per_class"]["파전"]["delta"] == 0.5
    assert found["better"] == ["된장찌개", "김밥", "파전"]
    assert found["worse"] == []
    table = capsys.readouterr().out.splitlines()
    assert table[0].split() == ["accuracy", "right", "pictures", "95%", "interval"]
    assert table[1].split()[:4] == ["base", "16.7%", "2", "12"]
    assert table[2].split()[:4] == ["tuned", "91.7%", "11", "12"]
    assert len({len(line) for line in table[:3]}) == 1
    assert "16.7% → 91.7%" in (out / "comparison.html").read_text(encoding="utf-8")


def test_a_dish_may_get_worse(base: Path, tuned: Path, tmp_path: Path):
    assert compare(tuned, base, "--out", tmp_path / "out") == 0
    found = json.loads((tmp_path / "out" / "comparison.json").read_text(encoding="utf-8"))
    assert sorted(found["worse"]) == sorted(DISHES)
    assert found["gain"] < 0


def test_the_names_base_and_tuned_set_the_order(base: Path, tuned: Path, tmp_path: Path):
    half = write(tmp_path / "half", "111111000000")
    ordered = in_order([parse_name(f"tuned={tuned}"), parse_name(f"half={half}"), parse_name(f"base={base}")])
    assert [(named.name, named.report.correct) for named in ordered] == [("base", 2), ("half", 6), ("tuned", 11)]


def test_unnamed_reports_keep_their_order(base: Path, tuned: Path, tmp_path: Path):
    half = write(tmp_path / "half", "111111000000")
    ordered = in_order([parse_name(str(path)) for path in (base, half, tuned)])
    assert [(named.name, named.report.correct) for named in ordered] == [("base", 2), ("report 2", 6), ("tuned", 11)]


def test_a_path_with_an_equals_sign_is_a_path(tmp_path: Path):
    folder = write(tmp_path / "lr=1e-4", "10")
    assert parse_name(str(folder)).name == ""
    assert parse_name(f"mine={folder}").name == "mine"


def test_without_predictions_there_is_no_paired_test(base: Path, tuned: Path, tmp_path: Path):
    (base / "predictions.jsonl").unlink()
    assert compare(base, tuned, "--out", tmp_path / "out") == 0
    assert json.loads((tmp_path / "out" / "comparison.json").read_text(encoding="utf-8"))["mcnemar"] is None


def test_different_settings_are_reported(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    other = write(tmp_path / "other", "111111111101", settings={"prompt": "이름?"})
    assert compare(base, other, "--out", tmp_path / "out") == 0
    assert "differ between the reports: prompt" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("facts", "right", "words"),
    [
        ({"index_hash": "b" * 64}, "111111111101", "index_hash aaaaaaaaaaaa and bbbbbbbbbbbb"),
        ({"split": "val"}, "111111111101", "split test and val"),
        ({}, "111", "number of pictures 12 and 3"),
    ],
)
def test_reports_about_different_pictures_are_refused(base: Path, tmp_path: Path, capsys, facts, right, words):
    other = write(tmp_path / "other", right, **facts)
    assert compare(base, other, "--out", tmp_path / "out") == 2
    assert f"are not about the same pictures: {words}" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def damage(folder: Path, **changes: object) -> None:
    path = folder / "report.json"
    raw = json.loads(path.read_text(encoding="utf-8")) | changes
    path.write_text(json.dumps({k: v for k, v in raw.items() if v is not None}), encoding="utf-8")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"accuracy": 0.99}, "its accuracy is not correct / images"),
        ({"images": 13}, "its dishes do not add up to its total"),
        ({"wilson_95": None}, "KeyError: 'wilson_95'"),
        ({"per_class": ["김밥"]}, "is damaged"),
        ({"format": "other"}, "is not a report of `kfood eval`"),
        ({"version": 2}, "has version 2, but this kfood reads 1"),
        ({"predictions_sha256": "0"}, "predictions.jsonl beside it is not the file that it was written with"),
    ],
)
def test_damaged_reports_are_refused(base: Path, tuned: Path, tmp_path: Path, capsys, changes, words):
    damage(tuned, **changes)
    assert compare(base, tuned, "--out", tmp_path / "out") == 2
    assert words in capsys.readouterr().err


@pytest.mark.parametrize("content", [b"", b"\xff\xfe", b"[1]", b"[" * 100_000])
def test_a_file_that_is_not_a_json_object_is_refused(base: Path, tmp_path: Path, capsys, content):
    (tmp_path / "x.json").write_bytes(content)
    assert compare(base, tmp_path / "x.json", "--out", tmp_path / "out") == 2
    assert capsys.readouterr().err.startswith("kfood compare: ")


def test_mistakes_on_the_command_line_are_reported(base: Path, tuned: Path, tmp_path: Path, capsys):
    for words, message in (
        ([base], "has nothing to be compared with"),
        ([base, tmp_path / "none"], "cannot be read (No such file or directory)"),
        ([f"x={base}", f"x={tuned}"], "several reports have the name x"),
    ):
        assert compare(*words, "--out", tmp_path / "out") == 2
        assert message in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    assert compare(base, tuned, "--out", tmp_path / "file" / "below") == 2
    assert "file is not a folder" in capsys.readouterr().err


def test_pages_escape_text_from_the_data(tmp_path: Path):
    for name in ("a", "b"):
        write(tmp_path / name, "01", model="<script>alert(1)</script>")
        damage(tmp_path / name, per_class={"<b>김밥": {"images": 2, "correct": 1, "accuracy": 0.5}})
    assert compare(f"<i>={tmp_path / 'a'}", tmp_path / "b", "--out", tmp_path / "out") == 0
    text = (tmp_path / "out" / "comparison.html").read_text(encoding="utf-8")
    assert "<b>" not in text and "&lt;b&gt;김밥" in text
    assert "<i>" not in text and "&lt;i&gt;" in text


def test_a_report_reads_back_as_written(base: Path):
    report = load_report(base)
    assert report.predictions is not None
    assert [record.correct for record in report.predictions].count(True) == report.correct == 2
    assert not list(base.glob(".*"))
