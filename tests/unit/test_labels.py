import unicodedata

import pytest

from kfood_dist.data.labels import DishClass, clean, is_match, load_classes, normalise
from kfood_dist.errors import SourceError


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("갈비구이", "갈비구이"),
        (unicodedata.normalize("NFD", "갈비구이"), "갈비구이"),
        ("  김치 찌개\n", "김치찌개"),
        ("“김치찌개”", "김치찌개"),
        ("[김치찌개](1)", "김치찌개1"),
        ("김치\u200b찌개\ufeff", "김치찌개"),
        ("김치\x00찌개", "김치찌개"),
        ("（약과）", "약과"),
        ("곰탕_설렁탕", "곰탕_설렁탕"),
        ("", ""),
        (" \u3000", ""),
    ],
)
def test_a_name_is_cleaned_the_same_however_it_was_written(text, name):
    assert normalise(text) == name
    assert normalise(normalise(text)) == name


def test_names_end_after_twelve_syllables():
    assert clean("가" * 13) == "가" * 13
    assert normalise("가 " * 13) == "가" * 12


def test_either_half_and_every_alias_is_right_and_nothing_near_it():
    dish = DishClass("떡국_만두국", "국", ("만둣국",))
    for answer in ("떡국_만두국", "떡국", "만두국", " 만둣국 "):
        assert is_match(answer, dish)
    for answer in ("떡국_", "떡", "만두", "떡국만두국", "", "떡국 만두국 입니다"):
        assert not is_match(answer, dish)


def test_the_shipped_list_holds_the_150_classes(request):
    classes = load_classes(request.config.rootpath / "shards" / "kfood150.tsv")
    assert len(classes) == 150
    assert len({dish.category for dish in classes}) == 27
    assert classes[0] == DishClass("갈비구이", "구이")
    assert classes[136].name == "곰탕_설렁탕"
    assert all(dish.category and 0 < len(dish.name) <= 12 for dish in classes)
    by_name = {dish.name: dish for dish in classes}
    assert is_match("자장면", by_name["짜장면"])
    assert not is_match("짬뽕", by_name["짜장면"])


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        ("name\n약과\n", "lacks the columns"),
        ("", "lacks the columns"),
        ("category\tname\n한과\t\n", "empty name"),
        ("category\tname\n한과\t약과\n한과\t약 과\n", "'약과' stands for both"),
        ("category\tname\taliases\n면\t짜장면\t\n면\t자장\t짜장면\n", "'짜장면' stands for both"),
    ],
)
def test_a_faulty_class_list_is_refused(tmp_path, content, fault):
    path = tmp_path / "classes.tsv"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(SourceError, match=fault):
        load_classes(path)


def test_a_class_list_that_is_not_there_or_of_two_encodings_is_refused(tmp_path):
    with pytest.raises(SourceError, match="cannot be read"):
        load_classes(tmp_path / "none.tsv")
    (tmp_path / "both.tsv").write_bytes("category\tname\n한과\t약과\n".encode() + "회\t육회\n".encode("cp949"))
    with pytest.raises(SourceError, match=r"both\.tsv is mostly UTF-8, but CP949 here: line 3, byte 28 .* UTF-8"):
        load_classes(tmp_path / "both.tsv")


@pytest.mark.parametrize("encoding", ["utf-8", "cp949", "utf-16"])
def test_a_class_list_is_read_in_its_encoding_and_its_columns_in_any_case(tmp_path, encoding):
    (tmp_path / "list.tsv").write_bytes("Category\t NAME\n회\t회\n".encode(encoding))
    assert load_classes(tmp_path / "list.tsv") == [DishClass("회", "회")]


def test_a_byte_order_mark_is_no_part_of_the_first_column(tmp_path):
    (tmp_path / "classes.tsv").write_bytes("\ufeffcategory\tname\n한과\t약과\n".encode())
    assert load_classes(tmp_path / "classes.tsv") == [DishClass("약과", "한과")]
