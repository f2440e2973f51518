import csv
import io
import multiprocessing
import os
import pickle
import random
import sys
import tempfile
import tracemalloc
import unicodedata
import zipfile
from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
from pictures import encoded, picture
from zips import CRC, FLAGS, METHOD, OFFSET, PACKED, UNPACKED, as_folder, with_field, zipped

from kfood_dist.data.picture.images import ImageRejected
from kfood_dist.data.task.dish import load_classes
from kfood_dist.errors import SourceError
from kfood_dist.pack.chunks import cut, load_chunk, prepare_chunk
from kfood_dist.pack.prepare import PictureSettings, Prepared, Refusal, in_processes
from kfood_dist.pack.sources import opened, read, read_picture, scan, scan_source, zips

CLASSES = Path(__file__).resolve().parents[2] / "shards" / "kfood150.tsv"
SETTINGS = PictureSettings(image_size=32, resize="squash", quality=90, min_side=32, crop_boxes=False)
JPEG = encoded(picture())
OTHER = encoded(picture(1))


def put(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def output(records):
    """Return, for each record, the reason of its refusal or its category and label."""
    return {r.source: r.problem or (r.category, r.label) for r in records}


def prepared(records, workers):
    """Prepare the sound records in worker processes, and return the pictures and the refusals from their files."""
    with tempfile.TemporaryDirectory() as folder:
        chunks = cut([r for r in records if r.problem is None], SETTINGS)
        list(in_processes(partial(prepare_chunk, settings=SETTINGS, folder=Path(folder)), chunks, workers))
        outcomes = [outcome for chunk in chunks for outcome in load_chunk(chunk, Path(folder))]
    return [o for o in outcomes if isinstance(o, Prepared)], [o for o in outcomes if isinstance(o, Refusal)]


# --- shapes

DISHES = {
    f"{dish}/Img_{number:03d}_0001.{kind}": encoded(picture(number), "PNG" if kind == "png" else "JPEG")
    for number, (dish, kind) in enumerate(
        [
            ("구이/갈비구이", "jpg"),
            ("구이/불고기", "JPG"),
            ("국/떡국_만두국", "jpeg"),
            ("만두/만두", "jpg"),
            ("한과/한과", "png"),
            ("한과/약과", "jpg"),
            ("회/육회", "jpg"),
        ]
    )
}
BESIDE = {
    "구이/갈비구이/crop_area.properties": b"",
    "구이/갈비구이/org_url.csv": b"a,b",
    "구이/갈비구이/.hidden.jpg": JPEG,
    "__MACOSX/구이/갈비구이/Img_000_0001.jpg": JPEG,
    "구이/.trash/a.jpg": JPEG,
    "구이/갈비구이/": b"",
}


def inner_zips(writer: str, inside: str = "{category}/", method: int = zipfile.ZIP_STORED) -> dict[str, bytes]:
    """Return the dishes as one zip for each category. In a zip, `inside` comes before the folder of a dish."""
    found: dict[str, dict[str, bytes]] = {}
    for name, data in (DISHES | BESIDE).items():
        category, _, rest = name.partition("/")
        place = name if category == "__MACOSX" else inside.format(category=category) + rest
        found.setdefault("구이" if category == "__MACOSX" else category, {})[place] = data
    return {f"{category}.zip": zipped(members, writer, method) for category, members in found.items()}


def doubled(name: str) -> str:
    return f"{name.partition('/')[0]}/{name}"


SHAPES = {
    "plain folder": lambda p: as_folder(p / "kfood", DISHES),
    "folder around it": lambda p: as_folder(p / "all", {f"kfood/{n}": d for n, d in DISHES.items()}),
    "folder of Windows": lambda p: as_folder(p / "kfood", {doubled(n): d for n, d in DISHES.items()}),
    "folder of macOS": lambda p: as_folder(
        p / "kfood", {unicodedata.normalize("NFD", n): d for n, d in DISHES.items()}
    ),
    "folder of zips": lambda p: as_folder(p / "kfood", inner_zips("windows")),
    "folder of zips of macOS": lambda p: as_folder(
        p / "kfood", {unicodedata.normalize("NFD", n): d for n, d in inner_zips("macos").items()}
    ),
    "zips in a zip": lambda p: put(p / "kfood.zip", zipped(inner_zips("windows"))),
    "without their categories": lambda p: put(p / "kfood.zip", zipped(inner_zips("windows", ""))),
    "with doubled categories": lambda p: put(p / "kfood.zip", zipped(inner_zips("windows", "{category}/{category}/"))),
    "zips of macOS in a zip": lambda p: put(p / "kfood.ZIP", zipped(inner_zips("macos"), "macos")),
    "zips with flagged names": lambda p: put(p / "kfood.zip", zipped(inner_zips("flagged"), "flagged")),
    "compressed zips in a zip": lambda p: put(
        p / "kfood.zip", zipped(inner_zips("windows"), method=zipfile.ZIP_DEFLATED)
    ),
    "compressed pictures": lambda p: put(p / "kfood.zip", zipped(inner_zips("windows", method=zipfile.ZIP_DEFLATED))),
    "folder around the zips": lambda p: put(
        p / "kfood.zip", zipped({f"kfood/{n}": d for n, d in inner_zips("windows").items()})
    ),
    "pictures in a zip": lambda p: put(p / "kfood.zip", zipped(DISHES | BESIDE)),
    "both in a zip": lambda p: put(
        p / "kfood.zip",
        zipped(
            {n: d for n, d in inner_zips("windows").items() if n != "회.zip"}
            | {n: d for n, d in DISHES.items() if n.startswith("회/")}
        ),
    ),
    "behind other bytes": lambda p: put(p / "kfood.zip", b"stub" * 99 + zipped(inner_zips("windows"))),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_of_the_set_gives_the_same_pictures(tmp_path, shape):
    records = scan(SHAPES[shape](tmp_path))
    found = Counter((r.category, r.label, read_picture(r)) for r in records if r.problem is None)
    assert found == Counter((*name.split("/")[:2], data) for name, data in DISHES.items())
    assert [r.source for r in records] == sorted({unicodedata.normalize("NFC", r.source) for r in records})
    assert {r.problem for r in records} == {None}
    assert {r.num_bytes for r in records} == {len(data) for data in DISHES.values()}


def test_names_treat_zips_as_folders(tmp_path):
    data = zipped({"구이.zip": zipped({"갈비구이/a.jpg": JPEG}), "구이//./불고기/b.jpg": JPEG})
    records = scan(put(tmp_path / "kfood.zip", data))
    assert [r.source for r in records] == ["구이.zip/갈비구이/a.jpg", "구이/불고기/b.jpg"]
    as_folder(tmp_path / "folder", {"구이/전부.zip": zipped({"갈비구이/a.jpg": JPEG})})
    (record,) = scan(tmp_path / "folder")
    assert (record.source, record.category, record.label) == ("구이/전부.zip/갈비구이/a.jpg", "전부", "갈비구이")


def test_pictures_directly_in_a_zip_belong_to_the_dish_it_is_named_after(tmp_path):
    (record,) = scan(put(tmp_path / "약과.zip", zipped({"a.jpg": JPEG})))
    assert (record.source, record.category, record.label) == ("a.jpg", "", "약과")
    (record,) = scan(put(tmp_path / "한과.zip", zipped({"약과.zip": zipped({"a.jpg": JPEG})})))
    assert (record.source, record.category, record.label) == ("약과.zip/a.jpg", "", "약과")


def test_all_classes_of_the_real_set_are_read_from_cp949_names(tmp_path):
    """The bytes of 회 in CP949 are valid UTF-8 for another letter."""
    with open(CLASSES, encoding="utf-8") as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    categories = dict.fromkeys(row["category"] for row in rows)
    inner = {
        f"{category}.zip": zipped(
            {f"{r['name']}/Img_{r['id']}_0000.jpg": JPEG for r in rows if r["category"] == category}
        )
        for category in categories
    }
    records = scan(put(tmp_path / "kfood.zip", zipped(inner)))
    assert len(records) == 150
    assert {(r.category, r.label) for r in records} == {(row["category"], row["name"]) for row in rows}
    assert {r.problem for r in scan(tmp_path / "kfood.zip", classes=load_classes(CLASSES))} == {None}


def test_names_of_unclear_encoding_are_read_like_the_names_beside_them(tmp_path):
    names = ["구이/불고기/a.jpg", "회/a.jpg", "카 cake/a.jpg"]
    for writer in ("windows", "macos"):
        records = scan(put(tmp_path / "kfood.zip", zipped(dict.fromkeys(names, JPEG), writer)))
        assert {r.source for r in records} == set(names)
    records = scan(put(tmp_path / "kfood.zip", zipped({"crème/a.jpg": JPEG, "Käse/a.jpg": JPEG}, "macos")))
    assert {r.label for r in records} == {"crème", "Käse"}


def test_a_utf8_name_in_the_extra_field_is_used(tmp_path):
    """Info-ZIP's extra field holds the name in UTF-8. It counts only if its CRC fits the name of the member."""
    raw, path = "카 cake/a.jpg".encode("cp949"), tmp_path / "kfood.zip"
    for crc, label in ((zipfile.crc32(raw), "카cake"), (7, "īcake")):
        message = b"\1" + crc.to_bytes(4, "little") + "카 cake/a.jpg".encode()
        data = zipped({raw: JPEG}, extra=b"\x75\x70" + len(message).to_bytes(2, "little") + message)
        assert [r.label for r in scan(put(path, data))] == [label]


def test_a_name_in_no_known_encoding_is_still_a_picture(tmp_path):
    (record,) = scan(put(tmp_path / "kfood.zip", zipped({b"\xff\xfe\x80.jpg": JPEG})))
    assert (record.label, record.problem) == ("kfood", None)
    assert read_picture(record) == JPEG
    (record,) = scan(put(tmp_path / "kfood.zip", zipped({b"\xff\xfe\x80/a.jpg": JPEG})))
    assert (record.problem, record.detail) == ("bad_label", "written in no known encoding")


def test_a_zip_beside_the_folder_it_was_extracted_to_is_not_read_twice(tmp_path):
    as_folder(tmp_path, {"구이/불고기/a.jpg": JPEG, "구이.zip": zipped({"불고기/a.jpg": JPEG})})
    found = scan_source(tmp_path)
    assert output(found.records) == {"구이/불고기/a.jpg": ("구이", "불고기")}
    assert found.ignored.as_json() == {
        "by_suffix": {".zip": 1},
        "machine_made": {},
        "containers": {"extracted": {"count": 1, "first": "구이.zip"}},
    }


def test_records_are_small_and_hold_the_crc_of_a_zipped_picture(tmp_path):
    inner = {f"불고기/Img_000_{i:04d}.jpg": JPEG for i in range(16)}
    records = scan(put(tmp_path / "kfood.zip", zipped({"구이.zip": zipped(inner)})))
    assert len(pickle.dumps(records)) < 16 * 250
    assert {r.crc32 for r in records} == {zipfile.crc32(JPEG)}
    as_folder(tmp_path / "folder", inner)
    assert {r.crc32 for r in scan(tmp_path / "folder")} == {None}


def test_a_zip_of_many_gigabytes_is_read_at_its_far_end(tmp_path):
    """The offsets are beyond 4 GiB, as in the 16 GB of the real set. The bytes before them are a hole in the file."""
    path = put(tmp_path / "kfood.zip", b"")
    os.truncate(path, 5 * 2**30)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("구이.zip", zipped({"불고기/a.jpg": JPEG}))
        archive.writestr("구이/갈비구이/b.jpg", OTHER)
    records = scan(path)
    assert min(info.header_offset for info in zipfile.ZipFile(path).infolist()) == 5 * 2**30
    assert [read_picture(record) for record in records] == [JPEG, OTHER]
    assert output(records) == {"구이.zip/불고기/a.jpg": ("구이", "불고기"), "구이/갈비구이/b.jpg": ("구이", "갈비구이")}


# --- unsafe and duplicate names


@pytest.mark.parametrize(
    "name",
    [
        "../a.jpg",
        "구이/../../a.jpg",
        "/etc/a.jpg",
        "C:/a.jpg",
        "c:a.jpg",
        "구이\\불고기\\a.jpg",
        "..\\a.jpg",
        "a.jpg\0.txt",
        "a.txt\0.jpg",
        "불고기/a.zip\0.jpg",
        "../구이.zip",
    ],
)
@pytest.mark.parametrize("nested", [False, True])
def test_an_unsafe_name_is_refused_and_writes_nothing(tmp_path, name, nested):
    data = zipped({name: JPEG, "구이/불고기/ok.jpg": JPEG, "../read.txt": b"", "../": b""})
    records = scan(put(tmp_path / "kfood.zip", zipped({"구이.zip": data}) if nested else data))
    assert [r.problem for r in records if not r.source.endswith("ok.jpg")] == ["unsafe_path"]
    assert [r.label for r in records if r.problem is None] == ["불고기"]
    assert [path.name for path in tmp_path.rglob("*")] == ["kfood.zip"]


def test_two_members_of_one_name_get_different_names_and_the_last_counts(tmp_path):
    members = [
        ("불고기/a.jpg", JPEG),
        (unicodedata.normalize("NFD", "불고기/a.jpg").encode(), JPEG),
        ("불고기/a (2).jpg", JPEG),
        ("불고기/./a.jpg", OTHER),
    ]
    records = scan(put(tmp_path / "kfood.zip", zipped(members)))
    assert {r.source: r.problem for r in records} == {
        "불고기/a.jpg": None,
        "불고기/a (2).jpg": None,
        "불고기/a (3).jpg": "duplicate_member",
        "불고기/a (4).jpg": "duplicate_member",
    }
    assert read_picture(next(r for r in records if r.source == "불고기/a.jpg")) == OTHER
    inner = [("구이.zip", zipped({"불고기/a.jpg": JPEG})), ("구이.zip", zipped({"불고기/b.jpg": JPEG}))]
    records = scan(put(tmp_path / "twice.zip", zipped(inner)))
    assert {r.source: r.problem for r in records} == {"구이.zip": "duplicate_member", "구이.zip/불고기/b.jpg": None}


# --- bombs


def peak_bytes(call) -> int:
    tracemalloc.start()
    try:
        call()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def bomb(num_bytes: int, **fields: int) -> bytes:
    """Return a zip whose only picture inflates to `num_bytes` zeros."""
    data = zipped({"불고기/a.jpg": bytes(num_bytes)}, method=zipfile.ZIP_DEFLATED)
    for name, value in fields.items():
        data = with_field(data, 0, {"unpacked": UNPACKED, "packed": PACKED}[name], value)
    return data


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize(
    ("data", "refusal"),
    [
        (bomb(300 * 2**20), "too_large: 314,572,800 bytes when unpacked"),
        (bomb(300 * 2**20, unpacked=1000), "unreadable: damaged in its zip"),
        (bomb(2**20, unpacked=2**32 - 2), "too_large"),
    ],
    ids=["honest", "lying small", "lying large"],
)
def test_a_bomb_is_not_inflated(tmp_path, data, refusal, nested):
    (record,) = scan(put(tmp_path / "kfood.zip", zipped({"구이.zip": data}) if nested else data))

    def read():
        with pytest.raises(ImageRejected, match=refusal):
            read_picture(record)

    assert peak_bytes(read) < 8 * 2**20


def test_no_memory_is_reserved_for_a_size_beyond_the_data(tmp_path):
    (record,) = scan(put(tmp_path / "kfood.zip", bomb(2**20, unpacked=200 * 2**20)))

    def read():
        with pytest.raises(ImageRejected, match="unreadable: damaged in its zip"):
            read_picture(record)

    assert peak_bytes(read) < 8 * 2**20


def test_a_compressed_zip_of_zeros_in_a_zip_is_refused_before_it_is_inflated(tmp_path):
    num_bytes = opened.MAX_UNPACKED_BYTES + 1
    data = zipped({"구이.zip": bytes(num_bytes), "국.zip": bytes(2**20)}, method=zipfile.ZIP_DEFLATED)
    path = put(tmp_path / "kfood.zip", with_field(data, 1, UNPACKED, 1000))
    found = []
    assert peak_bytes(lambda: found.extend(scan(path))) < 8 * 2**20
    assert output(found) == {"구이.zip": "too_large", "국.zip": "unreadable_archive"}
    assert "extract the outer zip and pack the folder" in found[0].detail


def test_a_directory_of_a_claimed_gigabyte_is_not_read(tmp_path):
    """The file is sparse, and its last bytes claim that all bytes before them are a directory."""
    end = b"PK\5\6" + bytes(8) + (2**30).to_bytes(4, "little") + bytes(6)
    path = put(tmp_path / "kfood.zip", b"")
    with open(path, "r+b") as file:
        file.seek(2**30)
        file.write(end)

    def look():
        with pytest.raises(SourceError, match=r"not a complete zip \(asks for 1,073,741,824 bytes at once\)"):
            scan(path)

    assert peak_bytes(look) < 8 * 2**20


def test_members_that_share_their_data_are_refused(tmp_path):
    """A small zip could hold petabytes if many entries of its directory share the data of one member."""
    data = zipped({"불고기/a.jpg": JPEG, "불고기/b.jpg": JPEG})
    overlapping = with_field(data, 1, OFFSET, 0)
    with pytest.raises(SourceError, match="its members overlap"):
        scan(put(tmp_path / "kfood.zip", overlapping))
    path = put(tmp_path / "outer.zip", zipped({"구이.zip": overlapping, "국.zip": data}))
    assert Counter(r.problem for r in scan(path)) == {None: 2, "unreadable_archive": 1}
    with pytest.raises(SourceError, match="its members overlap"):
        scan(put(tmp_path / "beyond.zip", with_field(data, 1, PACKED, 2 * len(JPEG))))


# --- damaged zips

SOUND = zipped({"갈비구이/a.jpg": JPEG})
DAMAGED = {
    "cut short": SOUND[:-30],
    "no zip": JPEG,
    "no bytes": b"",
    "damaged directory": SOUND.replace(b"PK\1\2", b"PK\1\0"),
    "directory elsewhere": SOUND[:-6] + b"\xff\xff\xff\x7f" + SOUND[-2:],
    "beginning lost": SOUND[100:],
    "a name not as it says": zipped({b"\xb0\xa1.jpg": JPEG}).replace(
        b"PK\1\2\x14\x03\x14\0\0\0", b"PK\1\2\x14\x03\x14\0\0\x08"
    ),
    "of a later version": SOUND.replace(b"PK\1\2\x14\x03\x14", b"PK\1\2\x14\x03\xff"),
}


@pytest.mark.parametrize("fault", DAMAGED)
def test_a_damaged_zip_is_an_error_as_the_source_and_one_refusal_inside_a_source(tmp_path, fault):
    damaged = DAMAGED[fault]
    with pytest.raises(SourceError, match=r"kfood\.zip cannot be read: .* → download it again"):
        scan(put(tmp_path / "kfood.zip", damaged))
    sound = {f"{name}.zip": zipped({"불고기/a.jpg": JPEG}) for name in ("국", "면", "밥")}
    for method in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        records = scan(put(tmp_path / "outer.zip", zipped(sound | {"구이.zip": damaged}, method=method)))
        assert Counter(r.problem for r in records) == {None: 3, "unreadable_archive": 1}
        assert next(r.source for r in records if r.problem) == "구이.zip"
        assert all(read_picture(r) == JPEG for r in records if r.problem is None)
    as_folder(tmp_path / "folder", sound | {"구이.zip": damaged})
    assert Counter(r.problem for r in scan(tmp_path / "folder")) == {None: 3, "unreadable_archive": 1}


def test_an_inner_zip_with_a_wrong_size_is_refused(tmp_path):
    outer = zipped({"구이.zip": SOUND, "국.zip": SOUND})
    long_name = bytearray(outer)
    long_name[outer.rindex(b"PK\3\4", 0, outer.rindex(SOUND)) + 27] = 0x7F
    for damaged in (with_field(outer, 1, UNPACKED, len(SOUND) + 50), bytes(long_name)):
        records = scan(put(tmp_path / "kfood.zip", damaged))
        assert {r.source: r.problem for r in records} == {
            "구이.zip/갈비구이/a.jpg": None,
            "국.zip": "unreadable_archive",
        }


def test_a_zip_without_pictures_is_no_refused_picture_and_is_counted(tmp_path):
    for members, fault in (({}, "holds no pictures → "), ({"org_url.csv": b"a"}, r"holds no pictures, but \.csv 1 → ")):
        with pytest.raises(SourceError, match=fault):
            scan(put(tmp_path / "kfood.zip", zipped(members)))
    inner = {"구이.zip": zipped({}), "국.zip": zipped({"a.txt": b""}), "면.zip": zipped({"라면/a.jpg": JPEG})}
    for source in (put(tmp_path / "outer.zip", zipped(inner)), as_folder(tmp_path / "folder", inner)):
        found = scan_source(source)
        assert output(found.records) == {"면.zip/라면/a.jpg": ("면", "라면")}
        assert found.ignored.by_suffix == {".zip": 2, ".txt": 1}


def test_a_third_level_of_zips_is_refused_and_does_not_affect_other_pictures(tmp_path):
    deepest = zipped({"불고기/a.jpg": JPEG})
    middle = zipped({"더.zip": deepest, "불고기/b.jpg": JPEG})
    records = scan(put(tmp_path / "kfood.zip", zipped({"구이.zip": middle})))
    assert output(records) == {"구이.zip/더.zip": "nested_archive", "구이.zip/불고기/b.jpg": ("구이", "불고기")}


def test_encrypted_members_are_refused(tmp_path):
    inner = with_field(zipped({"불고기/a.jpg": JPEG, "불고기/b.jpg": JPEG}), 0, FLAGS, 1)
    data = with_field(zipped({"구이.zip": inner, "국.zip": SOUND}), 1, FLAGS, 1)
    records = scan(put(tmp_path / "kfood.zip", data))
    assert {r.source: r.problem for r in records} == {
        "구이.zip/불고기/a.jpg": "encrypted",
        "구이.zip/불고기/b.jpg": None,
        "국.zip": "encrypted",
    }


MEMBERS = {f"불고기/{i}.jpg": JPEG for i in range(3)}


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: with_field(data, 1, CRC, 0),
        lambda data: with_field(data, 1, METHOD, 99),
        lambda data: with_field(data, 1, METHOD, zipfile.ZIP_LZMA),
        lambda data: with_field(data, 1, METHOD, zipfile.ZIP_DEFLATED),
        lambda data: with_field(data, 1, UNPACKED, len(JPEG) + 1),
        lambda data: with_field(data, 1, UNPACKED, 10),
        lambda data: with_field(data, 1, PACKED, 10),
        lambda data: with_field(data, 1, OFFSET, data.index(b"PK\3\4", 100) + 1),
    ],
    ids=["crc", "unknown method", "lzma", "no deflate", "too long", "too short", "packed short", "no header there"],
)
@pytest.mark.parametrize("nested", [False, True])
def test_a_damaged_member_is_refused_and_does_not_affect_the_others(tmp_path, damage, nested):
    data = damage(zipped(MEMBERS))
    records = scan(put(tmp_path / "kfood.zip", zipped({"구이.zip": data}) if nested else data))
    for workers in (1, 2):
        pictures, refused = prepared(records, workers)
        assert [r.reason for r in refused] == ["unreadable"]
        assert refused[0].source.endswith("불고기/1.jpg")
        assert len(pictures) == 2


