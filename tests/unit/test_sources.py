import errno
import os
import re
import unicodedata
from collections import Counter
from pathlib import Path

import pytest
from pictures import encoded, picture, write_folder

from kfood_dist.data.picture.images import ImageRejected
from kfood_dist.data.task.dish import DishClass
from kfood_dist.errors import SourceError
from kfood_dist.pack.sources import Record, read_picture, scan
from kfood_dist.pack.sources.scan import _with_unique_names

JPEG = encoded(picture())


def put(path: Path, data: bytes = JPEG) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def write_csv(path: Path, *rows: str, header="image_path,label", encoding="utf-8") -> Path:
    path.write_bytes("\n".join([header, *rows, ""]).encode(encoding))
    return path


def problems(records):
    return {record.source: record.problem for record in records}


# --- folders


@pytest.mark.parametrize(
    ("path", "label", "category"),
    [
        ("구이/갈비구이/a.jpg", "갈비구이", "구이"),
        ("구이/구이/갈비구이/a.jpg", "갈비구이", "구이"),
        ("kfood/구이/구이/갈비구이/a.jpg", "갈비구이", "구이"),
        ("구이/구이/갈비구이/갈비구이/a.jpg", "갈비구이", "구이"),
        ("만두/만두/만두/a.jpg", "만두", "만두"),
        ("kfood/만두/만두/만두/a.jpg", "만두", "만두"),
        ("만두/만두/a.jpg", "만두", "만두"),
        ("갈비구이/a.jpg", "갈비구이", ""),
        ("찌개/김치 찌개/a.jpg", "김치찌개", "찌개"),
    ],
)
def test_the_class_is_the_folder_of_the_picture_even_if_category_folders_repeat(tmp_path, path, label, category):
    put(tmp_path / path)
    (record,) = scan(tmp_path)
    assert (record.label, record.category, record.source) == (label, category, path)
    assert record.problem is None
    assert read_picture(record) == JPEG


def test_a_folder_around_everything_is_no_category(tmp_path):
    for place in ("만두/만두", "한과/약과", "한과/한과"):
        put(tmp_path / "kfood" / place / "a.jpg")
    found = {r.source: (r.category, r.label) for r in scan(tmp_path)}
    assert found == {
        "kfood/만두/만두/a.jpg": ("만두", "만두"),
        "kfood/한과/약과/a.jpg": ("한과", "약과"),
        "kfood/한과/한과/a.jpg": ("한과", "한과"),
    }
    assert {r.category for r in scan(tmp_path / "kfood" / "한과")} == {""}


def test_two_unicode_forms_of_one_name_are_two_pictures_with_different_names(tmp_path):
    for form in ("NFC", "NFD"):
        put(tmp_path / "약과" / unicodedata.normalize(form, "사진.jpg"), JPEG + form.encode())
    put(tmp_path / "약과" / "사진 (2).jpg")
    found = {r.source: read_picture(r) for r in scan(tmp_path)}
    assert found == {
        "약과/사진.jpg": JPEG + b"NFD",
        "약과/사진 (2).jpg": JPEG,
        "약과/사진 (3).jpg": JPEG + b"NFC",
    }


def test_many_records_of_one_name_get_numbers_that_are_not_taken():
    names = ["a.jpg"] * 20_000 + ["a (3).jpg", "a (3).jpg", "b.jpg", "b.jpg"]
    given = _with_unique_names([Record(Path(f"{n:05d}"), name) for n, name in enumerate(names)])
    assert {r.path.name: r.source for r in given if int(r.path.name) >= 20_000} == {
        "20000": "a (3).jpg",
        "20001": "a (3) (2).jpg",
        "20002": "b.jpg",
        "20003": "b (2).jpg",
    }
    numbered = [r.source for r in sorted(given, key=lambda r: r.path)[:20_000]]
    assert numbered == ["a.jpg", "a (2).jpg", *(f"a ({n}).jpg" for n in range(4, 20_002))]


def test_pictures_directly_in_the_source_belong_to_the_dish_it_is_named_after(tmp_path):
    put(tmp_path / "약과" / "a.jpg")
    (record,) = scan(tmp_path / "약과")
    assert (record.label, record.category, record.source) == ("약과", "", "a.jpg")


