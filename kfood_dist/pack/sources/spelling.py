"""Finds the file that a path means, even if another system spelled the path differently.

    path of a list ──► exactly as written, if such a file exists
                   ──► part by part, in another Unicode form (NFC, NFD), another case, or CP949 on the disk

Each folder is listed at most once, and only if a path does not exist exactly as written.
"""

import os
import unicodedata
from collections import defaultdict
from pathlib import Path

from kfood_dist.pack.sources.names import file_name


class SeveralFit(Exception):
    """The error of a path that may mean any of several files. Its text names them."""


class Files:
    """The files under one folder, found by the paths in lists: with `/`, relative to `root` or absolute."""

    def __init__(self, root: Path):
        self._root = root
        self._listings: dict[Path, dict[str, list[str]]] = {}
        self._folders: dict[tuple[Path, tuple[str, ...]], list[tuple[Path, str]]] = {}

    def find(self, text: str) -> tuple[Path, str] | None:
        """Return the file that `text` means, and its path as the disk spells it, or None if there is none.

        A file with exactly this name comes first, then one in another Unicode form, then one in another case. Raises
        SeveralFit if several files fit equally well.
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
        """Return the folders that these parts may mean, each with its path as the disk spells it."""
        if not parts:
            return [(top, "/" if top == Path("/") else "")]
        if (top, parts) not in self._folders:
            above = self._fitting_folders(top, parts[:-1])
            self._folders[top, parts] = [
                fitting for folder in above for fitting in self._fitting(*folder, parts[-1]) if fitting[0].is_dir()
            ]
        return self._folders[top, parts]

    def _fitting(self, folder: Path, spelled: str, part: str) -> list[tuple[Path, str]]:
        """Return the entries of a folder that `part` may mean, each with its path as the disk spells it."""
        names = [".."] if part == ".." else self._listing(folder).get(_folded(part), [])
        return [(folder / name, f"{spelled}{'/' * bool(spelled.strip('/'))}{file_name(name)}") for name in names]

    def _listing(self, folder: Path) -> dict[str, list[str]]:
        if folder not in self._listings:
            by_folded = self._listings[folder] = defaultdict(list)
            try:
                names = os.listdir(folder)
            except OSError:  # in a folder that cannot be listed, only exact paths are found
                names = []
            for name in names:
                by_folded[_folded(file_name(name))].append(name)
        return self._listings[folder]


def _plain(text: str) -> str:
    """Return a path without empty parts and dots, as `Files` spells the paths that it finds."""
    return "/" * text.startswith("/") + "/".join(part for part in text.split("/") if part not in ("", "."))


def _composed(text: str) -> str:
    return unicodedata.normalize("NFC", text)


def _folded(part: str) -> str:
    return _composed(_composed(part).casefold())
