"""Reads what folders say besides dish and category: the publisher's split, and how the data set was delivered.

    1.Training/01.원천데이터/TS_구이.zip/갈비구이/a.jpg ──► split train, folders 구이, 갈비구이
    test/찌개/된장찌개/a.jpg                            ──► split test,  folders 찌개, 된장찌개
    갈비구이/val/a.jpg                                  ──► split val,   folders 갈비구이
    02.라벨링데이터/TL_구이.zip                         ──► labels, no pictures

A dish may have the name of a split. So the user is asked about a folder with such a name if it holds pictures directly
and is beside folders that are not splits.
"""

import re
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache

from kfood_dist.errors import SourceError
from kfood_dist.pack.sources.record import suffix

Folders = tuple[str, ...]

_WORDS = {
    **dict.fromkeys(("train", "training", "trn", "학습", "훈련"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "dev", "development", "검증"), "val"),
    **dict.fromkeys(("test", "testing", "tst", "시험", "테스트", "평가"), "test"),
    **dict.fromkeys(("eval", "evaluation"), "eval"),
}
# `1.Training`, `train2017`, `[Test]`; `val_images`, `training set`, `학습용데이터`.
_MARGIN = re.compile(r"^[\W\d_]+|[\W\d_]+$")
_NUMBER = re.compile(r"^[\d\s._-]+|[\s._-]*\d+$")
_NOUN = re.compile(r"[\W\d_]*(dataset|data|set|split|images?|imgs?|photos?|데이터셋|데이터|세트|셋|이미지|사진|용)$")
_NOUN_BEFORE = re.compile(r"^(dataset|data|set|split|images?|imgs?)[\W\d_]+")

# AI-Hub: [T]raining or [V]alidation, [S]ource or [L]abels. Older sets are named like `[원천]음식001_Tr.zip`.
_DELIVERED = re.compile(r"(?P<split>[TV])(?P<part>S(?![^\W\d_])|L(?=_))[\W_]*(?P<rest>.*)")
_BRACKETED = re.compile(
    r"\[(?P<part>원천|라벨)(?:링)?(?:데이터)?\]\s*(?P<rest>.*?)(?:_(?P<split>tr|val?|te|ts))?", re.IGNORECASE
)
_LETTERS = {"t": "train", "tr": "train", "v": "val", "va": "val", "val": "val", "te": "test", "ts": "test"}
_PAIRED = re.compile(
    r"(?i)(?P<before>.+)[\s._-]+(?P<last>{words})[\d\s._-]*|(?P<first>{words})[\s._-]+(?P<after>.+)".format(
        words="|".join(_WORDS)
    )
)
_WRAPPINGS = frozenset({"원천데이터", "원천", "데이터"})
_LABELS = frozenset({"라벨링데이터", "라벨데이터", "라벨링", "라벨"})


@dataclass(frozen=True)
class Place:
    """What a folder says of its pictures. `split` is train, val, test or "". `folders` end with the dish, if any."""

    split: str
    folders: Folders


@dataclass(frozen=True)
class _Name:
    """What a folder's name says by itself. `rest` is the part of the name that counts as a folder, or ""."""

    split: str
    rest: str
    is_labels: bool = False


@lru_cache(maxsize=2**16)
def _read(name: str) -> _Name:
    if found := _DELIVERED.fullmatch(name) or _BRACKETED.fullmatch(name):
        split = _LETTERS[found["split"].lower()] if found["split"] else ""
        return _Name(split, _NUMBER.sub("", found["rest"]), found["part"] in ("L", "라벨"))
    bare = _MARGIN.sub("", name)
    if bare in _WRAPPINGS or bare in _LABELS:
        return _Name("", "", bare in _LABELS)
    split = split_of(name)
    return _Name(split, "" if split else name)


def split_of(name: str) -> str:
    """Return the split that a name means: train, val, test, or eval, which may be val or test; "" for other names."""
    word = _NOUN_BEFORE.sub("", _MARGIN.sub("", name.casefold()))
    while word not in _WORDS and (shorter := _NOUN.sub("", word)) != word:
        word = shorter
    return _WORDS.get(word, "")