def test_only_pictures_count_with_suffixes_in_any_case(tmp_path):
    names = ["a.jpg", "b.JPG", "c.jpeg", "d.PNG", "e.gif", "f.bmp", "g.WebP"]
    others = [
        "crop_area.properties",
        "org_url.csv",
        ".DS_Store",
        "Thumbs.db",
        "._a.jpg",
        ".hidden.jpg",
        "jpg",
    ]
    for name in names + others:
        put(tmp_path / "구이" / "불고기" / name)
    put(tmp_path / ".trash" / "불고기" / "x.jpg")
    assert [os.path.basename(r.source) for r in scan(tmp_path)] == names


def test_names_in_nfd_are_compared_in_nfc_and_opened_by_their_real_path(tmp_path):
    apart = unicodedata.normalize("NFD", "구이/갈비구이/사진.jpg")
    put(tmp_path / apart)
    put(tmp_path / "구이/갈비구이/b.jpg")
    records = scan(tmp_path)
    assert {r.label for r in records} == {"갈비구이"}
    assert {r.category for r in records} == {"구이"}
    assert {r.source for r in records} == {"구이/갈비구이/사진.jpg", "구이/갈비구이/b.jpg"}
    assert all(read_picture(r) == JPEG for r in records)


def test_names_in_cp949_are_read_as_korean(tmp_path):
    folder = os.fsencode(tmp_path) + "/구이/불고기".encode("cp949")
    os.makedirs(folder)
    Path(os.fsdecode(folder + b"/a.jpg")).write_bytes(JPEG)
    (record,) = scan(tmp_path)
    assert (record.source, record.label, record.category) == ("구이/불고기/a.jpg", "불고기", "구이")
    assert read_picture(record) == JPEG


def test_links_are_followed_once_and_loops_end(tmp_path):
    root = write_folder(tmp_path / "source", {"구이/불고기": 2})
    elsewhere = write_folder(tmp_path / "elsewhere", {"약과": 1})
    (root / "구이" / "불고기" / "up").symlink_to(root)
    (root / "가" / "나").mkdir(parents=True)
    (root / "가" / "나" / "again").symlink_to(root / "가")
    (root / "한과").symlink_to(elsewhere)
    (root / "self").symlink_to(root / "self")
    (root / "구이" / "불고기" / "gone.jpg").symlink_to(root / "nowhere.jpg")
    records = scan(root)
    assert {r.source: r.label for r in records if r.problem is None} == {
        "구이/불고기/Img_0000.jpg": "불고기",
        "구이/불고기/Img_0001.jpg": "불고기",
        "한과/약과/Img_0000.jpg": "약과",
    }
    assert problems(records)["구이/불고기/gone.jpg"] == "missing"


def test_scanning_does_not_wait_for_a_pipe(tmp_path):
    put(tmp_path / "불고기" / "a.jpg")
    os.mkfifo(tmp_path / "불고기" / "b.jpg")
    assert problems(scan(tmp_path)) == {"불고기/a.jpg": None, "불고기/b.jpg": "missing"}


def test_labels_come_from_the_class_list_if_there_is_one(tmp_path):
    for name in ("국/만둣국", "국/떡국", "빵/식빵", "국/" + "가" * 13, "pasta/spaghetti_carbonara", "pasta/carbonara"):
        put(tmp_path / name / "a.jpg")
    classes = [
        DishClass("떡국_만두국", "국물", ("만둣국",)),
        DishClass("약과", "한과"),
        DishClass("spaghetti_carbonara", "pasta"),
    ]
    records = {r.source.split("/")[1]: r for r in scan(tmp_path, classes=classes)}
    assert (records["만둣국"].label, records["만둣국"].category) == ("떡국_만두국", "국물")
    assert (records["떡국"].label, records["떡국"].problem) == ("떡국_만두국", None)
    assert records["식빵"].problem == "unknown_label"
    assert (records["가" * 13].problem, records["가" * 13].detail) == ("bad_label", "13 syllables")
    assert (records["spaghetti_carbonara"].label, records["spaghetti_carbonara"].problem) == (
        "spaghetti_carbonara",
        None,
    )
    assert records["carbonara"].problem == "unknown_label"


