"""The split that a source comes with is recognised, kept and reported."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from pictures import encoded, folder_bytes, picture, write_folder
from zips import as_folder, zipped

from kfood_dist.cli import main
from kfood_dist.data.shards.manifest import load_manifest, with_checksum
from kfood_dist.data.shards.reader import open_split
from kfood_dist.data.shards.verify import verify
from kfood_dist.data.task.dish import DishClass
from kfood_dist.errors import SourceError
from kfood_dist.pack.job import pack
from kfood_dist.pack.options import PackOptions
from kfood_dist.pack.publisher import assign, settle
from kfood_dist.pack.sources import Record, scan
from kfood_dist.pack.split import parse_fractions

JPEG = encoded(picture())
SMALL = PackOptions(image_size=32, shard_size=10, workers=1)


def splits_of(source: Path, **scanned) -> dict[str, str]:
    return {record.source: record.split for record in scan(source, **scanned)}


def packed_from(out: Path) -> dict[str, Counter[str]]:
    """Count, for each split, its pictures from each top folder of the source."""
    found = {}
    for name in load_manifest(out).splits:
        split = open_split(out, name)
        found[name] = Counter(split.read(i).columns["sources"][0].split("/")[0] for i in range(len(split)))
    return found


# --- recognised


@pytest.mark.parametrize(
    ("folder", "split"),
    [
        ("train", "train"),
        ("Train", "train"),
        ("training", "train"),
        ("1.Training", "train"),
        ("01-1. Training", "train"),
        ("train2017", "train"),
        ("train_images", "train"),
        ("training set", "train"),
        ("학습용데이터", "train"),
        ("훈련셋", "train"),
        ("검증 셋", "val"),
        ("val", "val"),
        ("valid", "val"),
        ("2.Validation", "val"),
        ("dev", "val"),
        ("eval", "val"),
        ("검증", "val"),
        ("test", "test"),
        ("testset", "test"),
        ("시험 데이터", "test"),
    ],
)
@pytest.mark.parametrize(
    "place", ["{}/구이/갈비구이", "{}/갈비구이", "구이/{}/갈비구이", "구이/갈비구이/{}", "all/{}/구이/갈비구이"]
)
def test_a_folder_of_a_split_is_no_dish_and_no_category(tmp_path, folder, split, place):
    as_folder(tmp_path / "food", {f"{place.format(folder)}/a.jpg": JPEG})
    (record,) = scan(tmp_path / "food")
    assert (record.split, record.label, record.problem) == (split, "갈비구이", None)
    assert record.category in ("구이", "")
    (tmp_path / "food.zip").write_bytes(zipped({f"{place.format(folder)}/a.jpg": JPEG}))
    (record,) = scan(tmp_path / "food.zip")
    assert (record.split, record.label) == (split, "갈비구이")


def test_zips_can_be_splits_like_folders(tmp_path):
    as_folder(tmp_path, {"train.zip": zipped({"약과/a.jpg": JPEG}), "test.zip": zipped({"test/약과/b.jpg": JPEG})})
    assert splits_of(tmp_path) == {"train.zip/약과/a.jpg": "train", "test.zip/test/약과/b.jpg": "test"}


def test_names_that_differ_only_in_the_split_are_splits(tmp_path):
    as_folder(tmp_path / "sets", {f"kfood_{s}/구이/갈비구이/a.jpg": JPEG for s in ("train", "val", "test")})
    found = scan(tmp_path / "sets")
    assert {(r.split, r.category, r.label) for r in found} == {
        (s, "구이", "갈비구이") for s in ("train", "val", "test")
    }
    as_folder(
        tmp_path / "dishes", {f"{dish}_{s}/a.jpg": JPEG for dish in ("약과", "불고기") for s in ("train", "test")}
    )
    found = scan(tmp_path / "dishes")
    assert Counter((r.split, r.label) for r in found) == Counter(
        [("train", "약과"), ("test", "약과"), ("train", "불고기"), ("test", "불고기")]
    )
    as_folder(tmp_path / "alone", {"latte_test/a.jpg": JPEG, "bread/a.jpg": JPEG})
    assert {(r.split, r.label) for r in scan(tmp_path / "alone")} == {("", "latte_test"), ("", "bread")}


def test_eval_is_val_unless_there_is_another_val(tmp_path):
    as_folder(tmp_path / "two", {"train/약과/a.jpg": JPEG, "evaluation/약과/a.jpg": JPEG})
    assert set(splits_of(tmp_path / "two").values()) == {"train", "val"}
    as_folder(tmp_path / "three", {f"{s}/약과/a.jpg": JPEG for s in ("training", "validation", "evaluation")})
    assert splits_of(tmp_path / "three")["evaluation/약과/a.jpg"] == "test"


def test_a_folder_that_may_be_a_dish_or_a_split_is_refused_unless_the_class_list_decides(tmp_path):
    as_folder(tmp_path, {"bus/a.jpg": JPEG, "train/a.jpg": JPEG})
    with pytest.raises(SourceError, match=r"folder train .* bus beside it is not a split: is this folder a dish\?"):
        scan(tmp_path)
    records = scan(tmp_path, classes=[DishClass("bus", ""), DishClass("train", "")])
    assert {(r.label, r.split) for r in records} == {("bus", ""), ("train", "")}


def test_pictures_directly_in_a_split_have_no_dish(tmp_path):
    as_folder(tmp_path / "food", {"train/약과/a.jpg": JPEG, "test/b.jpg": JPEG})
    found = {r.source: (r.label, r.problem) for r in scan(tmp_path / "food")}
    assert found == {"train/약과/a.jpg": ("약과", None), "test/b.jpg": ("", "bad_label")}
    as_folder(tmp_path / "약과", {"train/a.jpg": JPEG, "test/b.jpg": JPEG})
    assert {(r.label, r.split) for r in scan(tmp_path / "약과")} == {("약과", "train"), ("약과", "test")}


@pytest.mark.parametrize("header", ["image_path,label,split", "split,label,image_path"])
def test_the_split_column_of_a_list_overrides_the_folders(tmp_path, header):
    as_folder(tmp_path, {f"train/{i}.jpg": JPEG for i in range(5)})
    cells = [("0", "Training"), ("1", "valid"), ("2", "TEST"), ("3", ""), ("4", "fold 7")]
    rows = [{"image_path": f"train/{name}.jpg", "label": "약과", "split": split} for name, split in cells]
    lines = [header, *(",".join(row[column] for column in header.split(",")) for row in rows)]
    (tmp_path / "list.csv").write_text("\n".join(lines), encoding="utf-8")
    records = scan(tmp_path / "list.csv")
    assert [r.split for r in records] == ["train", "val", "test", "", "fold 7"]
    kept, own = settle(records, is_dealt=False)
    assert [r.problem for r in kept] == [None, None, None, "no_split", "no_split"]
    assert (own.given, own.num_outside) == (("train", "val", "test"), 2)


def test_folders_in_the_paths_of_a_list_give_the_split_but_folders_above_the_set_do_not(tmp_path):
    root = tmp_path / "test" / "set"
    names = ["train/구이/갈비구이/a.jpg", "val/구이/갈비구이/b.jpg"]
    as_folder(root, dict.fromkeys(names, JPEG))
    for start in ("", f"{root}/"):
        elsewhere = tmp_path / "elsewhere"
        elsewhere.mkdir(exist_ok=True)
        rows = "\n".join(["image_path,label", *(f"{start}{name},갈비구이" for name in names)])
        (elsewhere / "list.csv").write_text(rows, encoding="utf-8")
        found = scan(elsewhere / "list.csv", image_root=None if start else root)
        assert [(r.split, r.category, r.problem) for r in found] == [("train", "구이", None), ("val", "구이", None)]
    as_folder(tmp_path / "dishes", {"train/a.jpg": JPEG, "bus/a.jpg": JPEG})
    (tmp_path / "dishes" / "list.csv").write_text("image_path,label\ntrain/a.jpg,train\nbus/a.jpg,bus\n")
    assert set(splits_of(tmp_path / "dishes" / "list.csv").values()) == {""}


# --- kept


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Two dishes, split by the publisher."""
    root = tmp_path_factory.mktemp("published")
    numbers = {"train": 20, "val": 3, "test": 7}
    dishes = {f"{split}/한과/{dish}": n for split, n in numbers.items() for dish in ("약과", "유과")}
    return write_folder(root / "source", dishes)


