import contextlib
import csv
import errno
import fcntl
import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections import Counter, defaultdict
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np
import pillow_heif
import pytest
from pictures import encoded, folder_bytes, picture, write_folder
from PIL import Image

from kfood_dist.cli import main
from kfood_dist.data.picture.images import decode_rgb
from kfood_dist.data.shards.manifest import load_manifest, with_checksum
from kfood_dist.data.shards.reader import INDEX_DTYPE, NO_LABEL, open_split
from kfood_dist.data.shards.tars import write_tar
from kfood_dist.data.shards.verify import verify
from kfood_dist.data.task.dish import is_match
from kfood_dist.errors import KfoodError, ShardError, SourceError
from kfood_dist.pack import chunks, job
from kfood_dist.pack.chunks import prepare_chunk
from kfood_dist.pack.job import pack
from kfood_dist.pack.options import PackOptions
from kfood_dist.pack.prepare import in_processes, made_by
from kfood_dist.pack.sources import scan
from kfood_dist.pack.subset import choose_subset
from kfood_dist.system.words import plural

SMALL = PackOptions(image_size=32, shard_size=10, workers=1)
DISHES = {"구이/구이/불고기": 15, "한과/한과/약과": 15, "만두/만두": 15}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Three dishes of fifteen pictures."""
    return write_folder(tmp_path_factory.mktemp("pictures") / "source", DISHES)


def rejected(folder_or_file: Path) -> dict[str, str]:
    path = folder_or_file / "rejected.csv" if folder_or_file.is_dir() else folder_or_file
    with open(path, encoding="utf-8", newline="") as file:
        return {row["source"]: row["reason"] for row in csv.DictReader(file)}


def sources_by_split(folder: Path) -> dict[str, list[str]]:
    splits = json.loads((folder / "manifest.json").read_text())["splits"]
    found = {}
    for name in (name for name, output in splits.items() if output["samples"]):
        split = open_split(folder, name)
        found[name] = [split.read(i).columns["sources"][0] for i in range(len(split))]
    return found


# --- the result


def test_a_folder_becomes_stratified_shuffled_splits(source, tmp_path):
    packed = pack(source, tmp_path / "out", SMALL)
    manifest = packed.manifest
    assert not packed.reused
    assert {k: v["samples"] for k, v in manifest.raw["splits"].items()} == {"train": 36, "val": 3, "test": 6}
    assert manifest.raw["splits"]["train"]["per_class"] == {"만두": 12, "불고기": 12, "약과": 12}
    assert [s.samples for s in manifest.shards_of("train")] == [10, 10, 10, 6]
    by_split = sources_by_split(tmp_path / "out")
    assert Counter(s for sources in by_split.values() for s in sources).total() == 45
    assert len({s for sources in by_split.values() for s in sources}) == 45
    assert by_split["train"] != sorted(by_split["train"])
    first_shard = {Path(s).parent.name for s in by_split["train"][:10]}
    assert first_shard == {"불고기", "약과", "만두"}
    assert verify(tmp_path / "out") == []
    assert rejected(tmp_path / "out") == {}


def test_the_bytes_do_not_depend_on_workers_place_or_file_order(source, tmp_path):
    pack(source, tmp_path / "one", SMALL)
    pack(source, tmp_path / "two", replace(SMALL, workers=2))
    moved = tmp_path / "elsewhere" / "source"
    for path in sorted(source.rglob("*.jpg"), reverse=True):
        target = moved / path.relative_to(source)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(path.read_bytes())
    pack(moved, tmp_path / "three", SMALL)
    assert folder_bytes(tmp_path / "one") == folder_bytes(tmp_path / "two") == folder_bytes(tmp_path / "three")


def test_another_seed_gives_other_splits_and_another_order(source, tmp_path):
    pack(source, tmp_path / "zero", SMALL)
    pack(source, tmp_path / "one", replace(SMALL, seed=1))
    zero, one = sources_by_split(tmp_path / "zero"), sources_by_split(tmp_path / "one")
    assert set(zero["val"]) != set(one["val"])
    assert zero["train"] != one["train"]


def test_copies_of_a_picture_stay_in_one_split_and_share_a_group(tmp_path):
    source = write_folder(tmp_path / "source", {"한과/약과": 30})
    for path in sorted((source / "한과/약과").iterdir())[:12]:
        for n in (1, 2):
            path.with_stem(f"{path.stem}_{n}").write_bytes(path.read_bytes())
    manifest = pack(source, tmp_path / "out", SMALL).manifest
    assert sum(output["groups"] for output in manifest.raw["splits"].values()) == 30
    splits_of, groups_of = defaultdict(set), defaultdict(set)
    for name in manifest.splits:
        split = open_split(tmp_path / "out", name)
        for i in range(len(split)):
            output = split.read(i).columns
            stem = Path(output["sources"][0]).stem[:8]
            splits_of[stem].add(name)
            groups_of[stem].add(output["group"])
    assert len(splits_of) == 30
    assert all(len(found) == 1 for found in [*splits_of.values(), *groups_of.values()])


def test_every_kind_of_file_is_packed(tmp_path):
    folder = tmp_path / "source" / "한과" / "약과"
    folder.mkdir(parents=True)
    kinds = {".JPG": "JPEG", ".jpeg": "JPEG", ".png": "PNG", ".gif": "GIF", ".bmp": "BMP"}
    for i, (suffix, kind) in enumerate(kinds.items()):
        (folder / f"{i}{suffix}").write_bytes(encoded(picture(i), kind))
    manifest = pack(tmp_path / "source", tmp_path / "out", SMALL).manifest
    assert sum(output["samples"] for output in manifest.raw["splits"].values()) == 5


def test_a_list_of_classes_fixes_their_ids_and_names(source, tmp_path):
    listed = tmp_path / "classes.tsv"
    rows = ["category\tname\taliases", "과자\t유과\t", "과자\t유밀과\t약과", "구이\t불고기\t", "만두\t만두\t"]
    listed.write_text("\n".join(rows), encoding="utf-8")
    manifest = pack(source, tmp_path / "out", replace(SMALL, classes=listed)).manifest
    assert [c.name for c in manifest.classes] == ["유과", "유밀과", "불고기", "만두"]
    assert manifest.raw["splits"]["train"]["per_class"] == {"유과": 0, "유밀과": 12, "불고기": 12, "만두": 12}
    split = open_split(tmp_path / "out", "train")
    renamed = next(i for i, label in enumerate(split.labels()) if split.classes[label].name == "유밀과")
    output = split.read(renamed).columns
    assert (output["label"], output["category"]) == ("유밀과", "과자")
    assert "약과" in output["sources"][0]


# --- refused inputs


def test_each_unusable_input_is_named_and_the_packing_continues(tmp_path):
    source = write_folder(tmp_path / "source", {"한과/약과": 30, "구이/불고기": 30})
    folder = source / "한과" / "약과"
    (folder / "empty.jpg").write_bytes(b"")
    (folder / "text.jpg").write_bytes(b"not a picture")
    (folder / "cut.jpg").write_bytes(encoded(picture(1000))[:-300])
    (folder / "tiny.png").write_bytes(encoded(picture(1001, 20, 90), "PNG"))
    (folder / "bomb.png").write_bytes(encoded(Image.new("1", (30_000, 4000)), "PNG"))
    twice = encoded(picture(1002))
    (folder / "twice.jpg").write_bytes(twice)
    (source / "구이" / "불고기" / "twice.jpg").write_bytes(twice)
    manifest = pack(source, tmp_path / "out", replace(SMALL, max_rejected=0.2)).manifest
    assert rejected(tmp_path / "out") == {
        "한과/약과/empty.jpg": "empty",
        "한과/약과/text.jpg": "unreadable",
        "한과/약과/cut.jpg": "unreadable",
        "한과/약과/tiny.png": "too_small",
        "한과/약과/bomb.png": "too_large",
        "한과/약과/twice.jpg": "ambiguous",
        "구이/불고기/twice.jpg": "ambiguous",
    }
    assert manifest.raw["rejected"]["by_reason"] == {
        "ambiguous": 2,
        "unreadable": 2,
        "empty": 1,
        "too_large": 1,
        "too_small": 1,
    }
    assert manifest.raw["rejected"]["count"] == 7
    assert sum(output["samples"] for output in manifest.raw["splits"].values()) == 60
    assert verify(tmp_path / "out") == []


def test_heic_without_its_package_is_refused_by_name_and_used_once_it_is_there(tmp_path, capsys, monkeypatch):
    source = write_folder(tmp_path / "source", {"한과/약과": 18})
    for i in range(2):
        phone = io.BytesIO()
        pillow_heif.from_pillow(picture(50 + i)).save(phone)
        (source / "한과" / "약과" / f"phone{i}.jpg").write_bytes(phone.getvalue())  # a browser may name it .jpg
    words = ["pack", str(source), str(tmp_path / "out"), "--image-size", "32", "--workers", "1"]
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "pillow_heif", None)
        assert main(words) == 2
        assert "needs_heic_extra 2 → " in (output := capsys.readouterr().err)
        assert "pip install 'kfood_dist[heic]'; repair the source" in output
        assert main([*words, "--max-rejected", "0.1"]) == 0
    output = capsys.readouterr().out
    assert "needs_heic_extra 2; all named in" in output
    assert "WARNING  2 HEIC pictures are refused: pip install 'kfood_dist[heic]', remove" in output
    assert set(rejected(tmp_path / "out").values()) == {"needs_heic_extra"}
    assert "pillow-heif → pip install 'kfood_dist[heic]'" in (tmp_path / "out/rejected.csv").read_text()
    words[2] = str(tmp_path / "again")
    assert main(words) == 0
    assert "packed   20 samples" in capsys.readouterr().out


def test_a_picture_refused_for_a_missing_package_is_prepared_again_once_it_is_installed(monkeypatch):
    def unless_heif(name):
        if name == "pillow-heif":
            raise PackageNotFoundError(name)
        return version(name)

    with monkeypatch.context() as patch:
        patch.setattr("importlib.metadata.version", unless_heif)
        without = made_by()
    assert without["pillow-heif"] is None
    assert made_by() == {**without, "pillow-heif": version("pillow-heif")}


def test_too_many_refused_inputs_leave_only_the_list_of_them(tmp_path):
    source = write_folder(tmp_path / "source", {"한과/약과": 18})
    for i in range(2):
        (source / "한과" / "약과" / f"empty{i}.jpg").write_bytes(b"")
    out = tmp_path / "out"
    fault = r"2 of 20 inputs \(10.0%\).*, more than --max-rejected 0.05: empty 2 → .*out.rejected.csv"
    with pytest.raises(SourceError, match=fault):
        pack(source, out, SMALL)
    assert sorted(p.name for p in tmp_path.iterdir()) == [".out.partial", "out.rejected.csv", "source"]
    assert set(rejected(tmp_path / "out.rejected.csv").values()) == {"empty"}
    pack(source, out, replace(SMALL, max_rejected=0.1))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "source"]
    assert len(rejected(out)) == 2
    with pytest.raises(SourceError, match=r"was packed with 10.0% of its inputs refused"):
        pack(source, out, SMALL)


def test_labels_of_another_class_list_are_named_with_the_remedy(tmp_path):
    source = write_folder(tmp_path / "source", {"빵/French toast": 9, "면/라면": 3, "만두/만두": 4})
    (tmp_path / "classes.tsv").write_text("category\tname\n만두\t만두\n", encoding="utf-8")
    options = replace(SMALL, classes=tmp_path / "classes.tsv")
    with pytest.raises(SourceError) as caught:
        pack(source, tmp_path / "out", options)
    message = str(caught.value)
    assert "12 of 16 inputs (75.0%) cannot be used" in message and "more than --max-rejected 0.05" in message
    assert f"2 labels are not in the class list {options.classes}: Frenchtoast 9, 라면 3 → " in message
    assert "leave --classes out to take the labels found as the classes, or add them to the list" in message
    assert "raise --max-rejected" not in message
    for number in range(20):
        write_folder(tmp_path / "many", {f"dish {number}": 1})
    with pytest.raises(SourceError, match=r"20 labels are not in .*: dish0 1, dish1 1, .*, … → "):
        pack(tmp_path / "many", tmp_path / "out", options)


LABELS = (
    "매운_떡볶이",
    "매운_라면",
    "떡국_만두국",
    "떡국",
    "french_toast",
    "french_fries",
    "spaghetti_carbonara",
    "가" * 13,
)


def test_an_answer_is_right_for_at_most_one_of_the_classes_found(tmp_path):
    source = write_folder(tmp_path / "source", dict.fromkeys(LABELS, 3))
    manifest = pack(source, tmp_path / "out", SMALL).manifest
    assert manifest.raw["class_list"] is False
    assert {dish.name for dish in manifest.classes} == set(LABELS)
    for answer in (*LABELS, "매운", "떡볶이", "만두국", "french", "가" * 12):
        right = [dish.name for dish in manifest.classes if is_match(answer, dish)]
        assert right == [name for name in LABELS if name == answer]


def test_half_of_a_class_name_is_right_with_a_class_list_and_in_old_shards(tmp_path):
    source = write_folder(tmp_path / "source", {"떡국_만두국": 3, "라면": 3})
    (tmp_path / "classes.tsv").write_text("category\tname\n국\t떡국_만두국\n면\t라면\n", encoding="utf-8")
    listed = pack(source, tmp_path / "listed", replace(SMALL, classes=tmp_path / "classes.tsv")).manifest
    assert listed.raw["class_list"] is True and is_match("만두국", listed.classes[0])
    found = pack(source, tmp_path / "found", SMALL).manifest
    assert not any(is_match("만두국", dish) for dish in found.classes)
    # A manifest of an earlier kfood does not say whether its classes came from a list.
    old = {key: value for key, value in found.raw.items() if key != "class_list"}
    (tmp_path / "found" / "manifest.json").write_bytes(with_checksum(old))
    assert any(is_match("만두국", dish) for dish in load_manifest(tmp_path / "found").classes)
    old["classes"] = [{"name": name, "category": "", "aliases": []} for name in ("매운_떡볶이", "매운_라면")]
    (tmp_path / "found" / "manifest.json").write_bytes(with_checksum(old))
    assert not any(is_match("매운", dish) for dish in load_manifest(tmp_path / "found").classes)


def test_a_source_without_a_usable_input_is_an_error_at_any_limit(tmp_path):
    (tmp_path / "source" / "약과").mkdir(parents=True)
    (tmp_path / "source" / "약과" / "a.jpg").write_bytes(b"junk")
    with pytest.raises(SourceError, match=r"1 of 1 inputs \(100.0%\) cannot be used: unreadable 1"):
        pack(tmp_path / "source", tmp_path / "out", replace(SMALL, max_rejected=1.0))
    assert not (tmp_path / "out").exists()


def test_the_list_of_refused_inputs_is_kept_if_the_folder_of_out_is_new(tmp_path):
    listed = tmp_path / "list.csv"
    listed.write_text("image_path,label\nnowhere.jpg,약과\n", encoding="utf-8")
    with pytest.raises(SourceError, match=r"1 of 1 inputs .*: missing 1 → "):
        pack(listed, tmp_path / "new" / "out", SMALL)
    assert rejected(tmp_path / "new" / "out.rejected.csv") == {"nowhere.jpg": "missing"}
    for out in (tmp_path / "list.csv" / "out", tmp_path / ("x" * 300)):
        with pytest.raises(KfoodError, match=r"cannot write .* → check the folder's permissions"):
            pack(listed, out, SMALL)


def test_a_list_of_pictures_in_another_folder_points_to_the_image_root(tmp_path, source):
    rows = [f"{p.relative_to(source)},{p.parent.name}" for p in sorted(source.rglob("*.jpg"))]
    listed = tmp_path / "list.csv"
    listed.write_text("\n".join(["image_path,label", *rows]), encoding="utf-8")
    with pytest.raises(SourceError, match=r"missing 45 → .*--image-root"):
        pack(listed, tmp_path / "out", SMALL)
    options = replace(SMALL, image_root=source)
    manifest = pack(listed, tmp_path / "out", options).manifest
    assert manifest.raw["source"]["kind"] == "csv"
    pack(source, tmp_path / "folder", SMALL)
    assert sources_by_split(tmp_path / "out") == sources_by_split(tmp_path / "folder")


# --- OUT


def test_a_complete_out_is_reused_and_another_data_set_is_left_alone(source, tmp_path):
    out = tmp_path / "out"
    pack(source, out, SMALL)
    before, made = folder_bytes(out), (out / "manifest.json").stat().st_mtime_ns
    assert pack(source, out, replace(SMALL, workers=2)).reused
    with pytest.raises(SourceError, match="holds another data set"):
        pack(source, out, replace(SMALL, seed=1))
    altered = shutil.copytree(source, tmp_path / "altered")
    next(altered.rglob("*.jpg")).write_bytes(encoded(picture(99), quality=100))
    with pytest.raises(SourceError, match="holds another data set"):
        pack(altered, out, SMALL)
    assert folder_bytes(out) == before
    assert (out / "manifest.json").stat().st_mtime_ns == made
    os.truncate(out / "train-000000.tar", 100)
    with pytest.raises(ShardError, match=r"train-000000.tar has 100 bytes"):
        pack(source, out, SMALL)


def test_an_out_with_other_files_is_left_alone_and_an_empty_one_filled(source, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    pack(source, out, SMALL)
    assert verify(out) == []
    busy = tmp_path / "busy"
    busy.mkdir()
    (busy / "thesis.txt").write_text("years of work")
    with pytest.raises(SourceError, match=r"busy already exists and is not a packed data set"):
        pack(source, busy, SMALL)
    assert folder_bytes(busy) == {"thesis.txt": b"years of work"}
    with pytest.raises(SourceError, match=r"thesis.txt already exists"):
        pack(source, busy / "thesis.txt", SMALL)


def test_shards_that_read_back_damaged_are_not_published_and_not_kept(source, tmp_path, monkeypatch):
    out = tmp_path / "deep" / "out"
    with monkeypatch.context() as patch:
        patch.setattr("kfood_dist.pack.job.verify", lambda folder: [f"{folder.name} is bad"])
        with pytest.raises(KfoodError, match="damaged when read back"):
            pack(source, out, SMALL)
    assert not out.exists()
    assert not list((tmp_path / "deep").rglob("*.tar"))
    pack(source, out, SMALL)
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["out"]


def slow_source(root: Path) -> Path:
    """Write a source with enough work for a kill to hit: large pictures that differ in the bytes after their end."""
    large = encoded(picture(1, 2000, 1500))
    for dish in ("불고기", "약과"):
        (root / dish).mkdir(parents=True)
        for i in range(300):
            (root / dish / f"{i}.jpg").write_bytes(large + f"{dish}{i}".encode())
    return root


def start(source: Path, out: Path, *words: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "kfood_dist", "pack", source, out, "--image-size", "32", "--workers", "2", *words]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)


def start_and_wait_for_a_chunk(source: Path, out: Path) -> tuple[subprocess.Popen, list[int]]:
    process = start(source, out)
    chunks = out.parent / f".{out.name}.partial" / "chunks"
    while not any(chunks.glob("*.chunk")):
        assert process.poll() is None, "ended before it could be interrupted"
        time.sleep(0.005)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    while not all(ignores_interrupts(child) for child in children):  # the last worker may still be starting
        assert process.poll() is None, "ended before it could be interrupted"
        time.sleep(0.005)
    return process, [int(child) for child in children]


def ignores_interrupts(pid: str) -> bool:
    mask = next(s for s in Path(f"/proc/{pid}/status").read_text().splitlines() if s.startswith("SigIgn"))
    return bool(int(mask.split()[1], 16) >> (signal.SIGINT - 1) & 1)


def assert_gone(pids: list[int]) -> None:
    for _ in range(1000):
        # A zombie that its new parent has not yet reaped counts as gone.
        alive = [p for p in pids if (s := Path(f"/proc/{p}/stat")).exists() and s.read_text().split()[2] != "Z"]
        if not alive:
            return
        time.sleep(0.02)
    raise AssertionError(f"workers {alive} still run after the process that started them has ended")


@pytest.fixture(scope="module")
def slow(tmp_path_factory):
    """A source that takes a few seconds to pack, and the files that an undisturbed packing makes of it."""
    root = tmp_path_factory.mktemp("slow")
    source = slow_source(root / "source")
    pack(source, root / "undisturbed", PackOptions(image_size=32, workers=2))
    return source, folder_bytes(root / "undisturbed")


def test_a_killed_packing_resumes_and_leaves_no_workers(slow, tmp_path):
    source, undisturbed = slow
    out = tmp_path / "out"
    process, workers = start_and_wait_for_a_chunk(source, out)
    process.kill()
    process.wait()
    process.stderr.close()
    assert len(workers) >= 2
    assert_gone(workers)
    assert not out.exists()
    chunks = tmp_path / ".out.partial" / "chunks"
    first = next(chunks.glob("*.chunk"))
    made = first.stat().st_mtime_ns, first.stat().st_ino
    second = start(source, out)
    while second.poll() is None and (path := chunks / first.name).exists():
        with contextlib.suppress(FileNotFoundError):
            assert (path.stat().st_mtime_ns, path.stat().st_ino) == made
        time.sleep(0.05)
    assert second.wait(timeout=60) == 0
    second.stderr.close()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert folder_bytes(out) == undisturbed


def test_a_packing_killed_at_many_instants_gives_the_same_bytes(slow, tmp_path, one_in):
    source, undisturbed = slow
    out = tmp_path / "out"
    moments = random.Random(0)
    kills = 0
    while not out.exists():
        process = start(source, out)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=moments.uniform(0.3, 1.4) if kills < 12 // one_in(3) else 120)
        os.killpg(process.pid, signal.SIGKILL) if process.poll() is None else None
        kills += process.wait() != 0
        process.stderr.close()
    assert kills >= 2
    assert folder_bytes(out) == undisturbed
    assert start(source, out).wait() == 0


def test_an_array_makes_one_data_set_though_one_part_was_killed(slow, tmp_path):
    source, undisturbed = slow
    out = tmp_path / "out"
    packers = [start(source, out, "--part", f"{part}/3") for part in (1, 2, 3)]
    time.sleep(1)
    packers[1].kill()
    assert [packer.wait(timeout=120) for packer in (packers[0], packers[2])] == [0, 0]
    assert folder_bytes(out) == undisturbed
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    for packer in packers:
        packer.stderr.close()


def killed_after(num_chunks):
    """Return a `prepare_chunk` that ends the packer after `num_chunks` chunks."""

    def prepare(chunk, **words):
        prepare_chunk(chunk, **words)
        done.append(chunk)
        if len(done) == num_chunks:
            raise SystemExit("killed")

    done = []
    return prepare


@pytest.mark.parametrize("again", [[(1, 2), (2, 2)], [(1, 3), (3, 3)], [(1, 1)], [(8, 8)], [(4, 9), (6, 9)]])
def test_an_array_resubmitted_in_part_finishes_with_the_same_bytes(source, tmp_path, monkeypatch, again):
    """As with `--array=3,5` after `--array=0-7`: any tasks, in any number, finish all the remaining work."""
    pack(source, tmp_path / "undisturbed", SMALL)
    monkeypatch.setattr("kfood_dist.pack.chunks.CHUNK_RECORDS", 2)
    for part in range(1, 9):
        with monkeypatch.context() as patch, pytest.raises(SystemExit):
            patch.setattr("kfood_dist.pack.job.prepare_chunk", killed_after(2 if part in (4, 6) else 3))
            pack(source, tmp_path / "out", replace(SMALL, part=part, parts=8))
    assert len(list((tmp_path / ".out.partial" / "chunks").glob("*.chunk"))) == 22
    packed = [pack(source, tmp_path / "out", replace(SMALL, part=part, parts=parts)) for part, parts in again]
    assert [one.reused for one in packed] == [False, *[True] * (len(again) - 1)]
    assert folder_bytes(tmp_path / "out") == folder_bytes(tmp_path / "undisturbed")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "undisturbed"]


def test_a_chunk_that_another_packer_prepared_meanwhile_is_not_prepared_again(source, tmp_path, monkeypatch):
    """A second packer starts when the first has prepared one chunk, and prepares all the others."""
    monkeypatch.setattr("kfood_dist.pack.chunks.CHUNK_RECORDS", 7)
    prepared = []
    real = chunks.prepare_one
    monkeypatch.setattr(chunks, "prepare_one", lambda *inputs: prepared.append(inputs[0]) or real(*inputs))

    def another_comes(chunk, **words):
        prepare_chunk(chunk, **words)
        if len(prepared) == 7:
            (tmp_path / ".out.partial/merge.lock").touch()
            with open(tmp_path / ".out.partial/merge.lock") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                assert pack(source, tmp_path / "out", replace(SMALL, part=2, parts=2)).manifest is None

    monkeypatch.setattr(job, "prepare_chunk", another_comes)
    assert pack(source, tmp_path / "out", replace(SMALL, part=1, parts=2)).manifest
    assert len(prepared) == 45


@pytest.mark.parametrize(("part", "parts", "held"), [(1, 1, "part-1-of-1.lock"), (2, 3, "part-2-of-3.lock")])
def test_two_processes_do_not_pack_the_same_part_at_once(source, tmp_path, part, parts, held):
    work = tmp_path / ".out.partial"
    work.mkdir()
    with open(work / held, "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(SourceError, match=r"another process is writing .*out"):
            pack(source, tmp_path / "out", replace(SMALL, part=part, parts=parts))
    assert pack(source, tmp_path / "out", SMALL).manifest


def test_a_packer_that_slurm_restarted_waits_for_the_lock_of_a_lost_node(source, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    (tmp_path / ".out.partial").mkdir()
    with open(tmp_path / ".out.partial" / "part-1-of-1.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        monkeypatch.setattr("kfood_dist.system.cluster.time.sleep", lambda seconds: fcntl.flock(lock, fcntl.LOCK_UN))
        assert pack(source, tmp_path / "out", SMALL).manifest
    assert f"another process is writing {tmp_path / 'out'}; waiting" in capsys.readouterr().out


def test_only_one_packer_merges(source, tmp_path, capsys):
    (tmp_path / ".out.partial").mkdir()
    with open(tmp_path / ".out.partial" / "merge.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        words = ["pack", str(source), str(tmp_path / "out"), "--image-size", "32", "--workers", "1", "--part", "1/2"]
        assert pack(source, tmp_path / "out", replace(SMALL, part=2, parts=2)).manifest is None
        assert main(words) == 0
    assert "another packer is putting" in capsys.readouterr().out
    assert pack(source, tmp_path / "out", SMALL).manifest


def test_a_damaged_chunk_is_made_again(source, tmp_path, monkeypatch):
    pack(source, tmp_path / "undisturbed", SMALL)
    monkeypatch.setattr("kfood_dist.pack.chunks.CHUNK_RECORDS", 7)
    for damage in (lambda data: data[:-100], lambda data: b"", lambda data: data[:50] + b"x" + data[51:]):
        with monkeypatch.context() as patch, pytest.raises(SystemExit):
            patch.setattr("kfood_dist.pack.job.prepare_chunk", killed_after(4))
            pack(source, tmp_path / "out", SMALL)
        victim = next((tmp_path / ".out.partial" / "chunks").glob("*.chunk"))
        victim.write_bytes(damage(victim.read_bytes()))
        pack(source, tmp_path / "out", SMALL)
        assert folder_bytes(tmp_path / "out") == folder_bytes(tmp_path / "undisturbed")
        shutil.rmtree(tmp_path / "out")


def test_other_options_reuse_the_chunks_that_still_fit(source, tmp_path, monkeypatch):
    """The split and the shard size do not change a prepared picture, but the image size does."""
    monkeypatch.setattr("kfood_dist.pack.chunks.CHUNK_RECORDS", 7)
    made = []
    monkeypatch.setattr(
        "kfood_dist.pack.job.prepare_chunk", lambda c, **words: made.append(c.name) or prepare_chunk(c, **words)
    )
    monkeypatch.setattr("kfood_dist.pack.job._merge", lambda *inputs: sys.exit("stopped"))
    for options, in_all in (
        (SMALL, 7),
        (replace(SMALL, shard_size=3, seed=5), 7),
        (replace(SMALL, image_size=48), 14),
    ):
        with pytest.raises(SystemExit, match="stopped"):
            pack(source, tmp_path / "out", options)
        assert len(made) == in_all


@pytest.mark.parametrize("other", ["pillow", "simplejpeg", "numpy", "algorithm"])
def test_chunks_of_another_version_are_prepared_again(source, tmp_path, monkeypatch, other):
    pack(source, tmp_path / "undisturbed", SMALL)
    with monkeypatch.context() as patch:
        if other == "algorithm":
            patch.setattr("kfood_dist.pack.prepare.ALGORITHM", -1)
        else:
            patch.setattr("kfood_dist.pack.prepare.version", lambda name: "0" if name == other else version(name))
        patch.setattr("kfood_dist.pack.prepare.perceptual_hash", lambda jpeg: 0)  # the result of the other version
        patch.setattr("kfood_dist.pack.job._merge", lambda *inputs: sys.exit("stopped"))
        with pytest.raises(SystemExit, match="stopped"):
            pack(source, tmp_path / "out", SMALL)
    assert len(list((tmp_path / ".out.partial" / "chunks").glob("*.chunk"))) == 1
    pack(source, tmp_path / "out", SMALL)
    assert folder_bytes(tmp_path / "out") == folder_bytes(tmp_path / "undisturbed")


def test_a_repaired_picture_is_used_though_its_size_is_the_same(source, tmp_path):
    pack(source, tmp_path / "undisturbed", SMALL)
    copy = shutil.copytree(source, tmp_path / source.name)
    victim = next(copy.rglob("*.jpg"))
    sound = victim.read_bytes()
    victim.write_bytes(bytes(len(sound)))
    with pytest.raises(SourceError, match=r"unreadable 1.* → .*repair the source"):
        pack(copy, tmp_path / "out", replace(SMALL, max_rejected=0))
    victim.write_bytes(sound)
    pack(copy, tmp_path / "out", replace(SMALL, max_rejected=0))
    assert folder_bytes(tmp_path / "out") == folder_bytes(tmp_path / "undisturbed")


def test_pictures_prepared_from_another_copy_of_the_source_are_reused(source, tmp_path, monkeypatch):
    """Each job may copy the source to its own node, so its files are others and have other times."""
    monkeypatch.setattr("kfood_dist.pack.chunks.CHUNK_RECORDS", 7)
    pack(source, tmp_path / "whole", SMALL)
    for part in (1, 2):
        copy = shutil.copytree(source, tmp_path / str(part) / source.name)
        packed = pack(copy, tmp_path / "out", replace(SMALL, part=part, parts=2))
    assert packed.manifest
    assert folder_bytes(tmp_path / "out") == folder_bytes(tmp_path / "whole")


def test_a_picture_that_has_become_readable_is_used(source, tmp_path, monkeypatch):
    def unless_forbidden(path, mode):  # by the mode, because root may read every file
        if not path.stat().st_mode & 0o400:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)
        return open(path, mode)

    monkeypatch.setattr("kfood_dist.pack.sources.read.open", unless_forbidden, raising=False)
    copy = shutil.copytree(source, tmp_path / source.name)
    victim = next(copy.rglob("*.jpg"))
    victim.chmod(0)
    with pytest.raises(SourceError, match=r"unreadable 1.* → .*repair the source"):
        pack(copy, tmp_path / "out", replace(SMALL, max_rejected=0))
    victim.chmod(0o600)
    manifest = pack(copy, tmp_path / "out", replace(SMALL, max_rejected=0)).manifest
    assert manifest.raw["rejected"]["count"] == 0


def test_workers_ignore_an_interrupt(slow, tmp_path):
    process, children = start_and_wait_for_a_chunk(slow[0], tmp_path / "out")
    for child in children:
        os.kill(child, signal.SIGINT)
    _, output = process.communicate(timeout=60)
    assert (process.returncode, output) == (0, "")
    assert verify(tmp_path / "out") == []


def test_an_interrupted_packing_says_so_and_keeps_its_chunks(slow, tmp_path):
    process, workers = start_and_wait_for_a_chunk(slow[0], tmp_path / "out")
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to the parent and its workers
    _, output = process.communicate(timeout=60)
    assert process.returncode == 130
    assert output.strip() == "kfood pack: interrupted"
    assert_gone(workers)
    assert [p.name for p in tmp_path.iterdir()] == [".out.partial"]
    assert any((tmp_path / ".out.partial" / "chunks").glob("*.chunk"))


def test_a_vanished_source_stops_the_packing_which_resumes_when_it_is_back(source, tmp_path, monkeypatch):
    pack(source, tmp_path / "undisturbed", SMALL)
    monkeypatch.setattr("kfood_dist.pack.chunks.CHUNK_RECORDS", 7)
    moved = shutil.copytree(source, tmp_path / "moved")

    def until_it_vanishes(chunk, **words):
        if len(list((tmp_path / ".out.partial" / "chunks").glob("*.chunk"))) == 3:
            moved.rename(tmp_path / "away")
        prepare_chunk(chunk, **words)

    with monkeypatch.context() as patch:
        patch.setattr("kfood_dist.pack.job.prepare_chunk", until_it_vanishes)
        with pytest.raises(SourceError, match=r"→ "):
            pack(moved, tmp_path / "out", SMALL)
    assert len(list((tmp_path / ".out.partial" / "chunks").glob("*.chunk"))) == 3
    assert not (tmp_path / "out").exists()
    (tmp_path / "away").rename(moved)
    manifest = pack(moved, tmp_path / "out", SMALL).manifest
    assert manifest.raw["rejected"]["count"] == 0
    before, after = folder_bytes(tmp_path / "undisturbed"), folder_bytes(tmp_path / "out")
    assert {k: v for k, v in before.items() if k != "manifest.json"} == {
        k: v for k, v in after.items() if k != "manifest.json"
    }  # the manifests differ because they name the source


@pytest.mark.parametrize("workers", [1, 2])
def test_too_little_memory_stops_the_packing_and_refuses_no_picture(workers):
    with pytest.raises(SourceError, match=r"more memory than is available → .*fewer --workers"):
        list(in_processes(bytes, [1 << 62, 1 << 62], workers))


def test_a_full_disk_is_reported(source, tmp_path):
    """A limit lets no file of that process grow beyond 20 kB, so the kernel refuses a write as on a full disk."""
    done = run_with_a_file_limit(20_000, source, tmp_path / "out")
    assert done.returncode == 2, done.stderr
    assert "no space left to write" in done.stderr
    assert "it continues where it stopped" in done.stderr
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def run_with_a_file_limit(num_bytes: int, source: Path, out: Path) -> subprocess.CompletedProcess:
    code = (
        f"import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, ({num_bytes}, {num_bytes}));"
        "from kfood_dist.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    words = [sys.executable, "-c", code, "pack", source, out, "--workers", "1"]
    return subprocess.run(words, capture_output=True, text=True)


def test_a_disk_that_fills_up_leaves_finished_shards_intact(source, tmp_path, monkeypatch):
    pack(source, tmp_path / "undisturbed", SMALL)
    written = []

    def until_full(path, entries):
        if len(written) == 3:
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        written.append(path.name)
        return write_tar(path, entries)

    with monkeypatch.context() as patch:
        patch.setattr("kfood_dist.pack.write.write_tar", until_full)
        with pytest.raises(KfoodError, match=r"no space left to write .*out .*→ free .* it continues where it stopped"):
            pack(source, tmp_path / "out", SMALL)
    assert len(list((tmp_path / ".out.partial").rglob("train-*.index.npy"))) == 3
    again = []
    monkeypatch.setattr(
        "kfood_dist.pack.write.write_tar", lambda path, e: again.append(path.name) or write_tar(path, e)
    )
    pack(source, tmp_path / "out", SMALL)
    assert written == ["train-000000.tar", "train-000001.tar", "train-000002.tar"]
    assert not set(written) & set(again)
    assert folder_bytes(tmp_path / "out") == folder_bytes(tmp_path / "undisturbed")


def test_a_disk_that_is_too_small_is_reported_with_the_numbers_before_any_shard(source, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: type("usage", (), {"free": 1000}))
    with pytest.raises(KfoodError, match=r"no space left to write .*0\.\d MiB are needed and 0\.0 MiB are free"):
        pack(source, tmp_path / "out", SMALL)
    assert not list((tmp_path / ".out.partial").rglob("*.tar"))


# --- parts of a source


def test_subsets_share_no_picture_and_are_balanced(source, tmp_path):
    seen = []
    for subset in (1, 2, 3, 4):
        options = replace(SMALL, per_class=4, subset=subset)
        manifest = pack(source, tmp_path / f"out{subset}", options).manifest
        per_class = sum((Counter(s["per_class"]) for s in manifest.raw["splits"].values()), Counter())
        wanted = 4 if subset < 4 else 3
        assert per_class == {"만두": wanted, "불고기": wanted, "약과": wanted}
        short = {} if subset < 4 else dict.fromkeys(per_class, 3)
        assert manifest.raw["chosen"] == {"per_class": 4, "subset": subset, "short": short}
        seen += [name for names in sources_by_split(tmp_path / f"out{subset}").values() for name in names]
    assert len(set(seen)) == len(seen) == 45
    with pytest.raises(SourceError, match=r"subset 5 of 4 .* is empty: no class has more than 15 → .* up to 4"):
        pack(source, tmp_path / "out5", replace(SMALL, per_class=4, subset=5))


def test_a_subset_reads_its_own_pictures_only(source, tmp_path, capsys):
    copy = shutil.copytree(source, tmp_path / "copy")
    records = {record.source for record in choose_subset(scan(copy), 4, 2, SMALL.seed)[0]}
    for path in copy.rglob("*.jpg"):
        if path.relative_to(copy).as_posix() not in records:
            path.write_bytes(b"junk" * (path.stat().st_size // 4) + b"j" * (path.stat().st_size % 4))
    manifest = pack(copy, tmp_path / "out", replace(SMALL, per_class=4, subset=2)).manifest
    assert manifest.raw["rejected"]["count"] == 0
    words = ["pack", str(source), str(tmp_path / "short"), "--per-class", "20", "--image-size", "32", "--workers", "1"]
    assert main(words) == 0
    assert "short    3 classes have fewer than 20: 만두 15, 불고기 15, 약과 15" in capsys.readouterr().out


def test_a_class_with_too_few_usable_pictures_is_named(source, tmp_path, capsys):
    copy = shutil.copytree(source, tmp_path / "copy")
    chosen = [record for record in choose_subset(scan(copy), 4, 1, SMALL.seed)[0] if record.label != "만두"]
    lost = [next(r for r in chosen if r.label == "불고기"), *(r for r in chosen if r.label == "약과")]
    for record in lost:
        record.path.write_bytes(b"j" * record.num_bytes)
    words = ["--per-class", "4", "--image-size", "32", "--workers", "1", "--max-rejected", "0.5"]
    assert main(["pack", str(copy), str(tmp_path / "out"), *words]) == 0
    manifest = load_manifest(tmp_path / "out")
    assert manifest.raw["rejected"]["by_reason"] == {"unreadable": 5}
    assert manifest.raw["chosen"] == {"per_class": 4, "subset": 1, "short": {"불고기": 3, "약과": 0}}
    assert "short    2 classes have fewer than 4: 불고기 3, 약과 0" in capsys.readouterr().out


# --- crop boxes


def test_crop_boxes_are_used_when_asked_for_and_counted(tmp_path, capsys):
    source = write_folder(tmp_path / "source", {"구이/불고기": 12})
    folder = source / "구이" / "불고기"
    names = sorted(path.stem for path in folder.glob("*.jpg"))
    half = Image.new("RGB", (200, 100), (200, 0, 0))
    half.paste((0, 0, 200), (100, 0, 200, 100))
    for name in names:
        half.save(folder / f"{name}.jpg", quality=95)
        (folder / f"{name}.jpg").write_bytes((folder / f"{name}.jpg").read_bytes() + name.encode())
    boxes = [f"{name}=100,0,100,100" for name in names[:5]] + [f"{names[5]}=500,500,10,10", "nonsense"]
    (folder / "crop_area.properties").write_text("\n".join(boxes))
    words = ["pack", str(source), str(tmp_path / "cut"), "--image-size", "32", "--crop-boxes", "--workers", "1"]
    assert main(words) == 0
    assert "cropped  cropped 5, without_box 6, unusable_box 1; 1 line of the lists ignored" in capsys.readouterr().out
    blue, whole = set(), set()
    for split in load_manifest(tmp_path / "cut").splits:
        shards = open_split(tmp_path / "cut", split)
        for i in range(len(shards)):
            (jpeg,), output = shards.read(i)
            left = decode_rgb(jpeg)[16, 4]
            (blue if left[2] > left[0] else whole).add(Path(output["sources"][0]).stem)
    assert blue == set(names[:5])
    assert whole == set(names[5:])
    manifest = pack(source, tmp_path / "uncut", SMALL).manifest
    assert manifest.raw["crop_boxes"] is None


# --- splits without leakage


def test_near_duplicates_share_a_split_and_the_manifest_says_what_a_random_split_would_leak(tmp_path):
    """Sixty pictures: twenty plates with three photographs each, numbered in the order they were taken."""
    folder = tmp_path / "source" / "구이" / "불고기"
    folder.mkdir(parents=True)
    for plate in range(20):
        image = photograph(plate)
        for shot in range(3):
            turned = image.rotate(4 * shot, resample=Image.Resampling.BICUBIC).crop((20, 20, 380, 280))
            turned.save(folder / f"Img_000_{3 * plate + shot:04d}.jpg", quality=90 - shot)
    manifest = pack(tmp_path / "source", tmp_path / "out", replace(SMALL, image_size=224)).manifest
    by_split = sources_by_split(tmp_path / "out")
    plates = {split: {int(name[-8:-4]) // 3 for name in names} for split, names in by_split.items()}
    assert not plates["train"] & plates["test"] and not plates["train"] & plates["val"]
    assert not plates["val"] & plates["test"]
    assert sum(manifest.raw["splits"][split]["groups"] for split in plates) == 20
    leaked = manifest.raw["random_split_would_leak"]
    assert leaked["val"] + leaked["test"] >= 8  # of twelve pictures in val and test; each has two others of its plate
    assert verify(tmp_path / "out") == []


def photograph(seed: int) -> Image.Image:
    """Draw a picture with large shapes, which photographs have and noise does not."""
    noise = np.random.default_rng(seed).integers(0, 256, (7, 9, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((400, 300), Image.Resampling.BICUBIC)


# --- the command


def test_a_source_with_a_cp949_name_is_packed_under_that_name(source, tmp_path):
    named = Path(os.fsdecode(os.fsencode(tmp_path) + "/김치".encode("cp949")))
    shutil.copytree(source, named)
    assert pack(named, tmp_path / "of-a-folder", SMALL).manifest.raw["source"]["name"] == "김치"
    pictures = sorted(source.rglob("*.jpg"))
    rows = ["image_path,label", *(f"{path},{path.parent.name}" for path in pictures), "no second column"]
    table = named.with_name(f"{named.name}.csv")
    table.write_text("\n".join(rows), encoding="utf-8")
    assert pack(table, tmp_path / "of-a-table", SMALL).manifest.raw["source"]["name"] == "김치.csv"
    assert rejected(tmp_path / "of-a-table") == {"김치.csv:47": "bad_row"}


def test_the_encoding_of_a_list_changes_the_data_set_only_through_its_labels(tmp_path, capsys):
    write_folder(tmp_path, {"img": 6})
    rows = "".join(f"img/Img_{i:04d}.jpg,ī cake\n" for i in range(6))
    (tmp_path / "list.csv").write_bytes(b"image_path,label\n" + rows.encode())
    command = ["pack", str(tmp_path / "list.csv"), str(tmp_path / "out"), "--image-size", "32", "--workers", "1"]
    assert main(command) == 0
    assert main([*command, "--encoding", "utf-8"]) == 0
    assert "reused" in capsys.readouterr().out
    assert main([*command, "--encoding", "cp949"]) == 2
    assert "holds another data set" in capsys.readouterr().err
    assert main([*command, "--encoding", "klingon"]) == 2
    assert "--encoding klingon is not known → name one" in capsys.readouterr().err


def test_more_classes_than_an_index_can_number_are_refused_before_any_work(source, tmp_path, monkeypatch):
    assert np.iinfo(INDEX_DTYPE["label"]).max == NO_LABEL == job._MAX_CLASSES  # the highest number means no label
    monkeypatch.setattr(job, "_MAX_CLASSES", 2)
    with pytest.raises(SourceError, match=r"^3 classes are more than the 2 .* → .*--classes, or check"):
        pack(source, tmp_path / "out", SMALL)
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(job, "_MAX_CLASSES", 3)
    pack(source, tmp_path / "out", SMALL)


def test_the_command_packs_reuses_and_verifies(source, tmp_path, capsys):
    words = [
        "pack",
        str(source),
        str(tmp_path / "out"),
        "--image-size",
        "32",
        "--workers",
        "1",
        "--split",
        "0.6,0.2,0.2",
    ]
    assert main(words) == 0
    output = capsys.readouterr().out
    assert "packed   45 samples of 3 classes: train 27, val 9, test 9" in output
    leaked = load_manifest(tmp_path / "out").raw["random_split_would_leak"]
    val, test = (plural(leaked[split], f"{split} picture") for split in ("val", "test"))
    assert (
        "groups   44. Near-duplicates share a group, and each group is in one split. "
        f"A random split would put near-duplicates of {val} and {test} into train.\n"
    ) in output
    assert "refused  0 (0.00%)" in output
    assert "samples/s" in output
    assert main(words) == 0
    assert "reused" in capsys.readouterr().out
    assert main(["verify", str(tmp_path / "out")]) == 0


@pytest.mark.parametrize(
    ("words", "fault"),
    [
        (["--image-size", "0"], "--image-size 0 cannot be used → give an even number"),
        (["--image-size", "225"], "--image-size 225"),
        (["--image-size", "4098"], "--image-size 4098"),
        (["--quality", "0"], "--quality 0"),
        (["--min-side", "0"], "--min-side 0"),
        (["--shard-size", "0"], "--shard-size 0"),
        (["--workers", "0"], "--workers 0"),
        (["--max-rejected", "1.5"], "--max-rejected 1.5"),
        (["--seed", "-1"], "--seed -1"),
        (["--seed", str(2**63)], "below 2^63"),
        (["--per-class", "0"], "--per-class 0"),
        (["--subset", "2"], "--subset 2 without --per-class"),
        (["--per-class", "3", "--subset", "0"], "--subset 0"),
        (["--part", "4/3"], "--part 4/3 cannot be used → write it as K/N"),
        (["--part", "0/3"], "--part 0/3"),
        (["--part", "second"], "--part second"),
        (["--split", "0.5,0.5"], "--split 0.5,0.5 is not three"),
        (["--classes", "/nowhere.tsv"], "class list /nowhere.tsv cannot be read"),
        (["--image-root", "/tmp"], "--image-root does not go with the folder"),
    ],
)
def test_impossible_options_are_refused_before_any_work(source, tmp_path, capsys, words, fault):
    assert main(["pack", str(source), str(tmp_path / "out"), *words]) == 2
    assert fault in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_an_out_that_is_a_link_to_itself_is_refused_before_any_work(source, tmp_path, capsys):
    (tmp_path / "out").symlink_to("out")
    assert main(["pack", str(source), str(tmp_path / "out")]) == 2
    assert "is a link to itself → choose another OUT" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_out_that_is_a_mount_point_is_refused_before_any_work(source, tmp_path, capsys, monkeypatch):
    out = tmp_path / "disk"
    out.mkdir()
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path) == out)
    assert main(["pack", str(source), str(out)]) == 2
    output = capsys.readouterr().err
    assert f"{out} is a mount point" in output
    assert f"→ name a folder inside it, such as {out / 'kfood'}" in output
    assert [path.name for path in tmp_path.iterdir()] == ["disk"]
    pack(source, out / "kfood", SMALL)
    assert [path.name for path in out.iterdir()] == ["kfood"]


def test_a_complete_out_is_reused_though_it_is_a_mount_point(source, tmp_path, monkeypatch):
    pack(source, tmp_path / "out", SMALL)
    monkeypatch.setattr(os.path, "ismount", lambda path: True)
    assert pack(source, tmp_path / "out", SMALL).reused


def test_a_missing_source_is_one_line_of_error_and_leaves_nothing(tmp_path, capsys):
    assert main(["pack", str(tmp_path / "none"), str(tmp_path / "out")]) == 2
    output = capsys.readouterr().err
    assert output.count("\n") == 1
    assert "does not exist → name a folder of pictures" in output
    assert list(tmp_path.iterdir()) == []


def test_plain_tar_tools_can_read_the_shards(source, tmp_path):
    pack(source, tmp_path / "out", SMALL)
    with tarfile.open(tmp_path / "out" / "test-000000.tar") as tar:
        first = json.load(tar.extractfile(tar.getmembers()[1]))
    assert list(first) == ["category", "group", "height", "label", "sources", "width"]