def test_a_damaged_byte_in_a_member_is_noticed(tmp_path):
    data = zipped(MEMBERS, method=zipfile.ZIP_DEFLATED)
    at = data.index(b"PK\3\4", 100) + 200
    records = scan(put(tmp_path / "kfood.zip", data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]))
    _, refused = prepared(records, 1)
    assert [(r.source, r.reason) for r in refused] == [("불고기/1.jpg", "unreadable")]


def test_a_few_damaged_bytes_cause_only_refusals(tmp_path):
    """Overwrite bytes, mostly in headers and directories. Each picture is still read, or refused by name."""
    rng = random.Random(0)
    tiny = {f"불고기/{i}.jpg": b"picture" * i for i in range(3)} | {"불고기/crop_area.properties": b"1=1,2,3,4"}
    methods = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
    sound = [
        zipped({"구이.zip": zipped(tiny, method=a), "찜/찜/a.jpg": b"a"}, method=b) for a in methods for b in methods
    ]
    outcomes = Counter[str]()
    for _ in range(1000):
        data = bytearray(rng.choice(sound))
        heads = [i for i in range(len(data)) if data.startswith((b"PK\1\2", b"PK\3\4", b"PK\5\6"), i)]
        for _ in range(rng.choice((1, 1, 4))):
            at = rng.choice([rng.choice(heads) + rng.randrange(46), rng.randrange(len(data))])
            data[at % len(data)] = rng.choice((0, 255, rng.randrange(256)))
        outcomes.update(_outcomes(put(tmp_path / "kfood.zip", bytes(data))))
    assert outcomes["SourceError"] and outcomes["unreadable"] and outcomes["unreadable_archive"] and outcomes["read"]