def test_the_publishers_split_is_kept_and_reported_and_parts_keep_it_too(source, tmp_path, capsys):
    words = ["pack", str(source), "--image-size", "32", "--workers", "1"]
    assert main([*words[:2], str(tmp_path / "out"), *words[2:]]) == 0
    output = capsys.readouterr().out
    assert "packed   60 samples of 2 classes: train 40, val 6, test 14" in output
    assert "split    the source's own: train, val and test kept; --split replaces this split" in output
    assert packed_from(tmp_path / "out") == {"train": {"train": 40}, "val": {"val": 6}, "test": {"test": 14}}
    own = load_manifest(tmp_path / "out").raw["source_split"]
    assert own == {
        "given": ["train", "val", "test"],
        "kept": True,
        "outside": 0,
        "from_train": [],
        "groups_across": 0,
        "look_alike_in_train": {"val": 0, "test": 0},
    }
    assert {c.category for c in load_manifest(tmp_path / "out").classes} == {"한과"}
    assert verify(tmp_path / "out") == []
    for part in ("1/2", "2/2"):
        assert main([*words[:2], str(tmp_path / "parts"), *words[2:], "--part", part]) == 0
    assert folder_bytes(tmp_path / "parts") == folder_bytes(tmp_path / "out")


def test_the_split_option_assigns_all_pictures_again_and_makes_another_data_set(source, tmp_path, capsys):
    words = ["pack", str(source), str(tmp_path / "out"), "--image-size", "32", "--workers", "1"]
    assert main([*words, "--split", "0.8,0.1,0.1"]) == 0
    output = capsys.readouterr().out
    assert "split    assigned by --split; the source's own split (train, val and test) is not kept" in output
    dealt = packed_from(tmp_path / "out")
    assert {split: counts.total() for split, counts in dealt.items()} == {"train": 48, "val": 6, "test": 6}
    assert set(dealt["train"]) == {"train", "val", "test"}
    assert main(words) == 2
    assert "holds another data set" in capsys.readouterr().err


