import hashlib
import io
import json
import multiprocessing
import os
import pickle
import subprocess
import sys
import tarfile
import zlib
from dataclasses import replace
from pkgutil import walk_packages as walk

import numpy as np
import pytest
import webdataset
from pictures import encoded, picture, write_folder
from PIL import Image

import kfood_dist
from kfood_dist.data.shards.manifest import load_manifest, with_checksum
from kfood_dist.data.shards.reader import INDEX_DTYPE, NO_LABEL, ShardSplit, open_split
from kfood_dist.data.shards.sample import Sample, cut
from kfood_dist.data.shards.tars import Entry, members, write_tar
from kfood_dist.data.storage.base import UnreachableError
from kfood_dist.errors import ShardError
from kfood_dist.pack.job import pack
from kfood_dist.pack.options import PackOptions
from kfood_dist.pack.split import parse_fractions

OPTIONS = PackOptions(image_size=32, shard_size=7, workers=1, fractions=parse_fractions("0.75,0,0.25"))


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """Two dishes of twelve pictures: 18 train samples in 3 shards, 6 test samples, no val."""
    root = tmp_path_factory.mktemp("packed")
    pack(write_folder(root / "source", {"구이/구이/불고기": 12, "한과/약과": 12}), root / "out", OPTIONS)
    return root / "out"


@pytest.fixture
def copied(packed, tmp_path):
    """A copy of the packed folder that a test may damage."""
    folder = tmp_path / "copy"
    folder.mkdir()
    for path in packed.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


def edit_manifest(folder, change):
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_bytes(with_checksum(manifest))


def flip(path, position):
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


def test_the_manifest_describes_the_packed_folder(packed):
    manifest = load_manifest(packed)
    assert [(c.name, c.category) for c in manifest.classes] == [("불고기", "구이"), ("약과", "한과")]
    assert (manifest.image_size, manifest.resize) == (32, "squash")
    assert manifest.splits == ("train", "test")
    assert [s.samples for s in manifest.shards_of("train")] == [7, 7, 4]
    assert manifest.raw["splits"]["train"] == {
        "samples": 18,
        "groups": 18,
        "per_class": {"불고기": 9, "약과": 9},
    }
    assert manifest.raw["splits"]["val"] == {"samples": 0, "groups": 0, "per_class": {"불고기": 0, "약과": 0}}
    listed = hashlib.sha256((packed / "rejected.csv").read_bytes()).hexdigest()
    assert manifest.raw["rejected"] == {"count": 0, "share": 0.0, "by_reason": {}, "sha256": listed}


def test_samples_of_all_shards_are_read_by_offset(packed):
    split = open_split(packed, "train")
    assert len(split) == 18
    assert split.index.dtype == INDEX_DTYPE
    sources = set()
    for i in range(len(split)):
        assert split.key(i) == f"train-{i:08d}"
        (jpeg,), output = split.read(i)
        with Image.open(io.BytesIO(jpeg)) as image:
            assert (image.format, image.size) == ("JPEG", (32, 32))
        dish = split.classes[split.index["label"][i]]
        assert output == {
            "label": dish.name,
            "category": dish.category,
            "sources": output["sources"],
            "width": 32,
            "height": 32,
            "group": int(split.index["group"][i]),
        }
        (source,) = output["sources"]
        assert output["label"] in source
        assert split.index["tokens"][i] == len(output["label"].encode()) + 1
        assert split.index["num_images"][i] == 1
        sources.add(source)
    assert len(sources) == 18
    assert split.read(-1) == split.read(17)


def test_many_samples_are_read_in_the_requested_order(packed):
    split = open_split(packed, "train")
    each = [split.read(i) for i in range(18)]
    ids = [17, 3, 3, -1, 0, 8, 7, 9]
    assert open_split(packed, "train").read_many(np.array(ids)) == [each[i] for i in ids]
    assert split.read_many([]) == []
    for i in (18, -19):
        with pytest.raises(IndexError, match=f"sample {i} of 18"):
            split.read_many([0, i])


