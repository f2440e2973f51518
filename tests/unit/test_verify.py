import hashlib
import json
import os
import shutil
import zlib
from dataclasses import replace

import numpy as np
import pytest
from pictures import encoded, picture, write_folder

from kfood_dist.cli import main
from kfood_dist.data.shards.manifest import with_checksum
from kfood_dist.data.shards.reader import NO_LABEL
from kfood_dist.data.shards.tars import Entry, members, save_index, write_tar
from kfood_dist.data.shards.verify import verify
from kfood_dist.errors import ShardError
from kfood_dist.pack.job import pack
from kfood_dist.pack.options import PackOptions
from kfood_dist.pack.split import parse_fractions

OPTIONS = PackOptions(image_size=32, shard_size=6, workers=1, fractions=parse_fractions("0.75,0,0.25"))
FIRST, SECOND, TEST = "train-000000", "train-000001", "test-000000"


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """Train: 12 samples in 2 shards; test: 4 samples in one."""
    root = tmp_path_factory.mktemp("packed")
    pack(write_folder(root / "source", {"구이/불고기": 8, "한과/약과": 8}), root / "out", OPTIONS)
    return root / "out"


@pytest.fixture
def folder(packed, tmp_path):
    """A copy of the packed folder that a test may damage."""
    return shutil.copytree(packed, tmp_path / "out")


def faults(folder):
    return [str(fault) for fault in verify(folder)]


def flip(path, position):
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


def describe_again(folder, name):
    """Make the manifest agree with a changed tar and index, so that only their contents can reveal the fault."""
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    for shard in manifest["shards"]:
        for described in (shard, shard["index"]):
            if described["path"].startswith(name):
                data = (folder / described["path"]).read_bytes()
                described.update(bytes=len(data), sha256=hashlib.sha256(data).hexdigest())
    path.write_bytes(with_checksum(manifest))


def change_index(folder, name, change):
    path = folder / f"{name}.index.npy"
    index = np.load(path)
    change(index)
    np.save(path, index)
    describe_again(folder, name)


def test_a_sound_folder_has_no_fault_and_one_line_of_output(packed, capsys):
    assert faults(packed) == []
    assert main(["verify", str(packed)]) == 0
    output = capsys.readouterr().out
    assert output.count("\n") == 1
    assert "no faults: 16 samples in 3 shards" in output


def test_faults_give_exit_status_1_and_every_fault_is_named(folder, capsys):
    os.truncate(folder / f"{FIRST}.tar", 3000)
    (folder / f"{SECOND}.tar").unlink()
    (folder / "train-000009.tar").write_bytes(b"")
    flip(folder / f"{TEST}.index.npy", 200)
    assert main(["verify", str(folder)]) == 1
    output = capsys.readouterr().out
    assert f"{FIRST}.tar: has 3,000 bytes, not the" in output
    assert f"{SECOND}.tar: cannot be read (No such file" in output
    assert "train-000009.tar: is not in the manifest" in output
    assert f"{TEST}.index.npy: " in output
    assert "faults in" in output


def test_a_single_fault_is_counted_as_one(folder, capsys):
    (folder / "train-000009.tar").write_bytes(b"")
    assert main(["verify", str(folder)]) == 1
    assert f"\n1 fault in {folder}: restore these files, or pack the source again\n" in capsys.readouterr().out


def test_a_missing_manifest_is_a_fault_and_a_missing_folder_is_an_error(folder, tmp_path, capsys):
    (folder / "manifest.json").write_text("{")
    assert "is not JSON" in faults(folder)[0]
    (folder / "manifest.json").unlink()
    assert faults(folder) == [f"manifest.json: {folder} has no manifest.json"]
    assert main(["verify", str(folder)]) == 1
    with pytest.raises(ShardError, match="does not exist"):
        verify(tmp_path / "none")
    assert main(["verify", str(tmp_path / "none")]) == 2
    assert main(["verify", str(tmp_path / ("x" * 300))]) == 2


def test_a_url_is_refused_as_it_was_written(capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["verify", "http://host/shards"])
    assert "http://host/shards: give a folder" in capsys.readouterr().err


def cuts(path):
    """Return where to cut a tar: in a header or payload, at a sample or member, before the end mark, and others."""
    found = list(members(path))
    sample = found[2]
    return {
        "at a sample": sample.start,
        "in a header": sample.start + 212,
        "in a payload": sample.start + 612,
        "at a member": sample.end,
        "before the end mark": found[-1].end,
        "of one byte": path.stat().st_size - 1,
        "whole": 0,
    }


def test_a_tar_cut_anywhere_is_noticed(packed, folder):
    original = (packed / f"{FIRST}.tar").read_bytes()
    for where, length in cuts(packed / f"{FIRST}.tar").items():
        (folder / f"{FIRST}.tar").write_bytes(original[:length])
        found = faults(folder)
        assert any(f"has {length:,} bytes" in fault for fault in found), where
        if where not in ("before the end mark", "of one byte"):
            assert any("of 12 members" in fault for fault in found), (where, found)