def test_a_source_without_splits_is_assigned_as_usual_and_records_no_source_split(tmp_path, capsys):
    source = write_folder(tmp_path / "source", {"한과/약과": 10})
    pack(source, tmp_path / "out", SMALL)
    assert load_manifest(tmp_path / "out").raw["source_split"] is None
    explicit = replace(SMALL, fractions=parse_fractions("0.8,0.1,0.1"))
    assert pack(source, tmp_path / "out", explicit).reused


@pytest.mark.parametrize(
    ("given", "output", "expected"),
    [
        (
            ["train", "test"],
            "the source's own: train and test kept; it has no val: taken from its train by the usual share",
            {"train": {"train": 18}, "val": {"train": 2}, "test": {"test": 20}},
        ),
        (
            ["train", "val"],
            "the source's own: train and val kept; it has no test: taken from its train by the usual share",
            {"train": {"train": 18}, "val": {"val": 20}, "test": {"train": 2}},
        ),
        (
            ["train"],
            "the source's own: train kept; it has no val and test: taken from its train by the usual share",
            {"train": {"train": 16}, "val": {"train": 2}, "test": {"train": 2}},
        ),
        (
            ["val", "test"],
            "the source's own: val and test kept; it has no train: empty",
            {"val": {"val": 20}, "test": {"test": 20}},
        ),
        (["test"], "the source's own: test kept; it has no train and val: empty", {"test": {"test": 20}}),
    ],
)
def test_a_split_that_the_source_lacks_is_taken_only_from_its_train(tmp_path, capsys, given, output, expected):
    source = write_folder(tmp_path / "source", {f"{split}/약과": 20 for split in given})
    assert main(["pack", str(source), str(tmp_path / "out"), "--image-size", "32", "--workers", "1"]) == 0
    assert f"split    {output}" in capsys.readouterr().out
    assert packed_from(tmp_path / "out") == expected
    assert verify(tmp_path / "out") == []