def test_a_label_may_have_any_length_without_a_class_list(tmp_path):
    names = {"spaghetti_carbonara", "grilled_salmon", "가" * 13, "BBQ" + "나" * 13}
    for name in names:
        put(tmp_path / name / "a.jpg")
    assert {(r.label, r.problem) for r in scan(tmp_path)} == {(name, None) for name in names}


# --- CSV

# Rows of the real lists, unchanged. `train_4.csv` ends its lines with CR LF and names some pictures twice.
REAL_ROWS = [
    "dataset/kfood/나물/나물/가지볶음/Img_040_0782.jpg,가지볶음",
    "dataset/kfood/찌개/찌개/김치찌개/Img_119_0012.JPG,김치찌개",
    "dataset/kfood/탕/탕/곰탕_설렁탕/Img_136_0441.jpeg,곰탕_설렁탕",
    "dataset/kfood/만두/만두/만두/Img_049_0100.png,만두",
    "dataset/kfood/나물/나물/가지볶음/Img_040_0782.jpg,가지볶음",
]


@pytest.mark.parametrize("ending", ["\n", "\r\n"])
def test_the_real_lists_are_read_as_they_are(tmp_path, ending):
    for row in REAL_ROWS:
        put(tmp_path / row.split(",")[0])
    path = tmp_path / "train.csv"
    path.write_bytes(ending.join(["image_path,label", *REAL_ROWS, ""]).encode())
    records = scan(path)
    assert Counter(r.problem for r in records) == {None: 4, "duplicate_row": 1}
    sound = [r for r in records if r.problem is None]
    assert {(r.category, r.label) for r in sound} == {
        ("나물", "가지볶음"),
        ("찌개", "김치찌개"),
        ("탕", "곰탕_설렁탕"),
        ("만두", "만두"),
    }
    assert all(read_picture(r) == JPEG for r in sound)


def test_paths_start_at_the_csv_or_at_the_image_root(tmp_path):
    put(tmp_path / "pictures" / "구이" / "불고기" / "a.jpg")
    path = write_csv(tmp_path / "list.csv", "구이/불고기/a.jpg,불고기")
    assert problems(scan(path)) == {"구이/불고기/a.jpg": "missing"}
    (record,) = scan(path, image_root=tmp_path / "pictures")
    assert record.problem is None
    assert read_picture(record) == JPEG
    with pytest.raises(SourceError, match=r"image root .*none is not a folder"):
        scan(path, image_root=tmp_path / "none")
    with pytest.raises(SourceError, match="--image-root does not go with the folder"):
        scan(tmp_path, image_root=tmp_path)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "cp949", "utf-16", "utf-16-le", "utf-16-be"])
@pytest.mark.parametrize("dish", ["불고기", "회"])
def test_a_list_may_be_utf8_with_or_without_bom_or_cp949_or_utf16(tmp_path, encoding, dish):
    put(tmp_path / f"구이/{dish}/a.jpg")
    (record,) = scan(write_csv(tmp_path / "list.csv", f"구이/{dish}/a.jpg,{dish}", encoding=encoding))
    assert (record.label, record.problem) == (dish, None)


def test_a_list_of_two_encodings_is_refused_and_the_encoding_option_decides(tmp_path):
    put(tmp_path / "a.jpg")
    path = tmp_path / "list.csv"
    path.write_bytes("image_path,label\na.jpg,불고기\n".encode() + "b.jpg,약과\n".encode("cp949"))
    with pytest.raises(SourceError, match=r"list\.csv is mostly UTF-8, but CP949 here: line 3, byte 39 .*--encoding"):
        scan(path)
    with pytest.raises(SourceError, match=r"list\.csv is not utf-8 here: line 3, byte 39 of the file"):
        scan(path, encoding="utf-8")
    assert problems(scan(path, encoding="latin-1")) == {"a.jpg": None, "b.jpg": "missing"}
    with pytest.raises(SourceError, match="--encoding does not go with the folder"):
        scan(tmp_path, encoding="cp949")


