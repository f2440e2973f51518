"""Counts the files of a source that are not pictures. They are not packed.

    a file or a zip's member ──► made by a machine? ──► by its name, such as @eaDir
                             └─► else by its suffix; a container of pictures also by its kind, with its first name

The summary names a container together with the command that gets pictures out of it. No file is opened here.
"""

import os
import re
import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kfood_dist.pack.sources.record import suffix

# Names of files and folders that NAS systems, Windows, macOS, Linux and tools leave beside a user's files.
# Any other name that begins with a dot counts as `(hidden)`.
_MACHINE_MADE = {
    name.casefold(): name
    for name in (
        *("@eaDir", "#recycle", "#snapshot", "@tmp", "@sharebin", "@SynoResource", "@Recycle", "@Recently-Snapshot"),
        *("@Transcode", "@__thumb", ".@__thumb", ".AppleDouble", ".DS_Store", ".Trashes", ".Spotlight-V100"),
        *(".fseventsd", ".TemporaryItems", "__MACOSX", "Network Trash Folder", "Temporary Items", "Icon\r"),
        *("TheVolumeSettingsFolder", "Desktop DB", "Desktop DF", "$RECYCLE.BIN", "RECYCLER", "RECYCLED"),
        *("System Volume Information", "Thumbs.db", "ehthumbs.db", "ehthumbs_vista.db", "desktop.ini", "Picasa.ini"),
        *("lost+found", "LOST.DIR", "~snapshot", ".snapshot", ".snapshots", ".zfs", ".thumbnails", ".cache"),
        *("$Extend", "Recycle Bin", "휴지통", "OneDriveTemp", "@SynoEAStream", "_gsdata_", "thumbs", "thumbnails"),
        *(".ipynb_checkpoints", "__pycache__", ".git"),
    )
}
# Folders of files that chkdsk found; the bin of each user on Linux; macOS's companion files.
_NUMBERED = {
    re.compile(r"found\.\d{3}"): "FOUND.*",
    re.compile(r"\.trash-\d+"): ".Trash-*",
    re.compile(r"\._.*"): "._*",
}
# Each of these folders holds older states of the complete source. It counts as one file and is not entered.
_SNAPSHOTS = {"#snapshot", "@Recently-Snapshot", "~snapshot", ".snapshot", ".snapshots", ".zfs"}

_NUMBERED_SUFFIX = re.compile(r"(\.(?:part|z|r|))\d+")
_MAX_SUFFIX = 16  # in characters
_MAX_SUFFIXES = 100

# Kind of container → its names in lower case. The first kind that fits counts.
_CONTAINERS = {
    "tar": re.compile(r".*\.(tar|tgz|tbz2?|txz|tzst|tar\.(gz|bz2|xz|zst|lz4|lzma|z|br))"),
    "split_zip": re.compile(r".*\.z\d\d"),
    "split_7z": re.compile(r".*\.7z\.\d+"),
    "rar": re.compile(r".*\.(rar|r\d\d)"),
    "parts": re.compile(r".*\.part[-_.]?(\d+|[a-z]{2})"),
    "numbered": re.compile(r".*(\.\d{3}|\.(zip|tar|tgz|gz|xz|bz2|zst)[-_.]?(\d+|[a-z]{2}))"),
    "archive": re.compile(r".*\.(7z|alz|egg|zipx|gz|bz2|xz|zst|lz4|lzma|lzh|lha|cab|arj|ace|iso|cbz|cbr)"),
    "table": re.compile(
        r".*\.(parquet|arrow|feather|tfrecords?(-\d+-of-\d+)?|lmdb|mdb|h5|hdf5?|npy|npz|mat|pkl|pickle|rec)"
    ),
    "other_picture": re.compile(
        r".*\.(psd|psb|tga|pcx|dds|sgi|qoi|exr|hdr|jxl|jxr|svg|raw|dng|cr2|cr3|crw|nef|nrw|arw|raf|orf|rw2|pef|srw)"
    ),
}
_PART_NUMBER = re.compile(r"(\d+|[a-z]{2})$", re.IGNORECASE)
_PART_WORD = re.compile(r"[-_.]?(part)?[-_.]?$", re.IGNORECASE)


