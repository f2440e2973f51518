"""Dish names: one clean form for training, evaluation and prediction, and the rule for a match.

text of a folder, a CSV or a model ──► clean    ──► NFC, without spaces, quotes, brackets and invisible characters
a class of a class list            ──► accepted ──► name, aliases, halves of a Hangul `A_B`
a class found as a label           ──► accepted ──► name

Always holds: an answer is right for at most one class of a data set.
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
from kfood_dist.data.task.base import Columns, Message, build_messages
from kfood_dist.errors import SourceError

MAX_SYLLABLES = 12

_QUOTES = "\"'`´“”‘’‚„‹›«»"
_BRACKETS = "()[]{}<>（）［］｛｝＜＞「」『』【】〔〕〈〉《》"
_REMOVED = frozenset(_QUOTES + _BRACKETS)


@lru_cache(maxsize=2**14)  # the same label comes with each of its pictures
def clean(text: str) -> str:
    """Return `text` in NFC without white space, quotes, brackets and invisible characters (categories Cf and Cc).

    The length is not limited.
    """
    kept = "".join(
        c
        for c in unicodedata.normalize("NFC", text)
        if not (c.isspace() or c in _REMOVED or unicodedata.category(c) in ("Cf", "Cc"))
    )
    return unicodedata.normalize("NFC", kept)  # again: a character between two parts of a syllable may be gone


def normalise(text: str) -> str:
    """Return an answer as it is compared with the names of a class list: `clean(text)`, cut after 12 syllables.

    A syllable is a Hangul character. Other characters are not counted.
    """
    cleaned = clean(text)
    syllables = (i for i, c in enumerate(cleaned) if _is_syllable(c))
    return cleaned[: next(islice(syllables, MAX_SYLLABLES, None), None)]


def num_syllables(text: str) -> int:
    """Return the number of Hangul syllables in `text`. Latin letters and digits are not counted."""
    return sum(map(_is_syllable, unicodedata.normalize("NFC", text)))


def _is_syllable(character: str) -> bool:
    return "가" <= character <= "힣"


@dataclass(frozen=True)
class DishClass:
    """One class of a packed data set: its clean name, its category and its other names.

    `listed` is true for a class of a class list, and false for a label that was found. Two rules of Korean dish names
    apply to listed classes only: at most 12 syllables, and each half of an `A_B` name is right.
    """

    name: str
    category: str
    aliases: tuple[str, ...] = ()
    listed: bool = True

    def accepted(self) -> frozenset[str]:
        """Return every clean answer that is right: name, aliases, and each half of a listed, all-Hangul `A_B` name."""
        name = clean(self.name)
        is_hangul = all(_is_syllable(c) or c == "_" for c in name)
        halves = name.split("_") if self.listed and is_hangul else []
        return frozenset(filter(None, [name, *halves, *map(clean, self.aliases)]))


def is_match(answer: str, dish: DishClass) -> bool:
    """Return whether the clean answer is exactly one that the class accepts. Edit distance is never used.

    For a listed class the answer is cut to 12 syllables.
    """
    return (normalise(answer) if dish.listed else clean(answer)) in dish.accepted()


class DishTask:
    """The task that asks the same question of every sample: the dish's name. `classes` say which answers are right."""

    columns: ClassVar[tuple[str, ...]] = ("label",)
    example: ClassVar[Columns] = {"label": "비빔밥"}

    def __init__(self, system: str, prompt: str, classes: Iterable[DishClass] = ()):
        self._system = system
        self._prompt = prompt
        self._classes = {dish.name: dish for dish in classes}

    def messages(self, columns: Columns, num_pictures: int) -> tuple[Message, ...]:
        return build_messages(self._system, self._prompt, num_pictures)

    def answer(self, columns: Columns) -> str:
        return columns["label"]

    def label(self, columns: Columns) -> str:
        return columns["label"]

    def clean(self, answer: str) -> str:
        return clean(answer)

    def score(self, answer: str, columns: Columns) -> float:
        return float(is_match(answer, self._classes[columns["label"]]))


def find_ambiguous_answer(classes: Iterable[DishClass]) -> tuple[str, str, str] | None:
    """Return an answer that is right for two of the classes, and their names. Returns None if there is none."""
    owner: dict[str, str] = {}
    for dish in classes:
        for name in sorted(dish.accepted()):
            if name in owner:
                return name, owner[name], dish.name
            owner[name] = dish.name
    return None


def load_classes(path: Path) -> list[DishClass]:
    """Read a tab-separated class list with the columns `category`, `name` and optionally `aliases` (`a|b`).

    Raises SourceError if the file is missing, has an unknown encoding or lacks a column, if a name is empty or has more
    than 12 syllables, or if an answer would be right for two classes.
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
        raise SourceError(f"class list {path} is not a table ({error})", "save it as UTF-8, tab-separated") from None
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
                    "give it a shorter name, or pack without --classes: then labels have no limit",
                )
    if found := find_ambiguous_answer(classes):
        name, first, second = found
        raise SourceError(
            f"class list {path}: '{name}' stands for both {first} and {second}",
            "use every name, every alias and every half of a Hangul A_B name for one class only",
        )