def test_the_files_and_the_class_list_decide_between_two_possible_encodings(tmp_path):
    """`카 cake` in CP949 is `ī cake` in UTF-8."""
    path = write_csv(tmp_path / "list.csv", "카 cake/a.jpg,dish", encoding="cp949")
    assert problems(scan(path)) == {"ī cake/a.jpg": "missing"}
    put(tmp_path / "카 cake/a.jpg")
    assert problems(scan(path)) == {"카 cake/a.jpg": None}
    path = write_csv(tmp_path / "list.csv", "b.jpg,카 cake", encoding="cp949")
    assert [r.label for r in scan(path)] == ["īcake"]
    assert [r.label for r in scan(path, classes=[DishClass("카cake", "")])] == ["카cake"]


@pytest.mark.parametrize("separator", [",", ";", "\t"])
@pytest.mark.parametrize("first", ["", "sep={}\n", '"sep={}"\n', "SEP={}\r\n"])
def test_a_spreadsheets_separators_are_understood(tmp_path, separator, first):
    for name in ("a.jpg", "x,y;z.jpg"):
        put(tmp_path / name)
    rows = [["No", " Label", "IMAGE_PATH "], ["1", "약과", "a.jpg"], ["2", "약과", '"x,y;z.jpg"'], ["3", "약과"]]
    path = tmp_path / "list.tsv"
    text = first.format(separator) + "".join(separator.join(row) + "\r\n" for row in rows)
    path.write_bytes(text.encode("utf-16"))
    line = 5 if first else 4
    assert problems(scan(path)) == {"a.jpg": None, "x,y;z.jpg": None, f"list.tsv:{line}": "bad_row"}


def test_a_header_may_follow_blank_lines_and_hold_quoted_line_breaks(tmp_path):
    put(tmp_path / "a.jpg")
    header = '\n\nimage_path,label,"note\n(if any)"'
    assert problems(scan(write_csv(tmp_path / "list.csv", "a.jpg,약과,", header=header))) == {"a.jpg": None}


def test_a_stray_quote_in_the_header_is_refused(tmp_path):
    put(tmp_path / "a.jpg")
    path = write_csv(tmp_path / "list.csv", "a.jpg,약과,", 'a.jpg,약과,"', header='image_path,label,"note')
    with pytest.raises(SourceError, match="image_path"):
        scan(path)


def test_another_separator_may_be_named(tmp_path):
    put(tmp_path / "a.jpg")
    path = write_csv(tmp_path / "list.csv", "image_path|label", "a.jpg|약과", header="sep=|")
    assert problems(scan(path)) == {"a.jpg": None}


def test_a_quoted_cell_may_hold_line_breaks_and_a_stray_quote_damages_only_its_line(tmp_path):
    for name in ("a.jpg", "b.jpg", "c.jpg", "d.jpg", "e.jpg"):
        put(tmp_path / name)
    path = write_csv(
        tmp_path / "list.csv",
        'a.jpg,약과,"두 줄, 또는',
        "",
        '""세"" 줄"',
        'b.jpg,"약과',
        '",5" 접시',
        'c.jpg,"약과,stray',
        "d.jpg,약과,-",
        'e.jpg,약과,"',
        header="image_path,label,note",
    )
    assert [(r.source, r.label, r.problem) for r in scan(path)] == [
        ("a.jpg", "약과", None),
        ("b.jpg", "약과", None),
        ("d.jpg", "약과", None),
        ("list.csv:7", "", "bad_row"),
        ("list.csv:9", "", "bad_row"),
    ]


def test_a_duplicate_column_is_refused(tmp_path):
    with pytest.raises(SourceError, match=r"has the columns image_path, label, label → .*each name once"):
        scan(write_csv(tmp_path / "list.csv", "a.jpg,약과,떡", header="image_path,label,Label"))


