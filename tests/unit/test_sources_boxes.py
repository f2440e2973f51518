import pytest
from pictures import encoded, picture
from zips import as_folder, zipped

from kfood_dist.pack.sources import BoxCount, scan_source
from kfood_dist.pack.sources.boxes import parse

JPEG = encoded(picture())


@pytest.mark.parametrize(
    ("line", "box"),
    [
        ("Img_000_0001=76,41,485,427", (76, 41, 485, 427)),
        ("  Img_000_0001 = 76 , 41,485 ,427  ", (76, 41, 485, 427)),
        ("Img_000_0001:76,41,485,427", (76, 41, 485, 427)),
        ("Img_000_0001=76,41,485,427,", (76, 41, 485, 427)),
        ("Img_000_0001=76,41,485,427 dissimilar", (76, 41, 485, 427)),
        ("Img_000_0001=-3,0,485.0,427.5", (-3, 0, 485, 427)),
        ("Img_000_0001=76,41,485", None),
        ("Img_000_0001=76,41,485,427,9", None),
        ("Img_000_0001=,485,427", None),
        ("Img_000_0001=dissimilar,485,427", None),
        ("Img_000_0001=76,41,0,427", None),
        ("Img_000_0001=76,41,485,-427", None),
        ("Img_000_0001=1234567890,41,485,427", None),
        ("Img_000_0001", None),
        ("=76,41,485,427", None),
        ("Img_000_0001=nan,inf,1e9,4", None),
        ("Img_" * 1000 + "=76,41,485,427", None),
    ],
)
def test_a_line_gives_a_box_or_counts_as_malformed(line, box):
    boxes, num_malformed = parse(line.encode())
    assert (list(boxes.values()), num_malformed) == (([], 1) if box is None else ([box], 0))


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "cp949", "utf-16", "utf-16-le"])
def test_a_list_is_read_in_any_encoding(encoding):
    text = "#comment\r\n!another\r\n\r\n사진1=1,2,3,4\r\n사진1=5,6,7,8\r\n사진2 없음\r\n"
    assert parse(text.encode(encoding)) == ({"사진1": (5, 6, 7, 8)}, 1)


def test_lines_of_two_encodings_are_each_read_in_their_own():
    lines = "회1=1,2,3,4\n불고기=5,6,7,8\n".encode("cp949") + "약과=9,9,9,9\n".encode()
    assert parse(lines) == ({"회1": (1, 2, 3, 4), "불고기": (5, 6, 7, 8), "약과": (9, 9, 9, 9)}, 0)


def test_a_list_in_no_known_encoding_still_gives_its_ascii_names():
    assert parse(b"\xff\xfe\x80=1,2\nImg_1=1,2,3,4\n") == ({"Img_1": (1, 2, 3, 4)}, 1)


LIST = b"img_000_0001=1,2,30,40\nIMG_000_0002.jpg=5,6,70,80\nImg_9=1,1,1,1\nImg_000_0003=1,1,9,9\nnonsense\n"
DISH = {
    "구이/불고기/Img_000_0001.JPG": JPEG,
    "구이/불고기/Img_000_0002.jpg": JPEG,
    "구이/불고기/Img_000_0003.jpg": JPEG,
    "구이/불고기/Img_000_0003.png": JPEG,
    "구이/불고기/crop_area.properties": LIST,
    "구이/갈비구이/Img_000_0001.jpg": JPEG,
    "구이/갈비구이/org_url.csv": b"Img_000_0001,http://example.org",
}
BOXES = {
    "불고기/Img_000_0001.JPG": (1, 2, 30, 40),
    "불고기/Img_000_0002.jpg": (5, 6, 70, 80),
    "불고기/Img_000_0003.jpg": None,
    "불고기/Img_000_0003.png": None,
    "갈비구이/Img_000_0001.jpg": None,
}


@pytest.mark.parametrize("shape", ["folder", "zip", "zips"])
def test_boxes_are_found_beside_the_pictures_of_every_shape(tmp_path, shape):
    """Two lines match no picture: one names no picture, and one names a stem that two pictures share."""
    source = tmp_path / "kfood.zip"
    if shape == "folder":
        source = as_folder(tmp_path / "kfood", DISH)
    else:
        source.write_bytes(zipped(DISH if shape == "zip" else {"구이.zip": zipped(DISH)}))
    scanned = scan_source(source)
    assert scanned.kind == ("folder" if shape == "folder" else "zip")
    assert {"/".join(r.source.split("/")[-2:]): r.box for r in scanned.records} == BOXES
    assert scanned.boxes == BoxCount(lists=1, lists_unreadable=0, lines_malformed=1, lines_unmatched=2)


def test_a_table_finds_boxes_beside_its_pictures_and_need_not_name_them_all(tmp_path):
    as_folder(tmp_path, DISH)
    (tmp_path / "list.csv").write_text(
        "image_path,label\n구이/불고기/Img_000_0002.jpg,불고기\n구이/none/a.jpg,불고기\n"
    )
    scanned = scan_source(tmp_path / "list.csv")
    assert [(r.box, r.problem) for r in scanned.records] == [(None, "missing"), ((5, 6, 70, 80), None)]
    assert (scanned.kind, scanned.boxes) == ("csv", BoxCount(lists=1, lines_malformed=1))


def test_an_unreadable_list_of_boxes_does_not_lose_a_picture(tmp_path):
    (tmp_path / "folder" / "불고기" / "crop_area.properties").mkdir(parents=True)
    (tmp_path / "folder" / "불고기" / "a.jpg").write_bytes(JPEG)
    (record,) = (scanned := scan_source(tmp_path / "folder")).records
    assert (record.box, record.problem, scanned.boxes) == (None, None, BoxCount(lists_unreadable=1))
    data = zipped({"불고기/a.jpg": JPEG, "불고기/crop_area.properties": b"a=1,2,3,4"})
    (tmp_path / "kfood.zip").write_bytes(data.replace(b"a=1,2,3,4", b"a=9,9,9,9"))
    (record,) = (scanned := scan_source(tmp_path / "kfood.zip")).records
    assert (record.box, record.problem, scanned.boxes) == (None, None, BoxCount(lists_unreadable=1))