def _outcomes(path):
    try:
        records = scan(path)
    except SourceError as error:
        # The error is not "has changed": that would stop a packing because of one damaged zip.
        assert "cannot be read" in str(error) or "holds no pictures" in str(error)
        return ["SourceError"]
    assert len({r.source for r in records}) == len(records)
    return [record.problem or _outcome(record) for record in records]


def _outcome(record):
    try:
        assert len(read_picture(record)) == record.num_bytes
        return "read"
    except ImageRejected as rejected:
        return rejected.reason


# --- through processes, and zips that change


def test_one_and_two_workers_read_the_same_from_zips(tmp_path):
    inner = zipped({f"불고기/{i}.jpg": encoded(picture(i)) for i in range(40)})
    stored = zipped({"구이.zip": inner, "국.zip": inner, "육회/a.jpg": JPEG, "빈/b.jpg": b"", "빈/c.jpg": b"no"})
    packed = zipped({"구이.zip": inner, "국.zip": inner}, method=zipfile.ZIP_DEFLATED)
    as_folder(tmp_path / "source", {"하나.zip": stored, "둘.zip": packed, "찜/찜/a.jpg": JPEG})
    records = scan(tmp_path / "source")
    alone, together = prepared(records, 1), prepared(records, 2)
    assert alone == together
    assert len(alone[0]) == 162
    assert Counter(r.reason for r in alone[1]) == {"empty": 1, "unreadable": 1}


