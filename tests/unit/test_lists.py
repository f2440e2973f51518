"""Lists (CSV, JSONL) of samples with a question, an answer and one or several pictures, from the row to the shard."""

import csv
import io
import json
import random
import sys
import unicodedata
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import webdataset
from pictures import encoded, folder_bytes, picture
from PIL import Image

from kfood_dist.cli import main
from kfood_dist.config.recipe import build_data
from kfood_dist.data.mix import build_data_order, open_mixture
from kfood_dist.data.picture.images import decode_rgb
from kfood_dist.data.shards.manifest import SPLITS, Manifest, load_manifest
from kfood_dist.data.shards.reader import NO_LABEL, open_split
from kfood_dist.data.shards.sample import Sample
from kfood_dist.data.shards.verify import verify
from kfood_dist.errors import RecipeError, SourceError
from kfood_dist.pack.job import pack
from kfood_dist.pack.options import PackOptions
from kfood_dist.pack.sources import Record, read_picture, scan, scan_source
from kfood_dist.pack.split import parse_fractions

SMALL = PackOptions(image_size=32, shard_size=7, workers=1)
ASK = {"question": "무엇인가요?", "answer": "약과"}

Row = dict[str, Any]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with 20 different pictures in two subfolders."""
    root = tmp_path_factory.mktemp("pictures")
    for number in range(20):
        path = root / ("상" if number % 2 else "차림") / f"{number:02d}x.jpg"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(encoded(picture(number)))
    return root


def names(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*x.jpg"))


def asked(folder: Path) -> list[Row]:
    """Return rows: a question for each picture, a second one for some, and some rows of two or three pictures."""
    found = names(folder)
    rows: list[Row] = [
        {"images": [name], "question": "무엇인가요?", "answer": f"음식 {n}"} for n, name in enumerate(found)
    ]
    rows += [{"images": [name], "question": 'Is it "hot", or\nnot?', "answer": "yes, very"} for name in found[:4]]
    rows += [{"images": found[n : n + 2], "question": "두 사진이 같은가요?", "answer": "아니요"} for n in (4, 8)]
    return [*rows, {"images": found[9:12][::-1], "question": "몇 장?", "answer": "3"}]


def write_csv(path: Path, rows: list[Row], columns: tuple[str, ...] = ("question", "answer")) -> Path:
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["image_path", *columns])
        writer.writerows(["|".join(row["images"]), *(row[name] for name in columns)] for row in rows)
    return path


def write_jsonl(path: Path, rows: list[Row]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def write_lines(path: Path, *lines: str | bytes) -> Path:
    path.write_bytes(b"\n".join(line if isinstance(line, bytes) else line.encode("utf-8") for line in lines))
    return path


def samples(out: Path) -> dict[str, list[Sample]]:
    """Return all samples by split."""
    splits = {split: open_split(out, split) for split in load_manifest(out).splits}
    return {split: [shards.read(i) for i in range(len(shards))] for split, shards in splits.items()}


def output(rows: list[Row]) -> Counter[tuple[tuple[str, ...], str, str]]:
    return Counter((tuple(row["images"]), row["question"], row["answer"]) for row in rows)


def found_in(out: Path) -> Counter[tuple[tuple[str, ...], str, str]]:
    every = [sample.columns for found in samples(out).values() for sample in found]
    return Counter((tuple(columns["sources"]), columns["question"], columns["answer"]) for columns in every)


def refused(out: Path) -> list[tuple[str, str, str]]:
    path = out / "rejected.csv" if out.is_dir() else out.with_name(f"{out.name}.rejected.csv")
    with open(path, encoding="utf-8", newline="") as file:
        return [(row["source"], row["reason"], row["detail"]) for row in csv.DictReader(file)]


def packed(source: Path, out: Path, options: PackOptions = SMALL) -> Manifest:
    manifest = pack(source, out, options).manifest
    assert manifest is not None
    return manifest


# --- the packed samples


def test_a_csv_and_a_jsonl_of_the_same_rows_give_the_same_samples(folder: Path, tmp_path: Path) -> None:
    rows = asked(folder)
    options = replace(SMALL, image_root=folder)
    by_csv = packed(write_csv(tmp_path / "list.csv", rows), tmp_path / "csv", options)
    by_jsonl = packed(write_jsonl(tmp_path / "list.jsonl", rows), tmp_path / "jsonl", options)
    assert (by_csv.raw["source"]["kind"], by_jsonl.raw["source"]["kind"]) == ("csv", "jsonl")
    first, second = folder_bytes(tmp_path / "csv"), folder_bytes(tmp_path / "jsonl")
    assert first.pop("manifest.json") != second.pop("manifest.json")
    assert first == second
    assert found_in(tmp_path / "csv") == output(rows)
    assert verify(tmp_path / "csv") == verify(tmp_path / "jsonl") == []


def test_the_manifest_and_the_index_of_a_question_list_have_no_classes(folder: Path, tmp_path: Path, capsys) -> None:
    rows = asked(folder)
    words = ["pack", str(write_jsonl(folder / "list.jsonl", rows)), str(tmp_path / "out"), "--image-size", "32"]
    assert main([*words, "--workers", "1"]) == 0
    assert f"packed   {len(rows)} samples: train " in capsys.readouterr().out
    manifest = load_manifest(tmp_path / "out")
    assert (manifest.classes, manifest.columns) == ((), ("answer", "question"))
    assert all(manifest.raw["splits"][split]["per_class"] == {} for split in SPLITS)
    for split in manifest.splits:
        shards = open_split(tmp_path / "out", split)
        assert set(shards.labels().tolist()) == {NO_LABEL}
        for sample, row in zip(shards.read_many(range(len(shards))), shards.index, strict=True):
            assert isinstance(sample, Sample)
            assert list(sample.columns) == ["answer", "group", "height", "question", "sources", "width"]
            assert row["num_images"] == len(sample.pictures) == len(sample.columns["sources"])
            assert row["tokens"] == len(sample.columns["answer"].encode()) + 1
            assert row["group"] == sample.columns["group"]
    assert main(["verify", str(tmp_path / "out")]) == 0
    assert f"no faults: {len(rows)} samples in " in capsys.readouterr().out


@pytest.mark.parametrize("form", ["csv", "jsonl"])
def test_the_pictures_of_a_sample_are_read_in_the_order_of_their_row(folder: Path, tmp_path: Path, form: str) -> None:
    first, second, *_, last = names(folder)
    rows = [{"images": images, **ASK} for images in ([first, last], [last, first], [second], [last, second, first])]
    write = write_csv if form == "csv" else write_jsonl
    out = tmp_path / "out"
    packed(write(tmp_path / f"list.{form}", rows), out, replace(SMALL, image_root=folder))
    singles = write(tmp_path / f"singles.{form}", [{"images": [name], **ASK} for name in (first, second, last)])
    packed(singles, tmp_path / "singles", replace(SMALL, image_root=folder))
    jpeg_of = {
        s.columns["sources"][0]: s.pictures[0] for found in samples(tmp_path / "singles").values() for s in found
    }
    (found,) = samples(out).values()  # only one split: rows share pictures, so all are one group
    assert Counter(tuple(s.columns["sources"]) for s in found) == Counter(tuple(row["images"]) for row in rows)
    for sample in found:
        assert sample.pictures == tuple(jpeg_of[name] for name in sample.columns["sources"])
    assert verify(out) == []


def test_plain_webdataset_reads_every_picture_of_a_sample(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    rows = [{"images": names(folder)[n : n + 1 + n % 3], **ASK} for n in range(12)]
    manifest = packed(write_jsonl(folder / "list.jsonl", rows), out)
    read = 0
    for split in manifest.splits:
        urls = [str(out / shard.path) for shard in manifest.shards_of(split)]
        shards = open_split(out, split)
        for i, plain in enumerate(webdataset.WebDataset(urls, shardshuffle=False)):
            sample = shards.read(i)
            suffixes = ["jpg", *(f"{n}.jpg" for n in range(1, len(sample.pictures)))]
            assert sorted(name for name in plain if not name.startswith("_")) == sorted([*suffixes, "json"])
            assert plain["__key__"] == shards.key(i)
            assert tuple(plain[suffix] for suffix in suffixes) == sample.pictures
            assert json.loads(plain["json"]) == sample.columns
            read += 1
        decoded = next(iter(webdataset.WebDataset(urls, shardshuffle=False).decode("pil")))
        assert all(decoded[name].size == (32, 32) for name in decoded if name.endswith("jpg"))
    assert read == 12


def test_packing_is_identical_for_any_workers_parts_and_row_order(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = asked(folder)
    options = replace(SMALL, image_root=folder)
    source = tmp_path / "list.jsonl"
    packed(write_jsonl(source, rows), tmp_path / "one", options)
    packed(source, tmp_path / "two", replace(options, workers=2))
    with monkeypatch.context() as patch:
        patch.setattr("kfood_dist.pack.chunks.CHUNK_RECORDS", 5)
        pack(source, tmp_path / "parts", replace(options, part=1, parts=2))
        pack(source, tmp_path / "parts", replace(options, part=2, parts=2))
    random.Random(0).shuffle(rows)
    write_jsonl(source, rows)
    packed(source, tmp_path / "shuffled", options)
    one = folder_bytes(tmp_path / "one")
    for other in ("two", "parts", "shuffled"):
        assert folder_bytes(tmp_path / other) == one, other
    assert pack(source, tmp_path / "one", options).reused


def test_a_stopped_packing_of_several_pictures_resumes(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prepared pictures of intact chunks are reused. Those of a truncated chunk are prepared again."""
    source, options = write_jsonl(folder / "list.jsonl", asked(folder)), SMALL
    packed(source, tmp_path / "whole", options)
    made: list[str] = []

    def counted(record: Record) -> bytes:
        made.append(record.source)
        return read_picture(record)

    monkeypatch.setattr("kfood_dist.pack.prepare.read_picture", counted)
    monkeypatch.setattr("kfood_dist.pack.chunks.CHUNK_RECORDS", 6)
    with monkeypatch.context() as patch:
        patch.setattr("kfood_dist.pack.job._merge", lambda *inputs: sys.exit("stopped"))
        with pytest.raises(SystemExit, match="stopped"):
            pack(source, tmp_path / "out", options)
    assert Counter(made) == Counter(name for row in asked(folder) for name in row["images"])
    made.clear()
    victim = sorted((tmp_path / ".out.partial" / "chunks").glob("*.chunk"))[0]
    victim.write_bytes(victim.read_bytes()[:-1])
    packed(source, tmp_path / "out", options)
    assert 0 < len(made) <= 6 * 3
    assert folder_bytes(tmp_path / "out") == folder_bytes(tmp_path / "whole")


