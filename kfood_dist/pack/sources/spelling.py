"""Finds the file that a path means, however the path was spelled elsewhere.

    path of a list ──► as it stands, if such a file is there
                   ──► part by part, in another Unicode form (NFC, NFD), another case, or CP949 on the disk

Each folder is listed once at most, and only if a path does not stand as it is.
"""

import os
import unicodedata
from collections import defaultdict
from pathlib import Path

from kfood_dist.pack.sources.names import file_name


class SeveralFit(Exception):
    """A path that may mean any of several files; its text names them."""


class Files:
    """The files under one folder, by paths as lists give them: with `/`, relative to `root` or from the top."""

    def __init__(self, root: Path):
        self._root = root
        self._listings: dict[Path, dict[str, list[str]]] = {}
        self._folders: dict[tuple[Path, tuple[str, ...]], list[tuple[Path, str]]] = {}

    def find(self, text: str) -> tuple[Path, str] | None:
        """The file that `text` means, and its path as it is spelled there; None where there is none.

        A file of just these letters comes first, then one in another Unicode form. Raises SeveralFit.
        """
        if os.path.isfile(self._root / text):
            return self._root / text, text
        top = Path("/") if text.startswith("/") else self._root
        *folders, name = [part for part in text.split("/") if part not in ("", ".")] or [""]
        found = [
            (path, spelled)
            for folder in self._fitting_folders(top, tuple(folders))
            for path, spelled in self._fitting(*folder, name)
            if os.path.isfile(path)
        ]
        same_case = [(path, spelled) for path, spelled in found if _composed(spelled) == _composed(_plain(text))]
        fitting = same_case or found
        if len(fitting) > 1:
            raise SeveralFit(", ".join(sorted(spelled for _, spelled in fitting)))
        return fitting[0] if fitting else None

    def _fitting_folders(self, top: Path, parts: tuple[str, ...]) -> list[tuple[Path, str]]:
        """The folders that these parts may mean, each with its path as it is spelled there."""
        if not parts:
            return [(top, "/" if top == Path("/") else "")]
        if (top, parts) not in self._folders:
            above = self._fitting_folders(top, parts[:-1])
            self._folders[top, parts] = [
                fitting for folder in above for fitting in self._fitting(*folder, parts[-1]) if fitting[0].is_dir()
            ]
        return self._folders[top, parts]

    def _fitting(self, folder: Path, spelled: str, part: str) -> list[tuple[Path, str]]:
        """What lies in a folder and may be meant by `part`."""
        names = [".."] if part == ".." else self._listing(folder).get(_folded(part), [])
        return [(folder / name, f"{spelled}{'/' * bool(spelled.strip('/'))}{file_name(name)}") for name in names]

    def _listing(self, folder: Path) -> dict[str, list[str]]:
        if folder not in self._listings:
            by_folded = self._listings[folder] = defaultdict(list)
            try:
                names = os.listdir(folder)
            except OSError:  # a folder that may not be listed has only what stands as it is
                names = []
            for name in names:
                by_folded[_folded(file_name(name))].append(name)
        return self._listings[folder]


def _plain(text: str) -> str:
    """A path without empty parts and dots, as `Files` spells those it finds."""
    return "/" * text.startswith("/") + "/".join(part for part in text.split("/") if part not in ("", "."))


def _composed(text: str) -> str:
    return unicodedata.normalize("NFC", text)


def _folded(part: str) -> str:
    return _composed(_composed(part).casefold())