def _read_all(records, results):
    results.put([read_picture(record) for record in records])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_a_forked_process_opens_zips_itself(tmp_path):
    inner = zipped({f"불고기/{i}.jpg": encoded(picture(i)) for i in range(20)})
    records = scan(put(tmp_path / "kfood.zip", zipped({"구이.zip": inner, "국.zip": inner})))
    expected = [read_picture(record) for record in records]
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    with opened._of_this_process()._lock:  # another thread may hold the lock at the moment of the fork
        children = [context.Process(target=_read_all, args=(records, results), daemon=True) for _ in range(2)]
        for child in children:
            child.start()
    assert [read_picture(record) for record in records] == expected
    assert [results.get(timeout=60) for _ in children] == [expected, expected]
    for child in children:
        child.join()


def test_few_zips_are_open_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(opened, "_MAX_FILES", 3)
    as_folder(tmp_path, {f"{i}.zip": zipped({f"불고기/{i}.jpg": encoded(picture(i))}) for i in range(10)})
    records = scan(tmp_path)
    before = len(os.listdir("/proc/self/fd")) if sys.platform == "linux" else 0
    assert len({read_picture(r) for r in records + records}) == 10
    if sys.platform == "linux":
        assert len(os.listdir("/proc/self/fd")) - before == 3
    opened.close_all()
    if sys.platform == "linux":
        assert len(os.listdir("/proc/self/fd")) == before