def test_all_questions_about_a_picture_are_kept_in_one_split(folder: Path, tmp_path: Path) -> None:
    rows = [{"images": [name], "question": f"{n}?", "answer": "x"} for name in names(folder) for n in range(3)]
    again = encoded(picture(0), quality=80)  # the first picture again, with another name and other bytes
    for number in range(4):
        (tmp_path / f"again{number}.jpg").write_bytes(again + bytes(number))
        rows.append({"images": [str(tmp_path / f"again{number}.jpg")], "question": "?", "answer": "x"})
    rows.append({"images": [names(folder)[7], names(folder)[8]], "question": "?", "answer": "joins two groups"})
    out = tmp_path / "out"
    packed(write_csv(tmp_path / "list.csv", rows), out, replace(SMALL, image_root=folder, image_size=224))
    assert found_in(out).total() == len(rows)
    splits: dict[str, set[str]] = {}
    groups: dict[str, set[int]] = {}
    for split, found in samples(out).items():
        for sample in found:
            for source in sample.columns["sources"]:
                splits.setdefault(source, set()).add(split)
                groups.setdefault(source, set()).add(sample.columns["group"])
    assert all(len(of_one) == 1 for of_one in (*splits.values(), *groups.values()))
    assert set(Counter(split for of_one in splits.values() for split in of_one)) == set(SPLITS)
    alike = next(source for source in groups if source.endswith("00x.jpg"))
    assert all(groups[str(tmp_path / f"again{number}.jpg")] == groups[alike] for number in range(4))
    assert groups[names(folder)[7]] == groups[names(folder)[8]]
    assert verify(out) == []