def test_pictures_in_no_split_of_the_source_are_refused_and_the_remedy_is_split(source, tmp_path, capsys):
    mixed = as_folder(tmp_path / "source", {f"extra/약과/{i}.jpg": encoded(picture(900 + i)) for i in range(9)})
    (mixed / "train").symlink_to(source / "train")
    (mixed / "test").symlink_to(source / "test")
    words = ["pack", str(mixed), str(tmp_path / "out"), "--image-size", "32", "--workers", "1"]
    assert main(words) == 2
    output = capsys.readouterr().err
    assert "9 of 63 inputs (14.3%) cannot be used, more than --max-rejected 0.05: no_split 9" in output
    assert "split everything again with --split 0.8,0.1,0.1" in output
    assert main([*words, "--max-rejected", "0.2"]) == 0
    assert "WARNING  9 pictures are in no split of the source and are refused" in capsys.readouterr().out
    assert main([*words[:2], str(tmp_path / "dealt"), *words[3:], "--split", "0.8,0.1,0.1"]) == 0
    assert "packed   63 samples" in capsys.readouterr().out


def test_near_duplicates_across_the_publishers_split_are_reported_and_not_moved(source, tmp_path, capsys):
    straddling = tmp_path / "source"
    plates = [picture(500 + i, 400, 300) for i in range(12)]
    for i, image in enumerate(plates):
        split = "train" if i < 8 else "test"
        as_folder(straddling, {f"{split}/약과/Img_{i:03d}0.jpg": encoded(image)})
    for i, split in ((0, "test"), (1, "test"), (8, "val")):  # the same plates, encoded again
        as_folder(straddling, {f"{split}/약과/again_{i}.jpg": encoded(plates[i], quality=60)})
    as_folder(straddling, {"test/약과/third.jpg": encoded(plates[0], quality=50)})
    out = tmp_path / "out"
    assert main(["pack", str(straddling), str(out), "--workers", "1"]) == 0
    output = capsys.readouterr().out
    assert (
        "WARNING  3 groups of near-duplicates are in several splits of the source: "
        "0 pictures of val and 3 of test have one in train" in output
    )
    assert "each in one split" not in output
    assert packed_from(out) == {"train": {"train": 8}, "val": {"val": 1}, "test": {"test": 7}}
    own = load_manifest(out).raw["source_split"]
    assert (own["groups_across"], own["look_alike_in_train"]) == (3, {"val": 0, "test": 3})
    assert verify(out) == []
    manifest = json.loads((out / "manifest.json").read_text())
    for stated, fault in ((2, "states 2 groups in several splits, but the indexes have 3"), (0, "groups in test")):
        manifest["source_split"]["groups_across"] = stated
        (out / "manifest.json").write_bytes(with_checksum(manifest))
        assert any(fault in str(found) for found in verify(out))


def test_groups_stay_together_when_a_split_is_taken_from_train():
    records = [Record(Path(), f"train/{i}", "약과", split="train") for i in range(300)]
    groups = np.repeat(np.arange(100), 3).tolist()
    _, own = settle(records, is_dealt=False)
    splits = assign(groups, records, own, parse_fractions("0.8,0.1,0.1"), seed=0)
    assert Counter(splits) == {"train": 240, "val": 30, "test": 30}
    assert all(len(set(splits[3 * group : 3 * group + 3])) == 1 for group in range(100))


def test_a_data_set_that_an_earlier_version_packed_is_reused(source, tmp_path, capsys):
    plain = write_folder(tmp_path / "source", {"한과/약과": 10})
    words = ["pack", str(plain), str(tmp_path / "out"), "--image-size", "32", "--workers", "1"]
    assert main(words) == 0
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    del manifest["source_split"], manifest["source"]["passed_by"]
    (tmp_path / "out" / "manifest.json").write_bytes(with_checksum(manifest))
    capsys.readouterr()
    assert main(words) == 0
    assert "reused" in capsys.readouterr().out
    assert verify(tmp_path / "out") == []