def resolved(splits: Iterable[str]) -> dict[str, str]:
    """Return the final name of each split that a source names: `eval` is test if there is also a val, else val."""
    names = set(splits)
    return {name: name for name in names} | {"eval": "test" if "val" in names else "val"}


def holds_labels(source: str) -> bool:
    """Return whether a path leads through a folder or zip of labels, which may hold masks but no pictures."""
    *folders, last = source.split("/")
    zips = [last] if suffix(last) == ".zip" else []
    return any(_read(without_zip(name)).is_labels for name in folders + zips)


def without_zip(name: str) -> str:
    """Return the name of the folder that a zip would be extracted to. Other names stay as they are."""
    return name[: -len(".zip")] if suffix(name) == ".zip" else name


def read_places(places: Iterable[Folders], is_dish: Callable[[str], bool], ask: bool = True) -> dict[Folders, Place]:
    """Return what each folder with pictures says, with the folder as the key.

    `is_dish` says whether a name is certainly a dish. If `ask`, raises SourceError for a folder that may be a split or
    a dish.
    """
    places = set(places)
    names = _read_names(places, is_dish)
    if ask:
        _require_clear_splits(names)
    read = {place: _read_place(place, names) for place in places}
    means = resolved(one.split for one, _ in read.values())
    # A folder around all splits means nothing if each split still has a dish below it.
    heads = {one.folders[:at] for one, at in read.values()}
    is_wrapped = len(heads) == 1 and all(one.split and len(one.folders) > at for one, at in read.values())
    wrapping = len(heads.pop()) if is_wrapped else 0
    return {place: Place(means[one.split], one.folders[wrapping:]) for place, (one, _) in read.items()}


def _read_names(places: Iterable[Folders], is_dish: Callable[[str], bool]) -> dict[Folders, _Name]:
    """Return what the name of each folder on the paths to the places says."""
    beside: dict[Folders, set[str]] = defaultdict(set)
    for place in places:
        for i, name in enumerate(place):
            beside[place[:i]].add(name)
    read = dict[Folders, _Name]()
    for above, names in beside.items():
        pairs = _read_pairs(names, {name for name in names if (*above, name) in beside})
        for name in names:
            alone = _Name("", name) if is_dish(name) else _read(name)
            read[*above, name] = alone if alone.split or is_dish(name) else pairs.get(name, alone)
    return read


def _read_pairs(names: Iterable[str], holding_folders: Collection[str]) -> dict[str, _Name]:
    """Return what neighbouring names say that differ only in the split, such as `kfood_train` and `kfood_test`."""
    families: dict[str, dict[str, str]] = defaultdict(dict)
    for name in names:
        if found := _PAIRED.fullmatch(name):
            families[found["before"] or found["after"]][name] = _WORDS[(found["first"] or found["last"]).lower()]
    families = {rest: splits for rest, splits in families.items() if len(set(splits.values())) > 1}
    return {
        # A name that all of them share means nothing, unless it is the only name for the dish.
        name: _Name(split, "" if len(families) == 1 and name in holding_folders else rest)
        for rest, splits in families.items()
        for name, split in splits.items()
    }


def _read_place(place: Folders, names: Mapping[Folders, _Name]) -> tuple[Place, int]:
    """Return what one place says, and how many of its folders are above its split."""
    split, at, folders = "", 0, list[str]()
    for i in range(len(place)):
        found = names[place[: i + 1]]
        if found.split and not split:
            split, at = found.split, len(folders)
        if found.rest:
            folders.append(found.rest)
    return Place(split, tuple(folders)), at


def _require_clear_splits(names: Mapping[Folders, _Name]) -> None:
    """Raise SourceError for a folder with the name of a split and no folders in it, beside one that is not a split."""
    dishes = {place[:-1]: place[-1] for place, name in sorted(names.items()) if name.rest and not name.split}
    above = {place[:-1] for place in names}
    for place, name in sorted(names.items()):
        if name.split and not name.rest and place not in above and place[:-1] in dishes:
            raise SourceError(
                f"folder {'/'.join(place)} holds pictures and has the name of a split, but {dishes[place[:-1]]} beside "
                "it is not a split: is this folder a dish?",
                "if so, rename it, or name all dishes with --classes; if it is a split, sort its pictures into folders "
                "of dishes",
            )