def test_a_list_written_on_another_system_finds_its_files(tmp_path):
    """A path may have Windows separators. Its parts may have another Unicode form or case, or be CP949 on the disk."""
    apart = unicodedata.normalize("NFD", "구이")
    put(tmp_path / f"Kfood/{apart}/불고기/A.JPG")
    os.makedirs(folder := os.fsencode(tmp_path) + "/kfood2/회".encode("cp949"))
    Path(os.fsdecode(folder + b"/b.jpg")).write_bytes(JPEG)
    listed = [
        "KFOOD/구이/불고기/a.jpg,불고기",
        unicodedata.normalize("NFD", "kfood/구이/불고기/a.jpg") + ",불고기",
        r"kfood\구이\.\불고기\A.jpg,불고기",
        f"{tmp_path}/kfood/구이/../구이/불고기/a.Jpg,불고기",
        "Kfood2/회/B.jpg,회",
        "kfood2/회/c.jpg,회",
    ]
    records = scan(write_csv(tmp_path / "list.csv", *listed))
    assert Counter((r.source, r.problem) for r in records) == {
        ("Kfood/구이/불고기/A.JPG", None): 1,
        ("Kfood/구이/불고기/A.JPG", "duplicate_row"): 3,
        ("kfood2/회/b.jpg", None): 1,
        ("kfood2/회/c.jpg", "missing"): 1,
    }
    assert all(read_picture(r) == JPEG for r in records if r.problem is None)


def test_a_path_that_may_mean_several_files_means_the_exact_one_or_none(tmp_path):
    for name in ("A/foo.jpg", "a/Foo.jpg", "a/only.jpg", unicodedata.normalize("NFD", "a/각.jpg")):
        put(tmp_path / name)
    put(tmp_path / unicodedata.normalize("NFD", "A/각.jpg"), JPEG + b"other")
    listed = ["a/Foo.jpg,약과", "A/Foo.jpg,약과", "A/ONLY.jpg,약과", "a/각.jpg,약과"]
    records = scan(write_csv(tmp_path / "list.csv", *listed))
    assert problems(records) == {
        "a/Foo.jpg": None,
        "A/Foo.jpg": "ambiguous_path",
        "a/only.jpg": None,
        "a/각.jpg": None,
    }
    assert [r.detail for r in records if r.problem] == ["may be any of A/foo.jpg, a/Foo.jpg"]
    assert all(read_picture(r) == JPEG for r in records if r.problem is None)


def test_every_faulty_row_is_named_and_does_not_affect_the_others(tmp_path):
    for name in ("불고기/a.jpg", "불고기/b.jpg", "약과/c.jpg", "d.jpg"):
        put(tmp_path / name)
    path = write_csv(
        tmp_path / "list.csv",
        "불고기/a.jpg,불고기",
        '"불고기/b.jpg,불고기',
        "",
        "only one cell",
        "불고기/b.jpg,불고기,surplus",
        ",불고기",
        "불고기/none.jpg,불고기",
        "불고기/b.jpg,약과",
        "약과/c.jpg,",
        f"약과/c.jpg,{'가' * 13}",
        "약과/c.jpg,약 과",
        "d.jpg,약과",
        "불고기/\0.jpg,불고기",
    )
    found = Counter((r.source, r.problem) for r in scan(path))
    assert found == {
        ("불고기/a.jpg", None): 1,
        ("list.csv:3", "bad_row"): 1,
        ("list.csv:5", "bad_row"): 1,
        ("list.csv:6", "bad_row"): 1,
        ("list.csv:7", "bad_row"): 1,
        ("불고기/none.jpg", "missing"): 1,
        ("불고기/b.jpg", "label_disagrees"): 1,
        ("약과/c.jpg", "bad_label"): 1,
        ("약과/c.jpg", "label_disagrees"): 1,
        ("약과/c.jpg", None): 1,
        ("d.jpg", None): 1,
        ("불고기/\0.jpg", "missing"): 1,
    }


def test_other_columns_and_their_order_do_not_matter(tmp_path):
    put(tmp_path / "a.jpg")
    (record,) = scan(write_csv(tmp_path / "list.csv", "1,약과,a.jpg", header="id, label ,image_path"))
    assert (record.label, record.problem) == ("약과", None)


def test_an_absolute_path_under_the_root_is_named_relative_to_it(tmp_path):
    put(tmp_path / "약과" / "a.jpg")
    (record,) = scan(write_csv(tmp_path / "list.csv", f"{tmp_path}/약과/a.jpg,약과"))
    assert (record.source, record.problem) == ("약과/a.jpg", None)


