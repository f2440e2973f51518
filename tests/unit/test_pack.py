import csv
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections import Counter, defaultdict
from dataclasses import replace
from pathlib import Path

import pytest
from pictures import encoded, folder_bytes, picture, write_folder
from PIL import Image

from kfood_dist.cli import main
from kfood_dist.data.packing.options import PackOptions
from kfood_dist.data.packing.pack import pack
from kfood_dist.data.shards import open_split
from kfood_dist.data.verify import verify
from kfood_dist.errors import KfoodError, ShardError, SourceError

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
    for name in (name for name, said in splits.items() if said["samples"]):
        split = open_split(folder, name)
        found[name] = [split.metadata(i)["source"] for i in range(len(split))]
    return found


# --- what comes out


def test_a_folder_becomes_stratified_shuffled_splits(source, tmp_path):
    manifest, reused = pack(source, tmp_path / "out", SMALL)
    assert not reused
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


def test_the_same_bytes_whatever_the_workers_the_place_or_the_order_of_files(source, tmp_path):
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
    manifest, _ = pack(source, tmp_path / "out", SMALL)
    assert sum(said["groups"] for said in manifest.raw["splits"].values()) == 30
    splits_of, groups_of = defaultdict(set), defaultdict(set)
    for name in manifest.splits:
        split = open_split(tmp_path / "out", name)
        for i in range(len(split)):
            stem = Path(split.metadata(i)["source"]).stem[:8]
            splits_of[stem].add(name)
            groups_of[stem].add(split.metadata(i)["group"])
    assert len(splits_of) == 30
    assert all(len(found) == 1 for found in [*splits_of.values(), *groups_of.values()])


def test_every_kind_of_file_is_packed(tmp_path):
    folder = tmp_path / "source" / "한과" / "약과"
    folder.mkdir(parents=True)
    kinds = {".JPG": "JPEG", ".jpeg": "JPEG", ".png": "PNG", ".gif": "GIF", ".bmp": "BMP"}
    for i, (suffix, kind) in enumerate(kinds.items()):
        (folder / f"{i}{suffix}").write_bytes(encoded(picture(i), kind))
    manifest, _ = pack(tmp_path / "source", tmp_path / "out", SMALL)
    assert sum(said["samples"] for said in manifest.raw["splits"].values()) == 5


def test_a_list_of_classes_fixes_their_ids_and_names(source, tmp_path):
    listed = tmp_path / "classes.tsv"
    rows = ["category\tname\taliases", "과자\t유과\t", "과자\t유밀과\t약과", "구이\t불고기\t", "만두\t만두\t"]
    listed.write_text("\n".join(rows), encoding="utf-8")
    manifest, _ = pack(source, tmp_path / "out", replace(SMALL, classes=listed))
    assert [c.name for c in manifest.classes] == ["유과", "유밀과", "불고기", "만두"]
    assert manifest.raw["splits"]["train"]["per_class"] == {"유과": 0, "유밀과": 12, "불고기": 12, "만두": 12}
    split = open_split(tmp_path / "out", "train")
    renamed = next(i for i in range(len(split)) if split.label(i).name == "유밀과")
    assert split.metadata(renamed)["category"] == "과자"
    assert "약과" in split.metadata(renamed)["source"]


# --- what is left out


def test_each_unusable_input_is_named_and_the_run_goes_on(tmp_path):
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
    manifest, _ = pack(source, tmp_path / "out", replace(SMALL, max_rejected=0.2))
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
    assert sum(said["samples"] for said in manifest.raw["splits"].values()) == 60
    assert verify(tmp_path / "out") == []


