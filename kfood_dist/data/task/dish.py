"""Dish names: one clean form for training, evaluation and prediction, and what counts as a match.

text of a folder, a CSV or a model ──► clean    ──► NFC, without spaces, quotes, brackets and invisible characters
a class of a class list            ──► accepted ──► name, aliases, halves of a Hangul `A_B`
a class found as a label           ──► accepted ──► name

Always holds: an answer is right for one class of a data set at most.
"""

import csv
import io
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import ClassVar

from kfood_dist.data.encoding import read_text
from kfood_dist.data.task.base import Columns, Message, asking
from kfood_dist.errors import SourceError

MAX_SYLLABLES = 12

_QUOTES = "\"'`´“”‘’‚„‹›«»"
_BRACKETS = "()[]{}<>（）［］｛｝＜＞「」『』【】〔〕〈〉《》"
_REMOVED = frozenset(_QUOTES + _BRACKETS)


@lru_cache(maxsize=2**14)  # a label is asked for with each of its pictures
def clean(text: str) -> str:
    """NFC, without white space, quotes, brackets and invisible (category Cf) characters; any length."""
    kept = "".join(
        c
        for c in unicodedata.normalize("NFC", text)
        if not (c.isspace() or c in _REMOVED or unicodedata.category(c) in ("Cf", "Cc"))
    )
    return unicodedata.normalize("NFC", kept)  # what stood between two halves of a syllable is gone


def normalise(text: str) -> str:
    """What an answer says as a name of a class list: `clean(text)`, cut after 12 syllables.

    A syllable is a Hangul character; other letters do not count.
    """
    cleaned = clean(text)
    syllables = (i for i, c in enumerate(cleaned) if _is_syllable(c))
    return cleaned[: next(islice(syllables, MAX_SYLLABLES, None), None)]


def num_syllables(text: str) -> int:
    """The number of Hangul syllables in `text`; Latin letters and digits are none."""
    return sum(map(_is_syllable, unicodedata.normalize("NFC", text)))


def _is_syllable(character: str) -> bool:
    return "가" <= character <= "힣"


@dataclass(frozen=True)
class DishClass:
    """One class of a packed data set: its clean name, category and the other names it goes by.

    `listed` tells a class of a class list from a label that was found. The rules of Korean dish names hold for
    listed classes alone: 12 syllables, and the halves of an `A_B` name.
    """

    name: str
    category: str
    aliases: tuple[str, ...] = ()
    listed: bool = True

    def accepted(self) -> frozenset[str]:
        """Every clean answer that is right: the name, its aliases, and each half of a listed, all Hangul `A_B` name."""
        name = clean(self.name)
        is_hangul = all(_is_syllable(c) or c == "_" for c in name)
        halves = name.split("_") if self.listed and is_hangul else []
        return frozenset(filter(None, [name, *halves, *map(clean, self.aliases)]))


def is_match(answer: str, dish: DishClass) -> bool:
    """Strict exact match of the clean answer; never an edit distance. For a listed class it is cut to 12 syllables."""
    return (normalise(answer) if dish.listed else clean(answer)) in dish.accepted()


class DishTask:
    """One question for all pictures: the dish's name. `classes` say which answers are right for it."""

    columns: ClassVar[tuple[str, ...]] = ("label",)
    example: ClassVar[Columns] = {"label": "비빔밥"}

    def __init__(self, system: str, prompt: str, classes: Iterable[DishClass] = ()):
        self._system = system
        self._prompt = prompt
        self._classes = {dish.name: dish for dish in classes}

    def messages(self, columns: Columns, num_pictures: int) -> tuple[Message, ...]:
        return asking(self._system, self._prompt, num_pictures)

    def answer(self, columns: Columns) -> str:
        return columns["label"]

    def label(self, columns: Columns) -> str:
        return columns["label"]

    def clean(self, answer: str) -> str:
        return clean(answer)

    def score(self, answer: str, columns: Columns) -> float:
        return float(is_match(answer, self._classes[columns["label"]]))


def stands_for_two(classes: Iterable[DishClass]) -> tuple[str, str, str] | None:
    """An answer that is right for two of the classes, and their names; None if there is none."""
    owner: dict[str, str] = {}
    for dish in classes:
        for name in sorted(dish.accepted()):
            if name in owner:
                return name, owner[name], dish.name
            owner[name] = dish.name
    return None


def load_classes(path: Path) -> list[DishClass]:
    """Read a tab-separated class list with the columns `category`, `name` and, if wanted, `aliases` (`a|b`).

    Raises SourceError when the file is missing, in an unknown encoding or lacks a column, when a name is empty or over
    12 syllables, or when an answer would be right for two classes.
    """
    try:
        text = read_text(path.read_bytes(), f"class list {path}")
        reader = csv.DictReader(io.StringIO(text, newline=""), delimiter="\t")
        reader.fieldnames = [name.strip().lower() for name in reader.fieldnames or []]
        rows = list(reader)
    except OSError as error:
        raise SourceError(
            f"class list {path} cannot be read ({error.strerror})", "name an existing .tsv with --classes"
        ) from None
    except csv.Error as error:
        raise SourceError(f"class list {path} is no table ({error})", "save it as UTF-8, tab-separated") from None
    if not rows or not {"category", "name"} <= set(rows[0]):
        raise SourceError(
            f"class list {path} lacks the columns category and name",
            "give it a header line like that of shards/kfood150.tsv",
        )
    classes = [
        DishClass(
            name=clean(row["name"] or ""),
            category=(row["category"] or "").strip(),
            aliases=tuple(filter(None, map(clean, (row.get("aliases") or "").split("|")))),
        )
        for row in rows
    ]
    _require_sound(classes, path)
    return classes


def _require_sound(classes: Iterable[DishClass], path: Path) -> None:
    for dish in classes:
        if not dish.name:
            raise SourceError(f"class list {path} has an empty name", "give every line a name")
        for name in (dish.name, *dish.aliases):
            if (length := num_syllables(name)) > MAX_SYLLABLES:
                raise SourceError(
                    f"class list {path}: '{name}' has {length} syllables, more than {MAX_SYLLABLES}",
                    "give it a shorter name, or pack without --classes, where labels have no limit",
                )
    if found := stands_for_two(classes):
        name, first, second = found
        raise SourceError(
            f"class list {path}: '{name}' stands for both {first} and {second}",
            "let every name, every alias and every half of a Hangul A_B belong to one class",
        )