@pytest.mark.parametrize("kept_bytes", [1, 256 << 20])
def test_rows_and_labels_are_in_order_even_if_few_indexes_are_kept(packed, monkeypatch, kept_bytes):
    monkeypatch.setattr("kfood_dist.data.shards.reader._KEPT_INDEX_BYTES", kept_bytes)
    whole = np.concatenate([np.load(packed / f"train-{n:06d}.index.npy") for n in range(3)])
    split = open_split(packed, "train")
    for ids in ([17], [9, 0, 17, 1], range(18), [-1, 5]):  # reads the last shard's index before the first's
        assert np.array_equal(split.rows(ids), whole[list(ids)])
        assert len(split._indexes) <= (1 if kept_bytes == 1 else 3)
    labels = split.labels()
    assert np.array_equal(labels, whole["label"]) and labels.dtype == np.uint16
    assert np.array_equal(split.index, whole)


def test_only_the_indexes_that_are_needed_are_read(copied):
    for n in (0, 2):
        (copied / f"train-{n:06d}.index.npy").unlink()
    split = open_split(copied, "train")
    assert len(split) == 18
    assert split.read_many(range(7, 14)) and split.key(9) == "train-00000009"
    results = split.read_many([0, 9, 17])
    assert [isinstance(result, ShardError) for result in results] == [True, False, True]
    assert "train-000000.index.npy cannot be opened" in str(results[0])
    for whole in (split.labels, lambda: split.index, lambda: split.rows(range(18))):
        with pytest.raises(ShardError, match=r"train-000000.index.npy cannot be opened"):
            whole()