def test_a_cut_tar_that_the_manifest_agrees_with_still_lacks_its_samples(folder):
    path = folder / f"{FIRST}.tar"
    os.truncate(path, cuts(path)["at a sample"])
    describe_again(folder, FIRST)
    assert faults(folder) == [
        f"{FIRST}.index.npy: {folder}/{FIRST}.index.npy points beyond the end of {FIRST}.tar",
    ]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """One split of one shard with one sample: small enough to test every byte of every file."""
    root = tmp_path_factory.mktemp("tiny")
    source = write_folder(root / "source", {"구이/불고기": 1})
    (source / "구이/불고기/broken.jpg").write_bytes(b"junk")
    options = replace(OPTIONS, image_size=16, fractions=parse_fractions("1,0,0"), max_rejected=0.5)
    pack(source, root / "out", options)
    return root / "out"


EVERY_FILE = ("manifest.json", "rejected.csv", f"{FIRST}.index.npy", f"{FIRST}.tar")


@pytest.mark.parametrize("name", EVERY_FILE)
def test_one_flipped_byte_anywhere_is_noticed(tiny, tmp_path, name, one_in):
    """Flip one bit in one byte at a time of every file in a packed folder: each 13th byte, or all in a sweep."""
    folder = shutil.copytree(tiny, tmp_path / "out")
    original = (tiny / name).read_bytes()
    for position in range(0, len(original), one_in(13)):
        data = bytearray(original)
        data[position] ^= 1 << position % 8
        (folder / name).write_bytes(data)
        assert name in {fault.path for fault in verify(folder, show_progress=False)}, position
    (folder / name).write_bytes(original)
    assert faults(folder) == []


@pytest.mark.parametrize("name", EVERY_FILE)
def test_a_file_cut_at_any_length_is_noticed(tiny, tmp_path, name, one_in):
    folder = shutil.copytree(tiny, tmp_path / "out")
    for length in range((tiny / name).stat().st_size - 1, -1, -one_in(13)):
        os.truncate(folder / name, length)
        assert name in {fault.path for fault in verify(folder, show_progress=False)}, length


@pytest.mark.parametrize("name", EVERY_FILE)
def test_any_file_that_is_missing_is_noticed(tiny, tmp_path, name):
    folder = shutil.copytree(tiny, tmp_path / "out")
    (folder / name).unlink()
    assert name in {fault.path for fault in verify(folder)}


def test_a_flipped_byte_in_a_picture_names_the_picture(folder):
    third = list(members(folder / f"{FIRST}.tar"))[4]
    assert third.name == "train-00000002.jpg"
    for place in (third.start + 712, third.end + 515):  # in the picture, in the JSON
        flip(folder / f"{FIRST}.tar", place)
        assert faults(folder) == [
            f"{FIRST}.tar: does not have the SHA-256 of the manifest",
            f"{FIRST}.tar: train-00000002 has wrong bytes (crc32 differs)",
        ]
        flip(folder / f"{FIRST}.tar", place)
    assert faults(folder) == []


def test_a_missing_and_an_extra_shard_are_noticed(folder):
    (folder / f"{TEST}.tar").rename(folder / "test-000001.tar")
    shutil.copy(folder / f"{TEST}.index.npy", folder / "test-000001.index.npy")
    assert faults(folder) == [
        f"{TEST}.tar: cannot be read (No such file or directory)",
        "test-000001.index.npy: is not in the manifest",
        "test-000001.tar: is not in the manifest",
    ]


def test_an_index_that_belongs_to_another_tar_is_noticed(packed, folder):
    (folder / f"{FIRST}.index.npy").write_bytes((packed / f"{SECOND}.index.npy").read_bytes())
    assert "is not the index that the manifest was written with" in faults(folder)[0]
    describe_again(folder, FIRST)
    found = faults(folder)
    assert f"{FIRST}.tar: holds train-00000000.jpg, which is not in its index" in found
    assert f"{FIRST}.tar: lacks 12 of 12 members; the first is train-00000006.jpg" in found
    assert "manifest.json: has keys in train that are not numbered in order from 0" in found


def swap(index, field):
    index[field][[0, 1]] = index[field][[1, 0]]


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (lambda index: swap(index, "offset"), "train-00000000 is not where its index says"),
        (lambda index: np.add(index["size"], 512, out=index["size"]), "train-00000000 is not where its index says"),
        (lambda index: swap(index, "crc32"), "train-00000000 has wrong bytes"),
        (lambda index: swap(index, "group"), "train-00000000.json contradicts its index"),
        (lambda index: index["label"].fill(0), "contradicts its index"),
        (lambda index: index["num_images"].fill(2), "lacks 6 of 18 members; the first is train-00000000.1.jpg"),
        (lambda index: index["num_images"].fill(0), "holds train-00000000.jpg, which is not in its index"),
        (lambda index: index["label"].fill(2), "has a class id beyond the manifest's class count (2)"),
        (lambda index: index["label"].fill(NO_LABEL), "has a class id beyond the manifest's class count (2)"),
    ],
)
def test_a_false_index_is_noticed_even_if_the_manifest_agrees(folder, change, fault):
    change_index(folder, FIRST, change)
    assert any(fault in found for found in faults(folder)), faults(folder)