def test_too_many_refused_leaves_no_out_but_the_list(tmp_path):
    source = write_folder(tmp_path / "source", {"한과/약과": 18})
    for i in range(2):
        (source / "한과" / "약과" / f"empty{i}.jpg").write_bytes(b"")
    out = tmp_path / "out"
    fault = r"2 of 20 inputs \(10.0%\).*, more than --max-rejected 0.05: empty 2 → .*out.rejected.csv"
    with pytest.raises(SourceError, match=fault):
        pack(source, out, SMALL)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out.rejected.csv", "source"]
    assert set(rejected(tmp_path / "out.rejected.csv").values()) == {"empty"}
    pack(source, out, replace(SMALL, max_rejected=0.1))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "source"]
    assert len(rejected(out)) == 2
    with pytest.raises(SourceError, match=r"was packed with 10.0% of its inputs refused"):
        pack(source, out, SMALL)


def test_nothing_left_is_an_error_whatever_may_be_rejected(tmp_path):
    (tmp_path / "source" / "약과").mkdir(parents=True)
    (tmp_path / "source" / "약과" / "a.jpg").write_bytes(b"junk")
    with pytest.raises(SourceError, match=r"1 of 1 inputs \(100.0%\) cannot be used: unreadable 1"):
        pack(tmp_path / "source", tmp_path / "out", replace(SMALL, max_rejected=1.0))
    assert not (tmp_path / "out").exists()


def test_a_list_whose_pictures_lie_elsewhere_points_to_the_image_root(tmp_path, source):
    rows = [f"{p.relative_to(source)},{p.parent.name}" for p in sorted(source.rglob("*.jpg"))]
    listed = tmp_path / "list.csv"
    listed.write_text("\n".join(["image_path,label", *rows]), encoding="utf-8")
    with pytest.raises(SourceError, match=r"missing 45 → .*--image-root"):
        pack(listed, tmp_path / "out", SMALL)
    options = replace(SMALL, image_root=source)
    manifest, _ = pack(listed, tmp_path / "out", options)
    assert manifest.raw["source"]["kind"] == "csv"
    pack(source, tmp_path / "folder", SMALL)
    assert sources_by_split(tmp_path / "out") == sources_by_split(tmp_path / "folder")


# --- OUT


def test_a_complete_out_is_reused_and_another_one_left_alone(source, tmp_path):
    out = tmp_path / "out"
    pack(source, out, SMALL)
    before, made = folder_bytes(out), (out / "manifest.json").stat().st_mtime_ns
    assert pack(source, out, replace(SMALL, workers=2))[1]
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
    with pytest.raises(SourceError, match=r"busy is there already and is no packed data set"):
        pack(source, busy, SMALL)
    assert folder_bytes(busy) == {"thesis.txt": b"years of work"}
    with pytest.raises(SourceError, match=r"thesis.txt is there already"):
        pack(source, busy / "thesis.txt", SMALL)


def test_a_failure_in_the_middle_leaves_nothing(source, tmp_path, monkeypatch):
    out = tmp_path / "deep" / "out"
    monkeypatch.setattr("kfood_dist.data.packing.pack.verify", lambda folder: [f"{folder.name} is bad"])
    with pytest.raises(KfoodError, match="reads back damaged"):
        pack(source, out, SMALL)
    assert list((tmp_path / "deep").iterdir()) == []