def test_an_index_that_points_beyond_its_tar_is_refused(copied):
    path = copied / "test-000000.index.npy"
    index = np.load(path)
    for field, value in (("offset", 2**64 - 1), ("size", 2**32 - 1)):
        damaged = index.copy()
        damaged[field][2] = value
        np.save(path, damaged)
        data = path.read_bytes()
        described = {"path": path.name, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        edit_manifest(copied, lambda m, described=described: m["shards"][-1].update(index=described))
        with pytest.raises(ShardError, match=r"test-000000.index.npy points beyond the end of test-000000.tar"):
            open_split(copied, "test").read(0)


def test_reading_ahead_changes_nothing_that_is_read(copied):
    split = open_split(copied, "train")
    before = split.read_many(range(18))
    (copied / "train-000001.tar").unlink()
    ahead = open_split(copied, "train")
    ahead.will_need(range(18))  # a missing shard raises no error here
    results = ahead.read_many(range(18))
    assert results[:7] == before[:7] and isinstance(results[9], ShardError)


def test_plain_tar_and_plain_webdataset_find_the_same_samples(packed):
    split = open_split(packed, "train")
    urls = [str(packed / f"train-{n:06d}.tar") for n in range(3)]
    samples = list(webdataset.WebDataset(urls, shardshuffle=False).decode("pil"))
    assert [s["__key__"] for s in samples] == [split.key(i) for i in range(18)]
    assert [s["json"] for s in samples] == [split.read(i).columns for i in range(18)]
    assert all(s["jpg"].size == (32, 32) for s in samples)
    members = []
    for url in urls:
        with tarfile.open(url) as tar:
            members += tar.getmembers()
    assert [m.name for m in members] == [f"train-{i:08d}.{x}" for i in range(18) for x in ("jpg", "json")]
    assert {(m.mtime, m.uid, m.gid, m.uname, m.gname, m.mode) for m in members} == {(0, 0, 0, "", "", 0o644)}


def test_the_index_hash_differs_between_splits(packed, tmp_path):
    train, test = open_split(packed, "train").index_hash, open_split(packed, "test").index_hash
    assert len(train) == 64
    assert train != test
    assert train == open_split(packed, "train").index_hash


def test_a_split_works_in_a_forked_process_and_after_pickling(packed):
    split = open_split(packed, "train")
    first = split.read(0)

    def child(connection):
        connection.send((split.read(0), split.read(17)))

    here, there = multiprocessing.get_context("fork").Pipe()
    process = multiprocessing.get_context("fork").Process(target=child, args=(there,))
    process.start()
    assert here.recv() == (first, split.read(17))
    process.join()
    assert split.read(0) == first

    pickled = pickle.dumps(split)
    assert len(pickled) < 2000  # the pickle has the path of the folder and no index
    copy = pickle.loads(pickled)
    assert copy.read(5) == split.read(5)
    assert copy.index_hash == split.index_hash
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(split.read, (5,)) == split.read(5)


def test_a_forked_process_opens_the_files_itself(copied):
    split = open_split(copied, "test")
    assert split.read(0)
    (copied / "new").write_bytes(bytes((copied / "test-000000.tar").stat().st_size))
    os.replace(copied / "new", copied / "test-000000.tar")
    assert split.read(0)  # this process still reads the file that it opened
    child = os.fork()
    if child == 0:
        try:
            split.read(0)
        except ShardError:
            os._exit(3)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 3


def test_a_pickled_split_finds_its_folder_from_anywhere(packed, tmp_path, monkeypatch):
    monkeypatch.chdir(packed.parent)
    pickled = pickle.dumps(open_split(packed.relative_to(packed.parent), "test"))
    monkeypatch.chdir(tmp_path)
    assert len(pickle.loads(pickled)) == 6


def test_few_files_are_open_at_once_and_close_releases_them(packed, monkeypatch):
    before = len(os.listdir("/proc/self/fd"))
    split = open_split(packed, "train")
    assert len(os.listdir("/proc/self/fd")) == before
    monkeypatch.setattr("kfood_dist.data.storage.local._MAX_OPEN_FILES", 2)
    for i in (0, 8, 17, 0, 8):
        split.read(i)
        assert len(os.listdir("/proc/self/fd")) <= before + 2
    split.close()
    assert len(os.listdir("/proc/self/fd")) == before
    assert split.read(0)
    split.close()


def test_reading_shards_and_packing_need_no_torch():
    rooms = ("system", "config", "data.shards", "data.storage", "data.picture", "data.plan", "data.task", "pack")
    found = (kfood_dist.__path__[0] + "/" + room.replace(".", "/") for room in rooms)
    walked = [
        info.name for room, path in zip(rooms, found, strict=True) for info in walk([path], f"kfood_dist.{room}.")
    ]
    assert {"kfood_dist.pack.sources.scan", "kfood_dist.data.shards.reader"} <= set(walked)
    imports = "; ".join(f"import {name}" for name in walked)
    code = f"import sys; sys.modules['torch'] = None; {imports}; from webdataset import TarWriter"
    subprocess.run([sys.executable, "-c", code], check=True)
    code = f"import sys; {imports}; assert 'torch' not in sys.modules and 'webdataset' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


# --- several pictures


@pytest.mark.parametrize("number", [1, 2, 13])
def test_the_pictures_of_a_sample_are_stored_in_order_in_one_run(tmp_path, number):
    """This includes more than ten pictures, whose names do not sort in the order of their numbers."""
    jpegs = tuple(encoded(picture(seed, 16, 16)) for seed in range(number))
    output = {"question": "무엇인가요?", "answer": "밥"}
    text = json.dumps(output).encode()
    entries = [Entry(f"train-{i:08d}", jpegs[i:] or jpegs, text, NO_LABEL, i, 4) for i in range(2)]
    index = write_tar(tmp_path / "a.tar", entries)
    found = list(members(tmp_path / "a.tar"))
    suffixes = ["jpg", *(f"{n}.jpg" for n in range(1, number)), "json"]
    assert [member.name for member in found[: number + 1]] == [f"train-00000000.{suffix}" for suffix in suffixes]
    data = (tmp_path / "a.tar").read_bytes()
    for row, entry in zip(index, entries, strict=True):
        run = data[int(row["offset"]) : int(row["offset"]) + int(row["size"])]
        assert cut(entry.key, run) == Sample(entry.pictures, output)
        assert (row["num_images"], row["crc32"]) == (len(entry.pictures), zlib.crc32(run))


def header_of_size(field):
    """Return a tar header with a correct checksum and this size field."""
    header = bytearray(tarfile.TarInfo("k.jpg").tobuf(tarfile.USTAR_FORMAT))
    header[124:136] = field + b"\0"
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header)