def test_a_lists_own_split_is_kept(folder: Path, tmp_path: Path) -> None:
    rows = [row | {"split": ("train", "Validation", "test")[n % 3]} for n, row in enumerate(asked(folder)[:12])]
    wanted = {split: output(rows[n::3]) for n, split in enumerate(("train", "val", "test"))}
    for form in ("csv", "jsonl"):
        out = tmp_path / form
        if form == "csv":
            source = write_csv(tmp_path / "list.csv", rows, ("question", "answer", "split"))
        else:
            source = write_jsonl(tmp_path / "list.jsonl", rows)
        packed(source, out, replace(SMALL, image_root=folder))
        found = {split: [sample.columns for sample in every] for split, every in samples(out).items()}
        assert {
            split: Counter((tuple(c["sources"]), c["question"], c["answer"]) for c in every)
            for split, every in found.items()
        } == wanted


def test_a_list_of_labels_may_be_jsonl_and_have_several_pictures(folder: Path, tmp_path: Path) -> None:
    rows = [{"images": names(folder)[n : n + 2], "label": ("약과", " 유 과")[n // 2 % 2]} for n in range(0, 20, 2)]
    by_jsonl = packed(write_jsonl(tmp_path / "list.jsonl", rows), tmp_path / "jsonl", replace(SMALL, image_root=folder))
    packed(write_csv(tmp_path / "list.csv", rows, ("label",)), tmp_path / "csv", replace(SMALL, image_root=folder))
    assert [dish.name for dish in by_jsonl.classes] == ["약과", "유과"]
    assert by_jsonl.columns == ("category", "label")
    for split in by_jsonl.splits:
        of_csv, of_jsonl = (open_split(tmp_path / form, split) for form in ("csv", "jsonl"))
        every = of_jsonl.read_many(range(len(of_jsonl)))
        assert of_csv.read_many(range(len(of_csv))) == every
        assert [of_jsonl.classes[label].name for label in of_jsonl.labels()] == [s.columns["label"] for s in every]  # type: ignore[union-attr]
    listed = write_lines(tmp_path / "classes.tsv", "category\tname\taliases", "한과\t약과\t", "한과\t한과모둠\t유과")
    options = replace(SMALL, image_root=folder, classes=listed)
    assert [d.name for d in packed(tmp_path / "list.jsonl", tmp_path / "listed", options).classes] == [
        "약과",
        "한과모둠",
    ]


def test_a_list_may_have_labels_and_questions(folder: Path, tmp_path: Path) -> None:
    long = "아주 긴 답입니다" * 9
    rows = [{"images": [name], "label": "약과", "question": "?", "answer": long} for name in names(folder)[:6]]
    rows[1]["answer"] = "x"  # the label is longer
    out = tmp_path / "out"
    manifest = packed(write_jsonl(folder / "both.jsonl", rows), out, replace(SMALL, fractions=parse_fractions("1,0,0")))
    assert manifest.columns == ("answer", "category", "label", "question")
    shards = open_split(out, "train")
    assert set(shards.labels().tolist()) == {0}
    longest = {long: len(long.encode()) + 1, "x": len("약과".encode()) + 1}
    for sample, row in zip(shards.read_many(range(6)), shards.index, strict=True):
        assert isinstance(sample, Sample)
        assert row["tokens"] == longest[sample.columns["answer"]]
    assert verify(out) == []


def test_a_question_without_an_answer_is_a_column_like_any_other(folder: Path, tmp_path: Path) -> None:
    rows = [{"images": [name], "label": "약과", "question": ""} for name in names(folder)]
    manifest = packed(
        write_csv(tmp_path / "list.csv", rows, ("label", "question")),
        tmp_path / "out",
        replace(SMALL, image_root=folder),
    )
    assert (manifest.columns, manifest.raw["rejected"]["count"]) == (("category", "label"), 0)


# --- refused rows


@pytest.mark.parametrize("form", ["csv", "jsonl"])
@pytest.mark.parametrize("place", [0, 1, 2])
def test_only_a_row_with_an_unusable_picture_is_refused_by_name(
    folder: Path, tmp_path: Path, form: str, place: int
) -> None:
    sound = names(folder)
    for name, data in (("junk.jpg", b"junk"), ("empty.jpg", b""), ("small.png", encoded(picture(3, 20, 20), "PNG"))):
        (tmp_path / name).write_bytes(data)
    bad = {
        "nowhere.jpg": ("missing", "no such file"),
        str(tmp_path): ("missing", ""),
        str(tmp_path / "junk.jpg"): ("unreadable", ""),
        str(tmp_path / "empty.jpg"): ("empty", ""),
        str(tmp_path / "small.png"): ("too_small", ""),
    }
    rows, expected = [{"images": sound[n : n + 3], **ASK} for n in range(10)], []
    for n, (name, (reason, detail)) in enumerate(bad.items()):
        images = [*sound[n : n + 3]]
        images[place] = name
        rows.append({"images": images, "question": f"{n}?", "answer": "x"})
        expected.append((images[0], reason, name, detail))
    write = write_csv if form == "csv" else write_jsonl
    out = tmp_path / "out"
    packed(write(tmp_path / f"list.{form}", rows), out, replace(SMALL, image_root=folder, max_rejected=0.5))
    assert found_in(out) == output(rows[:10])
    message = {(source, reason): why for source, reason, why in refused(out)}
    assert len(message) == len(refused(out)) == len(bad)
    for source, reason, name, detail in expected:
        assert detail in message[source, reason]
        assert place == 0 or message[source, reason].startswith(f"{name}: ")
    assert verify(out) == []


def test_a_repaired_second_picture_is_used_in_the_next_packing(folder: Path, tmp_path: Path) -> None:
    second = tmp_path / "second.jpg"
    sound = encoded(picture(77))
    second.write_bytes(bytes(len(sound)))
    rows = [{"images": [name, str(second)], **ASK} for name in names(folder)[:3]]
    source = write_jsonl(tmp_path / "list.jsonl", rows)
    options = replace(SMALL, image_root=folder, max_rejected=0)
    with pytest.raises(SourceError, match="unreadable 3"):
        pack(source, tmp_path / "out", options)
    assert {why.split(": ")[0] for *_, why in refused(tmp_path / "out")} == {str(second)}
    second.write_bytes(sound)
    packed(source, tmp_path / "out", options)
    assert found_in(tmp_path / "out") == output(rows)


BAD_LINES = {
    "no JSON": "not JSON: no JSON",
    '{"image": "a.jpg", "question": "?", "answer": "x"': "not JSON: {",
    '{"image": "a.jpg", "question": "?", "answer": "x"} {}': "not JSON: {",
    "[" * 100_000: "not JSON: [[[",
    "9" * 10_000: "not JSON: 999",
    '"text"': 'not a JSON object: "text"',
    "[1, 2]": "not a JSON object: [1, 2]",
    "null": "not a JSON object: null",
    '{"question": "?", "answer": "x"}': "no `image` with a path",
    '{"image": "", "question": "?", "answer": "x"}': "no `image` with a path",
    '{"image": 3, "question": "?", "answer": "x"}': "no `image` with a path",
    '{"image": null, "question": "?", "answer": "x"}': "no `image` with a path",
    '{"images": [], "question": "?", "answer": "x"}': "no `image` with a path",
    '{"images": ["a.jpg", null], "question": "?", "answer": "x"}': "no `image` with a path",
    '{"images": ["a.jpg", " "], "question": "?", "answer": "x"}': "no `image` with a path",
    '{"images": {"a.jpg": 1}, "question": "?", "answer": "x"}': "no `image` with a path",
    '{"image": "a.jpg", "images": ["a.jpg"], "question": "?", "answer": "x"}': "`images` and `image` are both given",
    '{"image": "a.jpg"}': "no `label`, and no `question` with its `answer`",
    '{"image": "a.jpg", "question": "?"}': "no `label`, and no `question` with its `answer`",
    '{"image": "a.jpg", "answer": "x"}': "no `label`, and no `question` with its `answer`",
    '{"image": "a.jpg", "question": "?", "answer": null}': "no `label`, and no `question` with its `answer`",
    '{"image": "a.jpg", "question": "?", "answer": true}': "`answer` is not text: true",
    '{"image": "a.jpg", "question": ["?"], "answer": "x"}': '`question` is not text: ["?"]',
    '{"image": "a.jpg", "label": {"name": "약과"}}': '`label` is not text: {"name": "약과"}',
    '{"image": "a.jpg", "question": "?", "answer": "x", "split": 1.5e3, "label": []}': "`label` is not text: []",
    '{"image": "a.jpg", "question": "?", "answer": "x", "split": ["train"]}': '`split` is not text: ["train"]',
    '{"image": "a.jpg", "question": "?", "answer": "\\ud800"}': "half a character, which is not text: {",
    '{"image": "\\udc80.jpg", "question": "?", "answer": "x"}': "half a character, which is not text: {",
    '{"image": "a.jpg", "question": "?", "answer": ["\\ud800"]}': "half a character, which is not text: {",
}


@pytest.mark.parametrize("line", BAD_LINES, ids=range(len(BAD_LINES)))
def test_a_bad_line_is_refused_by_its_number_and_other_lines_are_kept(tmp_path: Path, line: str) -> None:
    (tmp_path / "a.jpg").write_bytes(encoded(picture()))
    sound = [json.dumps({"image": "a.jpg", "question": f"{n}?", "answer": "x"}) for n in range(3)]
    path = write_lines(tmp_path / "list.jsonl", sound[0], "", line, "  \t", *sound[1:], "")
    (bad,) = (record for record in scan(path) if record.problem)
    assert (bad.source, bad.problem) == ("list.jsonl:3", "bad_row")
    assert bad.detail.startswith(BAD_LINES[line]) and len(bad.detail) < 300
    manifest = packed(path, tmp_path / "out", replace(SMALL, max_rejected=0.5))
    assert sum(shard.samples for shard in manifest.shards) == 3
    assert refused(tmp_path / "out") == [("list.jsonl:3", "bad_row", bad.detail)]


def test_empty_texts_and_missing_files_are_refused_with_the_pictures_name(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(encoded(picture()))
    rows = [
        {"image": "a.jpg", "question": " ", "answer": "x"},
        {"image": "a.jpg", "question": "?", "answer": "\n"},
        {"image": "a\0.jpg", "question": "?", "answer": "x"},
        {"image": "../none.jpg", "question": "?", "answer": "x"},
        {"image": "a.jpg", "question": " ? ", "answer": 3},
        {"image": ".\\A.JPG", "question": "?", "answer": 2.5},
    ]
    records = scan(write_jsonl(tmp_path / "list.jsonl", rows))
    assert Counter((r.source, r.problem, r.detail) for r in records) == {
        ("a.jpg", "bad_row", "no question"): 1,
        ("a.jpg", "bad_row", "no answer"): 1,
        ("a\0.jpg", "missing", "no such file"): 1,
        ("../none.jpg", "missing", "no such file"): 1,
        ("a.jpg", None, ""): 2,
    }
    assert {r.columns for r in records if r.problem is None} == {
        (("question", "?"), ("answer", "3")),
        (("question", "?"), ("answer", "2.5")),
    }


def test_empty_cells_of_a_question_csv_are_refused_with_the_pictures_name(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(encoded(picture()))
    header = "image_path,question,answer"
    path = write_lines(tmp_path / "list.csv", header, "a.jpg,,x", "a.jpg,?,", "a.jpg,?", ",?,x", "a.jpg,?,x")
    assert Counter((r.source, r.problem, r.detail) for r in scan(path)) == {
        ("a.jpg", None, ""): 1,
        ("a.jpg", "bad_row", "no answer"): 1,
        ("a.jpg", "bad_row", "no question"): 1,
        ("list.csv:4", "bad_row", "not 3 columns: a.jpg,?"): 1,
        ("list.csv:5", "bad_row", "not 3 columns: ,?,x"): 1,
    }


def test_a_jsonl_must_be_utf8_with_or_without_a_byte_order_mark(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(encoded(picture()))
    line = json.dumps({"image": "a.jpg", "question": "무엇?\u2028\x85", "answer": "회"}, ensure_ascii=False)
    for name, data in (
        ("plain", line.encode()),
        ("mark", b"\xef\xbb\xbf" + line.encode() + b"\r\n"),
        ("windows", line.encode() + b"\r\n\r\n"),
    ):
        (record,) = scan(write_lines(tmp_path / f"{name}.jsonl", data))
        assert (record.problem, dict(record.columns)["answer"]) == (None, "회"), name
    for encoding in ("cp949", "utf-16"):
        data = '{"image": "a.jpg", "question": "?", "answer": "불고기"}'.encode(encoding)
        path = write_lines(tmp_path / f"{encoding}.jsonl", data)
        with pytest.raises(
            SourceError, match=rf"{encoding}\.jsonl is not UTF-8: byte \d+ of the file → save it as UTF-8"
        ):
            scan(path)
    with pytest.raises(SourceError, match=r"--encoding does not go with the jsonl .* → leave it out"):
        scan(tmp_path / "plain.jsonl", encoding="cp949")
    for data in (b"", b"\n \n"):
        with pytest.raises(SourceError, match="holds no pictures"):
            scan(write_lines(tmp_path / "nothing.jsonl", data))


def test_a_question_csv_in_cp949_is_read_like_any_other(tmp_path: Path) -> None:
    (tmp_path / "상차림.jpg").write_bytes(encoded(picture()))
    path = tmp_path / "list.csv"
    path.write_bytes("image_path,question,answer\n상차림.jpg|상차림.jpg,무엇이 보이나요?,회\n".encode("cp949"))
    (record,) = scan(path)
    assert [(r.source, r.problem) for r in record.pictures] == [("상차림.jpg", None)] * 2
    assert record.columns == (("question", "무엇이 보이나요?"), ("answer", "회"))


@pytest.mark.parametrize("header", ["image_path,question", "image_path,answer", "question,answer", "image_path"])
def test_a_csv_with_missing_columns_is_refused_and_both_headers_are_named(tmp_path: Path, header: str) -> None:
    message = "has the columns .* → .*`image_path,label` or `image_path,question,answer`"
    with pytest.raises(SourceError, match=message):
        scan(write_lines(tmp_path / "list.csv", header, "a.jpg,x"))
    with pytest.raises(SourceError, match=message):
        scan(write_lines(tmp_path / "list.csv", "image_path,question,answer,Answer", "a.jpg,?,x,x"))


# --- paths


def test_a_vertical_bar_separates_paths_unless_it_is_part_of_a_name(tmp_path: Path) -> None:
    for seed, name in enumerate(
        ("a.jpg", "b.jpg", "a.jpg|b.jpg", "x|y.jpg", unicodedata.normalize("NFD", "회|밥.jpg"))
    ):
        (tmp_path / name).write_bytes(encoded(picture(seed)))
    cells = {
        "a.jpg|b.jpg": ["a.jpg|b.jpg"],
        " a.jpg | b.jpg ": ["a.jpg", "b.jpg"],
        "b.jpg|A.JPG": ["b.jpg", "a.jpg"],
        "b.jpg|a.jpg|b.jpg": ["b.jpg", "a.jpg", "b.jpg"],
        "x|y.jpg": ["x|y.jpg"],
        "X|Y.jpg": ["x|y.jpg"],
        "회|밥.jpg": ["회|밥.jpg"],
        "a.jpg|": ["a.jpg|"],
        "|": ["|"],
    }
    for cell, expected in cells.items():
        path = write_lines(tmp_path / "list.csv", "image_path,question,answer", f"{cell},?,x")
        (record,) = scan(path)
        assert [picture.source for picture in record.pictures] == expected, cell
        assert record.problem == (None if cell.strip("|") == cell else "missing"), cell
        if record.problem is None:
            assert all(read_picture(picture) for picture in record.pictures)
    (record,) = scan(write_jsonl(tmp_path / "list.jsonl", [{"images": ["a.jpg|b.jpg", "b.jpg"], **ASK}]))
    assert [picture.source for picture in record.pictures] == ["a.jpg|b.jpg", "b.jpg"]


def test_each_picture_of_a_row_is_found_and_named_like_a_single_one(tmp_path: Path) -> None:
    apart = unicodedata.normalize("NFD", "구이")
    for seed, name in enumerate((f"{apart}/A.JPG", "b/Foo.jpg", "B/foo.jpg")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(encoded(picture(seed)))
    rows = [
        {"images": ["구이/a.jpg", f"{tmp_path}/b/Foo.jpg", "구이\\A.jpg"], **ASK},
        {"images": ["구이/a.jpg", "b/FOO.jpg"], **ASK},
    ]
    found, several = sorted(scan(write_jsonl(tmp_path / "list.jsonl", rows)), key=lambda record: str(record.problem))
    assert [picture.source for picture in found.pictures] == ["구이/A.JPG", "b/Foo.jpg", "구이/A.JPG"]
    assert all(read_picture(picture) for picture in found.pictures)
    assert (several.source, several.problem) == ("구이/A.JPG", "ambiguous_path")
    assert several.detail == "b/FOO.jpg: may be any of B/foo.jpg, b/Foo.jpg"


def test_each_picture_of_a_row_gets_its_own_crop_box(tmp_path: Path) -> None:
    half = Image.new("RGB", (200, 100), (200, 0, 0))
    half.paste((0, 0, 200), (100, 0, 200, 100))
    for name in ("one/a", "two/b", "two/c"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        half.save(tmp_path / f"{name}.jpg", quality=95)
    (tmp_path / "one" / "crop_area.properties").write_text("a=0,0,100,100")
    (tmp_path / "two" / "crop_area.properties").write_text("b=100,0,100,100\nnonsense")
    rows = [{"images": ["one/a.jpg", "two/b.jpg", "two/c.jpg"], **ASK}]
    source = write_jsonl(tmp_path / "list.jsonl", rows)
    scanned = scan_source(source)
    (record,) = scanned.records
    assert [picture.box for picture in record.pictures] == [(0, 0, 100, 100), (100, 0, 100, 100), None]
    assert (scanned.boxes.lists, scanned.boxes.lines_malformed, scanned.boxes.lines_unmatched) == (2, 1, 0)
    manifest = packed(source, tmp_path / "out", replace(SMALL, crop_boxes=True))
    assert manifest.raw["crop_boxes"] == {"cropped": 2, "without_box": 1, "unusable_box": 0}
    ((sample,),) = samples(tmp_path / "out").values()
    shown = [decode_rgb(jpeg)[16] for jpeg in sample.pictures]
    assert [(bool(row[4][2] > row[4][0]), bool(row[28][2] > row[28][0])) for row in shown] == [
        (False, False),
        (True, True),
        (False, True),
    ]


# --- rows compared with other rows


def test_a_repeated_row_is_refused_and_a_row_with_another_text_is_not(tmp_path: Path) -> None:
    for name in ("a.jpg", "b.jpg"):
        (tmp_path / name).write_bytes(encoded(picture(ord(name[0]))))
    rows: list[Row] = [
        {"images": ["a.jpg"], "question": "?", "answer": "x"},
        {"images": ["A.jpg"], "question": " ?", "answer": "x "},
        {"images": ["a.jpg"], "question": "?", "answer": "y"},
        {"images": ["a.jpg"], "question": "??", "answer": "x"},
        {"images": ["a.jpg", "b.jpg"], "question": "?", "answer": "x"},
        {"images": ["b.jpg", "a.jpg"], "question": "?", "answer": "x"},
        {"images": ["a.jpg", "./b.jpg"], "question": "?", "answer": "x"},
    ]
    for source in (write_csv(tmp_path / "list.csv", rows), write_jsonl(tmp_path / "list.jsonl", rows)):
        out = tmp_path / f"of-{source.suffix}"
        packed(source, out, replace(SMALL, max_rejected=0.5))
        assert refused(out) == [("a.jpg", "duplicate_row", "listed before with the same words")] * 2
        assert found_in(out) == output([rows[n] for n in (0, 2, 3, 4, 5)])


def test_a_row_without_a_label_among_labelled_ones_is_refused_by_name(folder: Path, tmp_path: Path) -> None:
    """Either all samples of a data set have a class, or none has one."""
    rows = [{"image": name, "label": "약과"} for name in names(folder)[:8]]
    rows.append({"image": names(folder)[8], **ASK})
    rows.append({"image": names(folder)[9], "label": " ", **ASK})
    out = tmp_path / "out"
    manifest = packed(
        write_jsonl(tmp_path / "list.jsonl", rows), out, replace(SMALL, image_root=folder, max_rejected=0.3)
    )
    assert refused(out) == [(names(folder)[n], "bad_label", "no label") for n in (8, 9)]
    assert manifest.columns == ("category", "label")
    assert verify(out) == []
    none = [{"image": name, "label": " ", **ASK} for name in names(folder)[:8]]
    manifest = packed(write_jsonl(tmp_path / "list.jsonl", none), tmp_path / "none", replace(SMALL, image_root=folder))
    assert (manifest.columns, manifest.classes) == (("answer", "question"), ())


# --- options that need classes


@pytest.fixture
def questions(folder: Path, tmp_path: Path) -> Path:
    """Return a packed list of questions."""
    packed(write_jsonl(tmp_path / "q.jsonl", asked(folder)), tmp_path / "questions", replace(SMALL, image_root=folder))
    return tmp_path / "questions"


@pytest.mark.parametrize("form", ["csv", "jsonl"])
def test_options_about_classes_are_refused_for_a_list_of_questions(folder: Path, tmp_path: Path, form: str) -> None:
    listed = write_lines(tmp_path / "classes.tsv", "category\tname", "한과\t약과")
    write = write_csv if form == "csv" else write_jsonl
    source = write(tmp_path / f"list.{form}", asked(folder))
    options = replace(SMALL, image_root=folder)
    message = rf"list\.{form} has no labels, but --classes needs them → leave --classes out"
    with pytest.raises(SourceError, match=message):
        pack(source, tmp_path / "out", replace(options, classes=listed))
    with pytest.raises(SourceError, match="no labels, but --per-class needs them → leave --per-class out"):
        pack(source, tmp_path / "out", replace(options, per_class=3))
    assert not (tmp_path / "out").exists()


def test_a_list_of_only_bad_labels_is_refused_as_such_with_a_class_list_too(tmp_path: Path) -> None:
    listed = write_lines(tmp_path / "classes.tsv", "category\tname", "한과\t약과")
    source = write_lines(tmp_path / "list.csv", "image_path,label", "only one cell", "a.jpg,")
    with pytest.raises(SourceError, match=r"2 of 2 inputs .* bad_label 1, bad_row 1"):
        pack(source, tmp_path / "out", replace(SMALL, classes=listed))


def test_class_balance_without_classes_is_refused(questions: Path) -> None:
    plain = build_data({"shards": str(questions)}, "data")
    order = build_data_order(open_mixture(plain, "train"), plain)
    assert order.epoch_length == len(open_split(questions, "train"))
    balanced = build_data({"shards": str(questions), "class_balance": 0.5}, "data")
    with pytest.raises(RecipeError, match=r"class_balance is set, and the samples have no classes → leave it out"):
        build_data_order(open_mixture(balanced, "train"), balanced)


def test_a_mixture_with_one_folder_without_classes_is_not_balanced(
    folder: Path, tmp_path: Path, questions: Path
) -> None:
    rows = [{"images": [name], "label": "약과"} for name in names(folder)]
    packed(write_jsonl(tmp_path / "l.jsonl", rows), tmp_path / "labels", replace(SMALL, image_root=folder))
    mix = {"shards": str(tmp_path / "labels"), "mix": [{"shards": str(questions)}]}
    mixture = open_mixture(build_data(mix, "data"), "train")
    assert [dish.name for dish in mixture.classes] == ["약과"]
    assert mixture.read(len(mixture) - 1).columns["question"]
    data = build_data(mix | {"class_balance": 1}, "data")
    with pytest.raises(RecipeError, match="class_balance"):
        build_data_order(mixture, data)


def test_kfood_order_accepts_a_folder_without_classes_and_refuses_balance(questions: Path, capsys) -> None:
    assert main(["order", str(questions)]) == 0
    assert capsys.readouterr().out.count("train-") == len(open_split(questions, "train"))
    assert main(["order", str(questions), "--class-balance", "1"]) == 2
    assert "the samples have no classes → " in capsys.readouterr().err


def test_pictures_of_a_sample_are_squares_of_the_requested_size(questions: Path) -> None:
    for found in samples(questions).values():
        for sample in found:
            for jpeg in sample.pictures:
                with Image.open(io.BytesIO(jpeg)) as image:
                    assert (image.format, image.size) == ("JPEG", (32, 32))
            assert (sample.columns["width"], sample.columns["height"]) == (32, 32)


def test_texts_are_converted_to_nfc_and_null_counts_as_missing(folder: Path, tmp_path: Path) -> None:
    """macOS writes Hangul in NFD, and pandas writes a missing cell as null."""
    row = {"image": names(folder)[0], "label": None, "split": None}
    row |= {name: unicodedata.normalize("NFD", text) for name, text in ASK.items()}
    [record] = scan(write_lines(tmp_path / "list.jsonl", json.dumps(row)), folder)
    assert record.problem is None
    assert dict(record.columns) == ASK and record.label == ""
