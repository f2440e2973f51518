"""Korean text is read in the encoding that fits all of it, or refused with the line and the byte."""

import csv
import unicodedata
from pathlib import Path

import pytest

from kfood_dist.data.encoding import name_text, read_text, require_encoding, side_of
from kfood_dist.errors import SourceError

HEADER = b"image_path,label\n"


def both(utf8: str, cp949: str) -> bytes:
    return HEADER + utf8.encode("utf-8") + cp949.encode("cp949")


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "cp949", "utf-16", "utf-16-le", "utf-16-be", "utf-32"])
@pytest.mark.parametrize("text", ["a.jpg,불고기\n", "회/a.jpg,회\n", "a.jpg,회\n", "a.jpg,TS_카\nb.jpg,튀김\n"])
def test_a_text_is_read_in_the_encoding_it_was_written_in(text: str, encoding: str) -> None:
    data = ("image_path,label\n" + text).encode(encoding)
    assert read_text(data, "a.csv") == "image_path,label\n" + text


@pytest.mark.parametrize("text", ["crème brûlée", "Käse", "jalapeño", "à la carte", "ラーメン", "불고기,±5 °C 10 µm,½"])
def test_text_without_hangul_is_unchanged(text: str) -> None:
    assert read_text(HEADER + text.encode(), "a.csv") == "image_path,label\n" + text


def test_utf16_without_a_byte_order_mark_is_detected_and_one_nul_is_not_enough() -> None:
    text = "라벨,image_path,label\r\n가각,가.jpg,가가가\r\n"
    assert [read_text(text.encode(f"utf-16-{end}"), "a.csv") for end in ("le", "be")] == [text, text]
    assert read_text(("\0" + text).encode(), "a.csv") == "\0" + text


def test_rare_syllables_and_signs_of_korean_windows_are_read_correctly() -> None:
    text = "똠양꿍,펲,㎖ 湯 불고기\n"
    assert read_text(text.encode("cp949"), "a.csv") == text


@pytest.mark.parametrize(
    ("data", "fault"),
    [
        (
            both("a.jpg,불고기\nb.jpg,갈비구이\nc.jpg,", "약과\n"),
            r"mostly UTF-8, but CP949 here: line 4, byte 58 of the",
        ),
        (both("a.jpg,불고기\nb.jpg,갈비구이\nc.jpg,", "회\n"), r"mostly UTF-8, but CP949 here: line 4, byte 58 of the"),
        (both("a.jpg,불고기\r\nb.jpg,", "약\n"), r"mostly UTF-8, but CP949 here: line 3, byte 40 of the"),
        (
            both("a.jpg,약과\n", "b.jpg,불고기\nc.jpg,갈비구이\n"),
            r"mostly CP949, but UTF-8 here: line 2, byte 23 of the",
        ),
        (both("a.jpg,crème\n", "b.jpg,불고기\n"), r"mostly CP949, but UTF-8 here: line 2, byte 25 of the"),
        (both("a.jpg,불고기\nb.jpg,", "") + b"\xc8\n", r"mostly UTF-8, but not here: line 3, byte 39 of the"),
        (HEADER + "a.jpg,불고기".encode()[:-1], r"mostly UTF-8, but not here: line 2, byte 29 of the"),
        (b"\xef\xbb\xbf" + both("a.jpg,", "약과\n"), r"line 2, byte 26 of the"),
        (both("a.jpg,갈비", "구이\n"), r"mostly UTF-8, but not here: line 2, byte 29"),
        (
            both("", "a.jpg,불고기\nb.jpg,약과\n") + "c.jpg,갈비".encode() + b"\xb1\xb8\n",
            r"but UTF-8 here: line 4, byte 47",
        ),
        (HEADER + "a.jpg,寿司\n".encode("shift-jis"), r"no Hangul as CP949: line 2, byte 23"),
        (HEADER + "a.jpg,Käse\n".encode("latin-1"), r"neither UTF-8 nor CP949 nor UTF-16 text: line 2, byte 24"),
        (HEADER + "a.jpg,ﾗｰﾒﾝ\n".encode("shift-jis"), r"no Hangul as CP949: line 2, byte 25"),
        ("a.jpg,불고기\n".encode("utf-16")[:-1], r"neither UTF-8 nor CP949 nor UTF-16 text: line 1, byte 0"),
    ],
)
def test_a_text_of_two_encodings_or_none_is_refused_with_line_and_byte(data: bytes, fault: str) -> None:
    with pytest.raises(SourceError, match=rf"^a\.csv .*{fault}.* → save all of it as UTF-8; for a CSV, --encoding"):
        read_text(data, "a.csv")


def test_the_fits_check_decides_between_two_possible_encodings() -> None:
    data = "Aī\n".encode()  # A카 in CP949
    assert read_text(data, "a.csv") == "Aī\n"
    assert read_text(data, "a.csv", fits=lambda text: "카" in text) == "A카\n"
    assert read_text("회\n".encode("cp949"), "a.csv", fits=lambda text: "ȸ" in text) == "ȸ\n"


def test_a_given_encoding_is_used_and_must_fit() -> None:
    assert read_text("회,é\n".encode(), "a.csv", "utf-8") == "회,é\n"
    assert read_text("ﾗｰﾒﾝ\n".encode("shift-jis"), "a.csv", "shift-jis") == "ﾗｰﾒﾝ\n"
    with pytest.raises(SourceError, match=r"is not utf-8 here: line 2, byte 23 of the file"):
        read_text(both("", "a.jpg,약과\n"), "a.csv", "utf-8")
    for name in ("klingon", "hex", "rot13", ""):
        with pytest.raises(SourceError, match=f"--encoding {name} is not known → name one"):
            require_encoding(name)


def test_every_name_of_the_data_set_is_read_in_each_encoding(request: pytest.FixtureRequest) -> None:
    """This includes 회, whose CP949 bytes are valid UTF-8."""
    with open(Path(request.config.rootpath) / "shards" / "kfood150.tsv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    names = {name for row in rows for name in (row["category"], row["name"], *row["aliases"].split("|"))}
    for name in (*names, "카", "TS_카", "튀김_회.jpg"):
        apart = unicodedata.normalize("NFD", name)
        assert [name_text(name.encode("cp949")), name_text(name.encode())] == [name, name]
        assert name_text(apart.encode()) == apart
    assert [name_text(name.encode()) for name in ("crème", "Käse", "ラーメン")] == ["crème", "Käse", "ラーメン"]


def test_neighbouring_names_decide_the_encoding_of_an_ambiguous_name() -> None:
    name = "카 cake".encode("cp949")
    assert name_text(name) == "ī cake"
    assert side_of([name, "구이".encode("cp949")]) == "cp949"
    assert name_text(name, "cp949") == "카 cake"
    assert side_of([name, "구이".encode("cp949"), "구이".encode()]) == "utf-8"