def test_bytes_that_are_no_complete_sample_are_refused(tmp_path):
    jpegs = (encoded(picture(0, 16, 16)), encoded(picture(1, 16, 16)))
    (row,) = write_tar(tmp_path / "a.tar", [Entry("k", jpegs, b"{}", NO_LABEL, 0, 1)])
    run = (tmp_path / "a.tar").read_bytes()[: int(row["size"])]
    assert cut("k", run) == Sample(jpegs, {})
    for damaged in (
        run[:-1024],
        run[1024:],
        run + bytes(512),
        run.replace(b"k.1.jpg", b"k.2.jpg"),
        run[:512] + run,
        b"",
        *map(header_of_size, (b"-0000001000", b"\xff" * 10 + b"\xfe", b"7" * 11)),  # the first two sizes are negative
    ):
        with pytest.raises(ValueError):
            cut("k", damaged)
    for text in (b"[]", b"3", b"{", b"\xff"):
        (row,) = write_tar(tmp_path / f"{text.hex()}.tar", [Entry("k", jpegs, text, NO_LABEL, 0, 1)])
        with pytest.raises(ValueError):
            cut("k", (tmp_path / f"{text.hex()}.tar").read_bytes()[: int(row["size"])])


# --- faults are reported


def test_a_folder_that_was_not_packed_is_refused(tmp_path, packed):
    with pytest.raises(ShardError, match="none does not exist"):
        load_manifest(tmp_path / "none")
    with pytest.raises(ShardError, match=r"cannot be read \(File name too long\) → "):
        load_manifest(tmp_path / ("x" * 300))
    with pytest.raises(ShardError, match=r"has no manifest\.json → pack it with `kfood pack SOURCE OUT`"):
        load_manifest(tmp_path)
    with pytest.raises(ShardError, match=r"does not exist"):
        open_split(packed / "manifest.json", "train")


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[" * 100_000, b"[]", b"3"])
def test_a_manifest_that_is_no_json_object_is_refused(copied, content):
    (copied / "manifest.json").write_bytes(content)
    with pytest.raises(ShardError, match=r"is not (a )?JSON"):
        load_manifest(copied)


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (lambda m: m.update(format="other"), "of format 'other', not 'kfood-shards'"),
        (lambda m: m.pop("format"), "of format None"),
        (lambda m: m.update(version=1), "of version 1, but this kfood reads version 3"),
        (lambda m: m.update(version=2), "version 2, but this kfood reads version 3 → pack .* `kfood pack SOURCE OUT`"),
        (lambda m: m.pop("columns"), "damaged .KeyError: 'columns'"),
        (lambda m: m.update(columns=3), "damaged"),
        (lambda m: m.pop("classes"), "damaged .KeyError: 'classes'"),
        (lambda m: m.update(classes=[3]), "damaged"),
        (lambda m: m.update(image_size="224"), "damaged"),
        (lambda m: m.update(shards={}) or m.update(splits=[]), "damaged"),
        (lambda m: m["shards"][0].update(path="../manifest.json"), "not a plain file name"),
        (lambda m: m["shards"][0]["index"].update(path="/etc/passwd"), "not a plain file name"),
        (lambda m: m["shards"][0].update(split="holdout"), "'holdout' is not one of train, val, test"),
        (lambda m: m["shards"][0].update(bytes=-1), "not a count"),
        (lambda m: m["rejected"].update(share="none"), "damaged"),
    ],
)
def test_a_manifest_of_another_format_or_version_or_damaged_is_refused(copied, change, fault):
    edit_manifest(copied, change)
    with pytest.raises(ShardError, match=fault):
        load_manifest(copied)


@pytest.mark.parametrize("split", ["val", "holdout", ""])
def test_a_missing_split_is_refused_with_the_splits_that_exist(packed, split):
    with pytest.raises(ShardError, match=f"no samples in split '{split}' → choose one of: train, test"):
        open_split(packed, split)


def test_require_files_names_missing_and_cut_files(copied):
    os.truncate(copied / "train-000001.tar", 5000)
    split = open_split(copied, "train")
    with pytest.raises(ShardError, match=r"train-000001.tar has 5,000 bytes, not the .*`kfood verify"):
        split.require_files()
    (copied / "train-000001.tar").unlink()
    with pytest.raises(ShardError, match=r"train-000001.tar cannot be opened \(No such file"):
        split.require_files()
    test = open_split(copied, "test")
    test.require_files()
    (copied / "test-000000.index.npy").unlink()
    with pytest.raises(ShardError, match=r"test-000000.index.npy cannot be opened"):
        test.require_files()


