"""Other files of a source (folders that machines made, containers, labels) are skipped, counted and reported."""

import zipfile
from pathlib import Path

import pytest
from pictures import encoded, picture
from PIL import Image
from zips import as_folder, zipped

from kfood_dist.cli import main
from kfood_dist.data.shards.manifest import load_manifest
from kfood_dist.data.task.dish import DishClass
from kfood_dist.errors import SourceError
from kfood_dist.pack.sources import scan, scan_source
from kfood_dist.pack.sources.ignored import container_kind, how_to_read
from kfood_dist.pack.sources.record import SUFFIXES

JPEG = encoded(picture())

MADE = {
    "구이/갈비구이/@eaDir/a.jpg/SYNOPHOTO_THUMB_M.jpg": "@eaDir",
    "#recycle/갈비구이/old.jpg": "#recycle",
    "@Recycle/old.jpg": "@Recycle",
    "$RECYCLE.BIN/S-1-5/$R1.jpg": "$RECYCLE.BIN",
    "$Recycle.Bin/S-1-5/$R2.jpg": "$RECYCLE.BIN",
    "System Volume Information/a.jpg": "System Volume Information",
    "lost+found/#123.jpg": "lost+found",
    "FOUND.000/FILE0000.jpg": "FOUND.*",
    "__MACOSX/구이/._a.jpg": "__MACOSX",
    "구이/.ipynb_checkpoints/a-checkpoint.jpg": ".ipynb_checkpoints",
    ".Trash-1000/files/a.jpg": ".Trash-*",
    "구이/갈비구이/.thumbnails/a.jpg": ".thumbnails",
    "구이/갈비구이/Thumbnails/a.jpg": "thumbnails",
    "구이/휴지통/a.jpg": "휴지통",
    "구이/갈비구이/Thumbs.db": "Thumbs.db",
    "구이/갈비구이/desktop.ini": "desktop.ini",
    "구이/.DS_Store": ".DS_Store",
    "구이/갈비구이/._a.jpg": "._*",
    ".AppleDouble/a.jpg": ".AppleDouble",
    "Network Trash Folder/a.jpg": "Network Trash Folder",
    "Temporary Items/a.jpg": "Temporary Items",
    "구이/@tmp/a.jpg": "@tmp",
    ".git/objects/00/a": ".git",
    ".mine/a.jpg": "(hidden)",
    "구이/갈비구이/.a.jpg.swp": "(hidden)",
}


@pytest.mark.parametrize("shape", ["folder", "zip", "zip in a folder", "zip in a zip"])
def test_files_that_a_machine_made_are_no_dish_and_are_counted(tmp_path, shape):
    members = {"구이/갈비구이/a.jpg": JPEG, **dict.fromkeys(MADE, JPEG)}
    if shape == "folder":
        source = as_folder(tmp_path / "food", members)
    else:
        data = zipped(members, "flagged")
        nested = {"zip in a folder": {"all.zip": data}, "zip in a zip": {"all.zip": data}}.get(shape)
        source = tmp_path / "food.zip"
        if shape == "zip in a folder":
            source = as_folder(tmp_path / "food", nested)
        else:
            source.write_bytes(zipped(nested) if nested else data)
    found = scan_source(source)
    assert {record.label for record in found.records} == {"갈비구이"}
    assert len(found.records) == 1
    expected = {made: list(MADE.values()).count(made) for made in MADE.values()}
    assert found.ignored.machine_made == expected
    assert not found.ignored.by_suffix


def test_snapshots_and_unreadable_folders_are_skipped(tmp_path):
    as_folder(tmp_path, {"약과/a.jpg": JPEG, "#snapshot/monday/약과/a.jpg": JPEG, "#snapshot/sunday/약과/a.jpg": JPEG})
    (tmp_path / "lost+found").mkdir(mode=0)
    found = scan_source(tmp_path)
    assert [record.source for record in found.records] == ["약과/a.jpg"]
    assert found.ignored.machine_made["#snapshot"] == 1


@pytest.mark.parametrize("place", ["구이/IMG_1.jpg", "IMG_1.jpg", "구이/20240101_120000.HEIC", "IMG_1.jpg/previews"])
def test_a_dish_or_category_named_like_a_picture_is_refused(tmp_path, place):
    as_folder(tmp_path / "food", {"구이/갈비구이/a.jpg": JPEG, f"{place}/thumb.jpg": JPEG})
    with pytest.raises(SourceError, match=r"a picture's name: is that meant\? → if so, rename its folder"):
        scan(tmp_path / "food")
    (tmp_path / "food.zip").write_bytes(zipped({f"{place}/thumb.jpg": JPEG}))
    with pytest.raises(SourceError, match="a picture's name: is that meant"):
        scan(tmp_path / "food.zip")