# --- unusable sources and files


def test_an_unusable_source_is_refused_at_once(tmp_path):
    with pytest.raises(SourceError, match="does not exist"):
        scan(tmp_path / "none")
    with pytest.raises(SourceError, match=r"cannot be read \(File name too long\) → "):
        scan(tmp_path / ("x" * 300))
    (tmp_path / "empty" / "구이").mkdir(parents=True)
    with pytest.raises(SourceError, match="holds no pictures"):
        scan(tmp_path / "empty")
    with pytest.raises(SourceError, match=r"kfood\.ZIP cannot be read: not a complete zip .* → download it again"):
        scan(put(tmp_path / "kfood.ZIP"))
    with pytest.raises(SourceError, match=r"neither a folder nor a \.zip, \.csv or \.jsonl"):
        scan(put(tmp_path / "list.txt"))
    with pytest.raises(SourceError, match="holds no pictures"):
        scan(write_csv(tmp_path / "rows.csv"))
    with pytest.raises(SourceError, match="has the columns a, b"):
        scan(write_csv(tmp_path / "columns.csv", "1,2", header="a,b"))
    with pytest.raises(SourceError, match=r"has the columns \(none\)"):
        scan(put(tmp_path / "nothing.csv", b""))
    with pytest.raises(SourceError, match="neither UTF-8 nor CP949"):
        scan(put(tmp_path / "binary.csv", b"\xff\xfe\x00\xd8" * 4))


def test_a_file_that_cannot_be_read_is_only_a_refused_picture(tmp_path):
    path = put(tmp_path / "약과" / "a.jpg")
    (record,) = scan(tmp_path)
    path.unlink()
    path.mkdir()
    with pytest.raises(ImageRejected, match="unreadable: cannot be read"):
        read_picture(record)
    path.rmdir()
    path.symlink_to(path)
    with pytest.raises(ImageRejected, match="unreadable: cannot be read"):
        read_picture(record)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every file")
def test_a_file_without_read_permission_is_only_a_refused_picture(tmp_path):
    path = put(tmp_path / "약과" / "a.jpg")
    path.chmod(0)
    (record,) = scan(tmp_path)
    with pytest.raises(ImageRejected, match="unreadable: cannot be read"):
        read_picture(record)


def test_a_source_that_disappeared_stops_the_packing(tmp_path):
    put(tmp_path / "source" / "약과" / "a.jpg")
    (record,) = scan(tmp_path / "source")
    (tmp_path / "source").rename(tmp_path / "moved")
    with pytest.raises(SourceError, match=r"a\.jpg was listed and can no longer be read .* → bring it"):
        read_picture(record)


@pytest.mark.parametrize("data", [JPEG + b"more", JPEG[:-1], b""])
def test_a_file_whose_size_has_changed_stops_the_packing(tmp_path, data):
    path = put(tmp_path / "약과" / "a.jpg")
    (record,) = scan(tmp_path)
    path.write_bytes(data)
    with pytest.raises(SourceError, match=r"a\.jpg has changed since it was listed → .*run the same command again"):
        read_picture(record)


@pytest.mark.parametrize("fault", [errno.EIO, errno.ESTALE, errno.ENOTCONN, errno.ENODEV])
def test_a_failing_disk_stops_the_packing(tmp_path, monkeypatch, fault):
    put(tmp_path / "약과" / "a.jpg")
    (record,) = scan(tmp_path)

    def failing(*_):
        raise OSError(fault, os.strerror(fault))

    monkeypatch.setattr("builtins.open", failing)
    with pytest.raises(SourceError, match=re.escape(os.strerror(fault))):
        read_picture(record)


def test_a_huge_file_is_not_read_into_memory(tmp_path):
    path = put(tmp_path / "약과" / "a.jpg")
    os.truncate(path, 300 * 2**20)
    (record,) = scan(tmp_path)
    with pytest.raises(ImageRejected, match="too_large"):
        read_picture(record)


def test_a_device_file_is_an_unusable_picture_and_does_not_stop_the_packing():
    assert read_picture(Record(Path("/proc/self/mem"), "mem")) == b""