def test_a_missing_shard_does_not_affect_the_others(copied):
    (copied / "train-000001.tar").unlink()
    (copied / "train-000000.index.npy").write_bytes(b"junk")
    found = open_split(copied, "train").read_many([0, 9, 17])
    assert [type(data) for data in found] == [ShardError, UnreachableError, Sample]
    assert "train-000000.index.npy is not the index" in str(found[0])
    assert "train-000001.tar cannot be opened" in str(found[1])


def test_one_flipped_byte_in_a_sample_is_noticed_when_it_is_read(copied):
    row = open_split(copied, "train").index[9]
    start, end = int(row["offset"]), int(row["offset"]) + int(row["size"])
    places = {"header": start + 1, "picture": start + 512 + 200, "json": end - 512 + 3, "last": end - 1}
    for place in places.values():
        flip(copied / "train-000001.tar", place)
        split = open_split(copied, "train")
        with pytest.raises(ShardError, match=r"train-000001.tar has wrong bytes at train-00000009 \(crc32 differs"):
            split.read(9)
        assert split.read(8) and split.read(10)
        flip(copied / "train-000001.tar", place)
    assert open_split(copied, "train").read(9)


def test_a_shard_cut_while_it_is_open_is_noticed(copied):
    split = open_split(copied, "test")
    os.truncate(copied / "test-000000.tar", int(split.index["offset"][5]) + 10)
    with pytest.raises(ShardError, match=r"test-000000.tar ends inside test-00000005"):
        split.read(5)
    assert split.read(0)


def test_a_label_changed_in_the_index_is_noticed(copied):
    """The crc32 of a picture does not cover its label, so the index is compared with its hash in the manifest."""
    path = copied / "train-000000.index.npy"
    index = np.load(path)
    index["label"] = 1 - index["label"]
    np.save(path, index)
    with pytest.raises(ShardError, match=r"train-000000.index.npy is not the index that the manifest"):
        open_split(copied, "train").read(0)


@pytest.mark.parametrize("kind", ["pickle", "junk", "other_dtype", "short", "class", "no_class"])
def test_an_index_of_another_kind_is_refused_even_if_the_manifest_names_it(copied, kind):
    path = copied / "test-000000.index.npy"
    index = np.load(path)
    if kind == "pickle":
        path.write_bytes(pickle.dumps({"key": 1}))
    elif kind == "junk":
        path.write_bytes(b"\x93NUMPY junk")
    elif kind == "other_dtype":
        np.save(path, index["key"])
    elif kind == "short":
        np.save(path, index[:-1])
    else:
        index["label"][0] = 2 if kind == "class" else NO_LABEL
        np.save(path, index)
    data = path.read_bytes()
    described = {"path": path.name, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    edit_manifest(copied, lambda m: m["shards"][-1].update(index=described))
    with pytest.raises(ShardError, match=r"test-000000.index.npy (is not a numpy|does not hold|has a class id)"):
        open_split(copied, "test").read(0)


@pytest.mark.parametrize("key", ["bytes", "samples"])
def test_an_impossible_count_in_the_manifest_is_damage(copied, key):
    manifest = json.loads((copied / "manifest.json").read_text(encoding="utf-8"))
    manifest["shards"][0][key] = 2**64
    (copied / "manifest.json").write_bytes(with_checksum(manifest))
    with pytest.raises(ShardError, match=r"manifest\.json is damaged .*18446744073709551616 is not a count"):
        open_split(copied, "train")


def test_a_sample_without_a_column_that_the_manifest_promises_is_damage(packed):
    """Another tool may have written such a manifest."""
    manifest = load_manifest(packed)
    promised = ShardSplit(replace(manifest, columns=(*manifest.columns, "question")), "train")
    with pytest.raises(ShardError, match=r"has no valid sample at train-00000000 \(its question is not text\)"):
        promised.read(0)