@dataclass
class IgnoredFiles:
    """The counts of files that are not input.

    `by_suffix` counts them by suffix. `machine_made` counts machine-made files by the name that shows it. `containers`
    holds the number of files and the first name, in sorted order, of each kind of container among them.
    """

    by_suffix: Counter[str] = field(default_factory=Counter)
    machine_made: Counter[str] = field(default_factory=Counter)
    containers: dict[str, tuple[int, str]] = field(default_factory=dict)

    def add(self, source: str, kind: str | None = None) -> None:
        """Count one file by its path in the source. Without a `kind`, its name says whether it is a container."""
        self.by_suffix[_suffix_key(source)] += 1
        if (kind := kind or container_kind(source)) is not None:
            count, first = self.containers.get(kind, (0, source))
            self.containers[kind] = (count + 1, min(first, source))

    def add_made(self, path: Path, made_by: str) -> None:
        """Count a file, or the files under a folder, as machine-made. A folder that cannot be listed counts as one."""
        num_files = 1
        if path.is_dir() and not path.is_symlink() and made_by not in _SNAPSHOTS and os.access(path, os.R_OK | os.X_OK):
            num_files = sum(len(files) for _, _, files in os.walk(path))
        self.machine_made[made_by] += num_files

    def as_json(self) -> dict[str, Any]:
        """Return the counts for the manifest, in an order that does not depend on the order of the files."""
        return {
            "by_suffix": dict(_by_number(self.by_suffix)[:_MAX_SUFFIXES]),
            "machine_made": dict(_by_number(+self.machine_made)),
            "containers": {
                kind: {"count": count, "first": first} for kind, (count, first) in sorted(self.containers.items())
            },
        }


def made_by_machine(parts: Sequence[str]) -> str | None:
    """Return the name to count a path under if a part of it is machine-made or hidden, else None."""
    return next(filter(None, map(_machine_key, parts)), None)


def _machine_key(name: str) -> str | None:
    folded = name.casefold()
    if folded in _MACHINE_MADE:
        return _MACHINE_MADE[folded]
    numbered = next((key for pattern, key in _NUMBERED.items() if pattern.fullmatch(folded)), None)
    return numbered or ("(hidden)" if name.startswith(".") and name != ".." else None)


def container_kind(name: str) -> str | None:
    """Return the kind of container that a file is by its name, or is a part of; None for any other file."""
    last = name.rpartition("/")[2].lower()
    return next((kind for kind, pattern in _CONTAINERS.items() if pattern.fullmatch(last)), None)


def how_to_read(kind: str, path: str) -> str:
    """Return how to make pictures or a zip from a container at `path`: a sentence for a person, with the command."""
    if kind in ("parts", "numbered"):
        start = _PART_NUMBER.sub("", path, count=1)
        whole = _PART_WORD.sub("", start, count=1)
        joined = whole if suffix(whole) else f"{whole}.zip"
        files, joined = f"{shlex.quote(start)}*", shlex.quote(joined)
        return f"join the parts in the order of their numbers: ls -v {files} | xargs -d '\\n' cat > {joined}"
    stem, name = path[: -len(suffix(path))], shlex.quote(path)
    whole, joined = shlex.quote(f"{stem}.zip"), shlex.quote(f"{stem}-whole.zip")
    return {
        "tar": f"unpack it: tar -xf {name}",
        "split_zip": f"join the parts: zip -s 0 {whole} --out {joined}",
        "split_7z": f"unpack it from its first part: 7z x {shlex.quote(stem + '.001')}",
        "rar": f"unpack it: unrar x {name}",
        "extracted": "the folder it was extracted to is beside it and is read instead",
        "archive": f"unpack it: 7z x {name} (an .egg or .alz: with ALZip or Bandizip)",
        "other_picture": f"make a JPEG or PNG of it: magick {name} {shlex.quote(stem + '.png')}",
        "table": "write its pictures out as files, each in a folder named after its dish, or listed in a CSV of "
        "image_path,label",
    }[kind]


def _suffix_key(source: str) -> str:
    """Return the suffix to count a file under. Parts of archives share one: `.partN`, `.zN`, `.rN` or `.N`."""
    found = suffix(source.rpartition("/")[2])
    if numbered := _NUMBERED_SUFFIX.fullmatch(found):
        return f"{numbered[1]}N"
    return found if 0 < len(found) <= _MAX_SUFFIX else "(none)"


def _by_number(counts: Mapping[str, int]) -> list[tuple[str, int]]:
    return sorted(counts.items(), key=lambda item: (-item[1], item[0]))


def list_counts(counts: Mapping[str, int], most: int = 8) -> str:
    """Return counts as text, such as `.json 1,200, .txt 3`: the `most` frequent ones, and how many more there are."""
    first = [f"{name} {count:,}" for name, count in _by_number(counts)[:most]]
    more = [f"and {len(counts) - most} more"] if len(counts) > most else []
    return ", ".join([*first, *more])