def test_a_picture_that_no_longer_decodes_is_noticed_though_every_checksum_agrees(folder):
    """The picture was damaged before it was packed: its bytes, its crc32 and all hashes agree."""
    first = next(members(folder / f"{FIRST}.tar"))
    write_over(folder, first, encoded(picture(9, 32, 32))[:100].ljust(len(first.data), b"\0"))
    (found,) = faults(folder)
    assert found.startswith(f"{FIRST}.tar: train-00000000.jpg does not decode")


def write_over(folder, member, data):
    """Overwrite a member of the first sample, and make its crc32 and all hashes agree with the new bytes."""
    assert len(data) == len(member.data)
    path = folder / f"{FIRST}.tar"
    tar = bytearray(path.read_bytes())
    tar[member.start + 512 : member.start + 512 + len(data)] = data
    path.write_bytes(tar)

    def agree(index):
        start, size = int(index["offset"][0]), int(index["size"][0])
        index["crc32"][0] = zlib.crc32(tar[start : start + size])

    change_index(folder, FIRST, agree)


def test_a_picture_of_another_size_than_the_manifests_is_noticed_though_every_checksum_agrees(folder):
    first = next(members(folder / f"{FIRST}.tar"))
    small = encoded(picture(9, 32, 16), quality=30)
    write_over(folder, first, small.ljust(len(first.data), b"\0"))
    assert faults(folder) == [f"{FIRST}.tar: train-00000000.jpg is 32×16, but the manifest says 32×32"]


def write_again(folder, change):
    """Write the first shard again with a changed first entry, and make index and manifest agree with it."""
    tar, index_file = folder / f"{FIRST}.tar", folder / f"{FIRST}.index.npy"
    found, entries = list(members(tar)), []
    for jpeg, text, row in zip(found[::2], found[1::2], np.load(index_file), strict=True):
        facts = (int(row[name]) for name in ("label", "group", "tokens"))
        entries.append(Entry(row["key"].decode(), (jpeg.data,), text.data, *facts))
    tar.unlink(), index_file.unlink()
    save_index(index_file, write_tar(tar, [change(entries[0]), *entries[1:]]))
    describe_again(folder, FIRST)


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (lambda output: output.update(width=33), "says 33×32, the manifest says 32×32"),
        (lambda output: output.update(height="32"), "says 32×'32', the manifest says 32×32"),
        (lambda output: output.pop("width"), "is not a sample's JSON (KeyError: 'width')"),
        (lambda output: output.update(group=1), "contradicts its index"),
        (lambda output: output.pop("group"), "is not a sample's JSON (KeyError: 'group')"),
        (lambda output: output.update(label="유과"), "contradicts its index"),
        (lambda output: output.update(category=None), "has a column that is not text"),
        (lambda output: output.pop("label"), "is not a sample's JSON (KeyError: 'label')"),
        (lambda output: output.update(sources=[]), "names 0 sources, but its index has 1 picture"),
        (lambda output: output.update(sources=["a", "b"]), "names 2 sources, but its index has 1 picture"),
        (lambda output: output.update(sources=3), "is not a sample's JSON (TypeError"),
        (lambda output: output.pop("sources"), "is not a sample's JSON (KeyError: 'sources')"),
    ],
)
def test_a_false_json_is_noticed_though_every_checksum_agrees(folder, change, fault):
    def changed(entry):
        output = json.loads(entry.json)
        change(output)
        return replace(entry, json=json.dumps(output).encode())

    write_again(folder, lambda entry: entry)
    assert faults(folder) == []
    write_again(folder, changed)
    (found,) = faults(folder)
    assert found.startswith(f"{FIRST}.tar: train-00000000.json {fault}")


@pytest.mark.parametrize("text", [b"[]", b"3", b"{", b"\xff", b"[" * 100_000], ids=["list", "3", "{", "ff", "deep"])
def test_an_invalid_json_is_noticed_though_every_checksum_agrees(folder, text):
    write_again(folder, lambda entry: replace(entry, json=text))
    (found,) = faults(folder)
    assert found.startswith(f"{FIRST}.tar: train-00000000.json is not a sample's JSON")


def test_each_picture_of_a_sample_is_checked(folder):
    """The second of two pictures is damaged."""

    def changed(entry):
        output = json.loads(entry.json) | {"sources": ["a", "b"]}
        return replace(entry, pictures=(*entry.pictures, b"junk"), json=json.dumps(output).encode())

    write_again(folder, changed)
    (found,) = faults(folder)
    assert found.startswith(f"{FIRST}.tar: train-00000000.1.jpg does not decode")


def test_counts_and_groups_that_do_not_add_up_are_noticed(folder):
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["splits"]["train"]["per_class"]["약과"] += 1
    (folder / "manifest.json").write_bytes(with_checksum(manifest))
    assert faults(folder) == [
        "manifest.json: states other counts of samples, groups or samples per class than the indexes"
    ]
    group = int(np.load(folder / f"{TEST}.index.npy")["group"][0])
    change_index(folder, FIRST, lambda index: index["group"].fill(group))
    assert "manifest.json: has 1 groups in test that are also in another split" in faults(folder)
