"""Dish names: one normalisation for training, evaluation and prediction, and what counts as a match.

text of a folder, a CSV or a model ──► normalise ──► a name of at most 12 syllables
a class and its aliases            ──► accepted  ──► the set of names that are right for it
"""

import csv
import io
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from kfood_dist.data.encoding import read_text
from kfood_dist.errors import SourceError

MAX_SYLLABLES = 12

_QUOTES = "\"'`´“”‘’‚„‹›«»"
_BRACKETS = "()[]{}<>（）［］｛｝＜＞「」『』【】〔〕〈〉《》"
_REMOVED = frozenset(_QUOTES + _BRACKETS)


def clean(text: str) -> str:
    """NFC, without white space, quotes, brackets and invisible (category Cf) characters; any length."""
    return "".join(
        c
        for c in unicodedata.normalize("NFC", text)
        if not (c.isspace() or c in _REMOVED or unicodedata.category(c) in ("Cf", "Cc"))
    )


def normalise(text: str) -> str:
    """The name a text stands for: `clean(text)`, cut to its first 12 syllables."""
    return clean(text)[:MAX_SYLLABLES]


@dataclass(frozen=True)
class DishClass:
    """One class of a packed data set: its normalised name, category and the other names it goes by."""

    name: str
    category: str
    aliases: tuple[str, ...] = ()

    def accepted(self) -> frozenset[str]:
        """Every normalised answer that is right: the name, its aliases, and either half of an `A_B` name."""
        halves = self.name.split("_") if "_" in self.name else []
        names = (normalise(n) for n in [self.name, *halves, *self.aliases])
        return frozenset(n for n in names if n)


def is_match(answer: str, dish: DishClass) -> bool:
    """Strict exact match after the one normalisation; never an edit distance."""
    return normalise(answer) in dish.accepted()


def load_classes(path: Path) -> list[DishClass]:
    """Read a tab-separated class list with the columns `category`, `name` and, if wanted, `aliases` (`a|b`).

    Raises SourceError when the file is missing, in an unknown encoding, lacks a column, or names a class twice.
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
            name=normalise(row["name"] or ""),
            category=(row["category"] or "").strip(),
            aliases=tuple(a for a in (normalise(x) for x in (row.get("aliases") or "").split("|")) if a),
        )
        for row in rows
    ]
    _require_unambiguous(classes, path)
    return classes


def _require_unambiguous(classes: Iterable[DishClass], path: Path) -> None:
    owner: dict[str, str] = {}
    for dish in classes:
        if not dish.name:
            raise SourceError(f"class list {path} has an empty name", "give every line a name")
        for name in dish.accepted():
            if name in owner:
                raise SourceError(
                    f"class list {path}: '{name}' stands for both {owner[name]} and {dish.name}",
                    "let every name and alias belong to one class",
                )
            owner[name] = dish.name
