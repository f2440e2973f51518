import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kfood_dist.data.task.dish import DishClass, clean, find_ambiguous_answer, is_match, load_classes, normalise
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
        ("\u1100\u200b\u1161", "가"),
        ("Spaghetti Carbonara", "SpaghettiCarbonara"),
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
    assert normalise(unicodedata.normalize("NFD", "가" * 13)) == "가" * 12


def test_only_hangul_counts_as_a_syllable():
    assert normalise("spaghetti_carbonara") == "spaghetti_carbonara"
    assert normalise("BBQ" + "가" * 12 + "_1") == "BBQ" + "가" * 12 + "_1"
    assert normalise("BBQ" + "가" * 13 + "_1") == "BBQ" + "가" * 12


def test_each_half_and_each_alias_is_right_and_similar_names_are_wrong():
    dish = DishClass("떡국_만두국", "국", ("만둣국",))
    for answer in ("떡국_만두국", "떡국", "만두국", " 만둣국 "):
        assert is_match(answer, dish)
    for answer in ("떡국_", "떡", "만두", "떡국만두국", "", "떡국 만두국 입니다"):
        assert not is_match(answer, dish)


def test_only_hangul_names_of_a_class_list_have_halves():
    for name in ("french_toast", "LA갈비_소갈비", "김치_1", "떡국_soup"):
        dish = DishClass(name, "")
        assert dish.accepted() == {name}
    assert DishClass("떡국_만두국", "", listed=False).accepted() == {"떡국_만두국"}
    apart = DishClass(unicodedata.normalize("NFD", "떡국_만두국"), "")
    assert all(is_match(unicodedata.normalize(form, "만두국"), apart) for form in ("NFC", "NFD"))
    assert DishClass("갑_을__병_", "").accepted() == {"갑_을__병_", "갑", "을", "병"}


def test_a_label_without_a_class_list_is_matched_completely():
    long, longer = (DishClass("가" * count, "", listed=False) for count in (12, 13))
    assert is_match("가 " * 13, longer) and not is_match("가 " * 13, long)
    assert not is_match("가" * 14, longer)
    assert is_match("가" * 13, DishClass("가" * 12, ""))  # a class of a list: an answer ends after 12 syllables


NAMES = st.text(st.sampled_from("가나_a \u200b"), min_size=1, max_size=30)


@given(st.lists(NAMES, max_size=6), NAMES)
def test_an_answer_is_right_for_only_one_of_the_found_labels(labels, answer):
    classes = [DishClass(name, "", listed=False) for name in {clean(label) for label in labels} - {""}]
    assert find_ambiguous_answer(classes) is None
    assert sum(is_match(answer, dish) for dish in classes) == (clean(answer) in {dish.name for dish in classes})


@given(st.lists(st.tuples(NAMES, NAMES), max_size=4), NAMES)
def test_an_answer_is_right_for_at_most_one_class_of_an_accepted_list(tmp_path_factory, rows, answer):
    path = tmp_path_factory.getbasetemp() / "classes.tsv"
    lines = ["category\tname\taliases", *(f"\t{name}\t{alias}" for name, alias in rows)]
    path.write_text("\n".join(lines), encoding="utf-8")
    try:
        classes = load_classes(path)
    except SourceError:
        return
    answers = {answer, *(half for name, _ in rows for half in (name, *name.split("_")))}
    assert all(sum(is_match(text, dish) for dish in classes) <= 1 for text in answers)


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
        (
            "category\tname\taliases\n국\t떡국_만두국\t\n국\t만둣국\t만두 국\n",
            "'만두국' stands for both 떡국_만두국 and 만둣국",
        ),
        (f"category\tname\n밥\t{'가' * 13}\n", "'가{13}' has 13 syllables, more than 12"),
    ],
)
def test_a_faulty_class_list_is_refused(tmp_path, content, fault):
    path = tmp_path / "classes.tsv"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(SourceError, match=fault):
        load_classes(path)


def test_a_class_list_without_hangul_has_no_halves_and_no_length_limit(tmp_path):
    path = tmp_path / "classes.tsv"
    names = ["french_toast", "french_fries", "french", "spaghetti_carbonara", "spaghetti_bolognese"]
    path.write_text("\n".join(["category\tname", *(f"\t{name}" for name in names)]), encoding="utf-8")
    classes = load_classes(path)
    for name in (*names, "spaghetti", "fries", "spaghetti_carbonar"):
        assert [dish.name for dish in classes if is_match(name, dish)] == [n for n in names if n == name]


def test_a_class_list_that_is_missing_or_in_two_encodings_is_refused(tmp_path):
    with pytest.raises(SourceError, match="cannot be read"):
        load_classes(tmp_path / "none.tsv")
    (tmp_path / "both.tsv").write_bytes("category\tname\n한과\t약과\n".encode() + "회\t육회\n".encode("cp949"))
    with pytest.raises(SourceError, match=r"both\.tsv is mostly UTF-8, but CP949 here: line 3, byte 28 .* UTF-8"):
        load_classes(tmp_path / "both.tsv")


@pytest.mark.parametrize("encoding", ["utf-8", "cp949", "utf-16"])
def test_a_class_list_is_read_in_its_encoding_and_its_columns_in_any_case(tmp_path, encoding):
    (tmp_path / "list.tsv").write_bytes("Category\t NAME\n회\t회\n".encode(encoding))
    assert load_classes(tmp_path / "list.tsv") == [DishClass("회", "회")]


def test_a_byte_order_mark_is_not_part_of_the_first_column(tmp_path):
    (tmp_path / "classes.tsv").write_bytes("\ufeffcategory\tname\n한과\t약과\n".encode())
    assert load_classes(tmp_path / "classes.tsv") == [DishClass("약과", "한과")]