def test_the_class_list_allows_a_dish_named_like_a_picture(tmp_path):
    as_folder(tmp_path, {"IMG_1.jpg/a.jpg": JPEG})
    (record,) = scan(tmp_path, classes=[DishClass("IMG_1.jpg", "")])
    assert (record.label, record.problem) == ("IMG_1.jpg", None)


# --- pictures by their suffix


def test_every_photograph_format_of_pillow_counts_as_a_picture(tmp_path):
    """If Pillow learns a new suffix for these formats, this test fails until the suffix counts as a picture here."""
    Image.init()
    registered = Image.registered_extensions()
    heic = {".heic", ".heics", ".heif", ".heifs", ".hif"}
    assert heic <= SUFFIXES <= set(registered) | heic
    of_photographs = {"JPEG", "MPO", "JPEG2000", "PNG", "GIF", "BMP", "DIB", "WEBP", "AVIF", "TIFF"}
    assert {end for end, kind in registered.items() if kind in of_photographs} <= SUFFIXES
    names = [f"약과/a{end}" for end in sorted(SUFFIXES)] + ["약과/b.JFIF"]
    as_folder(tmp_path, dict.fromkeys(names, JPEG))
    assert {record.source for record in scan(tmp_path)} == set(names)


# --- skipped files


def test_skipped_files_are_counted_by_suffix_and_each_container_gets_a_hint(tmp_path, capsys):
    source = as_folder(tmp_path / "food", {f"약과/{i}.jpg": encoded(picture(i)) for i in range(6)})
    others = ["a.json", "b.JSON", "notes", "data.parquet", "약과/old.tar.gz", "약과/IMG.CR2", "약과/@eaDir/0.jpg/x.jpg"]
    parts = ["TS_구이.zip.part0", "TS_구이.zip.part1073741824", "국.zip.001", "국.zip.002", "면.z01", "면.zip"]
    as_folder(source, dict.fromkeys(others + parts, b"PK"))
    words = ["pack", str(source), str(tmp_path / "out"), "--image-size", "32", "--workers", "1"]
    assert main(words) == 0
    output = capsys.readouterr().out
    assert main(words) == 0
    again = capsys.readouterr().out
    for text in (
        "refused  0 (0.00%)",
        "ignored  12 files that are not pictures: .N 2, .json 2, .partN 2, ",
        "ignored  1 hidden files or files that a machine made: @eaDir 1",
        "WARNING  TS_구이.zip.part0 and 1 more: not read; join the parts in the order of their numbers: ls -v ",
        "WARNING  국.zip.001 and 1 more: not read; join the parts",
        "WARNING  면.z01: not read; join the parts: zip -s 0 ",
        "WARNING  약과/old.tar.gz: not read; unpack it: tar -xf ",
        "WARNING  data.parquet: not read; write its pictures out as files",
        "WARNING  약과/IMG.CR2: not read; make a JPEG or PNG of it",
    ):
        assert text in output and text in again
    ignored = load_manifest(tmp_path / "out").raw["source"]["passed_by"]
    assert ignored["by_suffix"] == {
        **{".json": 2, ".N": 2, ".partN": 2},
        **{"(none)": 1, ".cr2": 1, ".gz": 1, ".parquet": 1, ".zN": 1, ".zip": 1},
    }
    assert ignored["machine_made"] == {"@eaDir": 1}
    assert ignored["containers"]["parts"] == {"count": 2, "first": "TS_구이.zip.part0"}


@pytest.mark.parametrize(
    ("name", "how"),
    [
        ("TS.zip.part0", "ls -v TS.zip.part* | xargs -d '\\n' cat > TS.zip"),
        ("a b.zip.001", "ls -v 'a b.zip.'* | xargs -d '\\n' cat > 'a b.zip'"),
        ("kfood.tar.aa", "ls -v kfood.tar.* | xargs -d '\\n' cat > kfood.tar"),
        ("kfood.zipaa", "ls -v kfood.zip* | xargs -d '\\n' cat > kfood.zip"),
        ("kfood.z01", "zip -s 0 kfood.zip --out kfood-whole.zip"),
        ("kfood.7z.001", "7z x kfood.7z.001"),
        ("kfood.part1.rar", "unrar x kfood.part1.rar"),
        ("kfood.r00", "unrar x kfood.r00"),
        ("KFOOD.TAR", "tar -xf KFOOD.TAR"),
        ("kfood.tgz", "tar -xf kfood.tgz"),
        ("kfood.tar.zst", "tar -xf kfood.tar.zst"),
        ("kfood.7z", "7z x kfood.7z"),
        ("kfood.egg", "with ALZip or Bandizip"),
        ("train-00000-of-00002.parquet", "write its pictures out"),
        ("kfood.arrow", "write its pictures out"),
        ("kfood.tfrecord-00000-of-00010", "write its pictures out"),
        ("IMG_1.dng", "make a JPEG or PNG of it"),
    ],
)
def test_each_container_gets_its_hint_as_the_only_file_or_as_the_source(tmp_path, name, how):
    assert how in how_to_read(container_kind(name), name)
    path = tmp_path / "food" / name
    as_folder(tmp_path / "food", {name: b""})
    with pytest.raises(SourceError, match="holds no pictures, but ") as empty:
        scan(tmp_path / "food")
    with pytest.raises(SourceError, match=r"neither a folder nor a \.zip, \.csv or \.jsonl") as other:
        scan(path)
    assert how_to_read(container_kind(name), str(path)) in empty.value.remedy
    assert other.value.remedy == how_to_read(container_kind(name), str(path))