def test_all_unpacked_zips_together_stay_under_the_limit(tmp_path, monkeypatch):
    inner = zipped({f"불고기/{i}.jpg": JPEG for i in range(10)})
    data = zipped({f"{i}.zip": inner for i in range(6)}, method=zipfile.ZIP_DEFLATED)
    monkeypatch.setattr(opened, "MAX_UNPACKED_BYTES", 2 * len(inner) + 10)
    records = scan(put(tmp_path / "kfood.zip", data))
    for record in records + records:
        assert read_picture(record) == JPEG
        assert sum(map(len, opened._of_this_process()._unpacked.values())) <= 2 * len(inner)
    assert len(records) == 60


CHANGES = {
    "gone": lambda path: path.unlink(),
    "replaced": lambda path: (path.unlink(), path.write_bytes(zipped({"불고기/0.jpg": JPEG}))),
    "cut short": lambda path: os.truncate(path, 300),
    "grown": lambda path: path.write_bytes(path.read_bytes() + b"more"),
    "written over": lambda path: (path.write_bytes(bytes(path.stat().st_size)), os.utime(path, ns=(0, 0))),
    "a folder now": lambda path: (path.unlink(), path.mkdir()),
}


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
@pytest.mark.parametrize("change", CHANGES)
def test_a_zip_that_has_changed_since_it_was_listed_stops_the_packing(tmp_path, change, method):
    path = put(tmp_path / "kfood.zip", zipped({"구이.zip": zipped(MEMBERS)}, method=method))
    records = scan(path)
    CHANGES[change](path)
    with pytest.raises(SourceError, match=r"kfood\.zip (can no longer be read|has changed since it was listed)"):
        read_picture(records[0])
    with pytest.raises(SourceError, match=r"kfood\.zip (can no longer be read|has changed since it was listed)"):
        prepared(records, 2)