def test_two_at_a_time_do_not_write_the_same_out(source, tmp_path):
    partial = tmp_path / ".out.partial"
    partial.mkdir()
    (partial / "spool").write_bytes(b"of the other process")
    descriptor = os.open(partial, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    with pytest.raises(SourceError, match=r"another process is writing .*out"):
        pack(source, tmp_path / "out", SMALL)
    assert folder_bytes(partial) == {"spool": b"of the other process"}
    os.close(descriptor)
    pack(source, tmp_path / "out", SMALL)
    assert not partial.exists()


def slow_source(root: Path) -> Path:
    """Enough work to be killed in: large pictures, told apart by a byte after their end."""
    large = encoded(picture(1, 2000, 1500))
    for dish in ("불고기", "약과"):
        (root / dish).mkdir(parents=True)
        for i in range(150):
            (root / dish / f"{i}.jpg").write_bytes(large + f"{dish}{i}".encode())
    return root


def start_and_wait_for_spool(source: Path, out: Path) -> tuple[subprocess.Popen, list[int]]:
    words = [
        sys.executable,
        "-m",
        "kfood_dist",
        "pack",
        str(source),
        str(out),
        "--image-size",
        "32",
        "--workers",
        "2",
    ]
    process = subprocess.Popen(words, stderr=subprocess.PIPE, text=True, start_new_session=True)
    spool = out.parent / f".{out.name}.partial" / "spool"
    while not (spool.exists() and spool.stat().st_size):
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
        # A zombie whose new parent has not yet looked is gone as well.
        alive = [p for p in pids if (s := Path(f"/proc/{p}/stat")).exists() and s.read_text().split()[2] != "Z"]
        if not alive:
            return
        time.sleep(0.02)
    raise AssertionError(f"workers {alive} outlive the process that started them")


def test_killed_in_the_middle_and_started_again_it_gives_the_same_bytes(tmp_path):
    source = slow_source(tmp_path / "source")
    out = tmp_path / "out"
    process, workers = start_and_wait_for_spool(source, out)
    process.kill()
    process.wait()
    process.stderr.close()
    assert len(workers) >= 2
    assert_gone(workers)
    assert not out.exists()
    assert (tmp_path / ".out.partial" / "spool").exists()
    (tmp_path / ".out.partial" / "train-000000.tar").write_bytes(b"as a later kill would leave")
    options = PackOptions(image_size=32, workers=2)
    pack(source, out, options)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "source"]
    pack(source, tmp_path / "undisturbed", options)
    assert folder_bytes(out) == folder_bytes(tmp_path / "undisturbed")


def test_an_interrupt_is_the_parents_to_act_on(tmp_path):
    process, children = start_and_wait_for_spool(slow_source(tmp_path / "source"), tmp_path / "out")
    for child in children:
        os.kill(child, signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert (process.returncode, said) == (0, "")
    assert verify(tmp_path / "out") == []


def test_interrupted_by_hand_it_clears_up_and_says_so(tmp_path):
    source = slow_source(tmp_path / "source")
    process, workers = start_and_wait_for_spool(source, tmp_path / "out")
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: parent and workers alike
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert said.strip() == "kfood pack: interrupted"
    assert_gone(workers)
    assert [p.name for p in tmp_path.iterdir()] == ["source"]


def test_a_full_disk_is_said_and_leaves_nothing(source, tmp_path):
    """No file may grow beyond 20 kB in that process: the kernel's own refusal, as on a full disk."""
    code = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000));"
        "from kfood_dist.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    words = [sys.executable, "-c", code, "pack", source, tmp_path / "out", "--workers", "1"]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert "no space left to write" in done.stderr
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


# --- the command


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
    said = capsys.readouterr().out
    assert "packed   45 pictures of 3 classes: train 27, val 9, test 9" in said
    assert "refused  0 (0.00%)" in said
    assert "pictures/s" in said
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
        (["--split", "0.5,0.5"], "--split 0.5,0.5 is not three"),
        (["--classes", "/nowhere.tsv"], "class list /nowhere.tsv cannot be read"),
        (["--image-root", "/tmp"], "--image-root does not go with the folder"),
    ],
)
def test_options_that_cannot_be_meant_are_refused_before_any_work(source, tmp_path, capsys, words, fault):
    assert main(["pack", str(source), str(tmp_path / "out"), *words]) == 2
    assert fault in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_missing_source_is_one_line_and_leaves_nothing(tmp_path, capsys):
    assert main(["pack", str(tmp_path / "none"), str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "does not exist → name a folder of pictures" in said
    assert list(tmp_path.iterdir()) == []


def test_the_tars_stay_open_to_plain_tools(source, tmp_path):
    pack(source, tmp_path / "out", SMALL)
    with tarfile.open(tmp_path / "out" / "test-000000.tar") as tar:
        first = json.load(tar.extractfile(tar.getmembers()[1]))
    assert list(first) == ["category", "group", "height", "label", "source", "width"]