@pytest.mark.parametrize("name", ["a.json", "a.zip", "README", "a.mp4", "a.part", "v1.2", "a.txt.bak", "a.xyz"])
def test_other_files_are_no_containers(name):
    assert container_kind(name) is None


def test_skipped_files_in_zips_are_counted_too(tmp_path):
    inner = zipped({"불고기/a.jpg": JPEG, "불고기/a.json": b"", "불고기/b.tar": b""})
    (tmp_path / "kfood.zip").write_bytes(zipped({"구이.zip": inner, "readme.txt": b"", "Thumbs.db": b""}))
    assert scan_source(tmp_path / "kfood.zip").ignored.as_json() == {
        "by_suffix": {".json": 1, ".tar": 1, ".txt": 1},
        "machine_made": {"Thumbs.db": 1},
        "containers": {"tar": {"count": 1, "first": "구이.zip/불고기/b.tar"}},
    }


# --- AI-Hub's delivery: archives of labels beside archives of pictures


def delivered(in_source: str, in_labels: str = "갈비구이/a.json") -> dict[str, bytes]:
    made = {}
    for folder, letter in (("1.Training", "T"), ("2.Validation", "V")):
        pictures = {in_source.replace("a.", f"{letter}{i}."): JPEG for i in range(2)}
        made[f"{folder}/01.원천데이터/{letter}S_구이.zip"] = zipped(pictures)
        made[f"{folder}/02.라벨링데이터/{letter}L_구이.zip"] = zipped({in_labels: JPEG})
    return made


@pytest.mark.parametrize("in_source", ["갈비구이/a.jpg", "구이/갈비구이/a.jpg"])
@pytest.mark.parametrize("in_labels", ["갈비구이/a.json", "갈비구이/mask.png"])
@pytest.mark.parametrize("around", ["", "242.음식 이미지/01.데이터/"])
@pytest.mark.parametrize("shape", ["folder", "zip", "extracted"])
def test_archives_of_labels_give_no_pictures_and_archives_of_pictures_no_category(
    tmp_path, shape, around, in_source, in_labels
):
    members = {around + name: data for name, data in delivered(in_source, in_labels).items()}
    source = tmp_path / "food"
    if shape == "zip":
        source = tmp_path / "food.zip"
        source.write_bytes(zipped(members))
    else:
        as_folder(source, members)
    if shape == "extracted":
        for name in members:
            with zipfile.ZipFile(source / name) as archive:
                pictures = {
                    info.filename.encode("cp437").decode("cp949"): archive.read(info) for info in archive.filelist
                }
            as_folder(source / name.removesuffix(".zip"), pictures)
    found = scan_source(source)
    assert [(r.category, r.label, r.split, r.problem) for r in found.records] == [
        ("구이", "갈비구이", "train", None),
        ("구이", "갈비구이", "train", None),
        ("구이", "갈비구이", "val", None),
        ("구이", "갈비구이", "val", None),
    ]
    assert found.ignored.by_suffix[Path(in_labels).suffix] == 2


@pytest.mark.parametrize(
    ("archive", "category"),
    [
        ("TS.zip", ""),
        ("TS1.zip", ""),
        ("TS_구이_2.zip", "구이"),
        ("[원천]구이_Tr.zip", "구이"),
        ("VS_01.구이.zip", "구이"),
    ],
)
def test_only_the_plain_part_of_an_archives_name_is_a_category(tmp_path, archive, category):
    as_folder(tmp_path, {f"원천데이터/{archive}": zipped({"갈비구이/a.jpg": JPEG})})
    (record,) = scan(tmp_path)
    assert (record.category, record.label) == (category, "갈비구이")


def test_a_damaged_archive_counts_as_refused_only_if_it_holds_pictures(tmp_path):
    as_folder(tmp_path, {"약과/a.jpg": JPEG, "TL_구이.zip": b"cut", "[라벨]구이.zip": b"cut", "TS_구이.zip": b"cut"})
    found = scan_source(tmp_path)
    assert {r.source: r.problem for r in found.records} == {"약과/a.jpg": None, "TS_구이.zip": "unreadable_archive"}
    assert found.ignored.by_suffix == {".zip": 2}


def test_a_picture_may_be_named_like_an_archive_of_labels(tmp_path):
    as_folder(tmp_path, {"약과/TL_0001.jpg": JPEG})
    assert [record.source for record in scan(tmp_path)] == ["약과/TL_0001.jpg"]