@pytest.mark.parametrize("change", ["cut short", "grown", "written over"])
def test_a_change_is_noticed_in_a_zip_that_is_open(tmp_path, change):
    path = put(tmp_path / "kfood.zip", zipped(MEMBERS))
    first, second, _ = scan(path)
    assert read_picture(first) == JPEG
    CHANGES[change](path)
    with pytest.raises(SourceError, match="has changed since it was listed"):
        read_picture(second)


def test_a_zip_shortened_between_two_reads_is_noticed_by_the_read(tmp_path):
    path = put(tmp_path / "kfood.zip", zipped(MEMBERS))
    record = scan(path)[2]
    view = opened.open_view(record.member.archive, zips.read_member)
    os.truncate(path, 100)
    with pytest.raises(SourceError, match="has changed since it was listed"):
        view.read()


def test_a_zip_overwritten_while_it_is_read_is_no_fault_of_the_picture(tmp_path, monkeypatch):
    path = put(tmp_path / "kfood.zip", zipped(MEMBERS))
    record = scan(path)[0]

    def write_over_and_go_on(view, offset):
        CHANGES["written over"](path)
        return offset

    monkeypatch.setattr(read, "data_offset", write_over_and_go_on)
    with pytest.raises(SourceError, match="has changed since it was listed"):
        read_picture(record)


# --- the view


def test_a_view_reads_like_the_bytes_it_shows(tmp_path):
    data = bytes(range(256)) * 5
    path = put(tmp_path / "file", b"before" + data + b"after")
    status = path.stat()
    archive = zips.Archive(path, status.st_size, status.st_mtime_ns, start=6, num_bytes=len(data))
    view, model = opened.open_view(archive, zips.read_member), io.BytesIO(data)
    steps = [("read", 10), ("seek", 1000), ("read", 500), ("read", 5), ("seek", -30, 2), ("read", 7), ("seek", 3, 1)]
    for name, *arguments in [*steps, ("tell",), ("read",), ("seek", 5000), ("read", 1), ("seek", 0), ("read", -1)]:
        assert getattr(view, name)(*arguments) == getattr(model, name)(*arguments), (name, arguments)
    with pytest.raises(OSError, match="before the start"):
        view.seek(-1)
    wrong = replace(archive, num_bytes=len(data) + 100)
    with pytest.raises(SourceError, match="has changed"):
        opened.open_view(wrong, zips.read_member).read()
