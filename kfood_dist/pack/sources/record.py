"""One input of a source: the values that the modules of this package hand to each other. Small and picklable."""

import json
import os
from dataclasses import dataclass
from pathlib import Path

# The formats of Pillow that photographs are kept in, and HEIC.
SUFFIXES = frozenset(
    {
        *(".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".jp2", ".j2k", ".j2c", ".jpc", ".jpf", ".jpx"),
        *(".png", ".apng", ".gif", ".bmp", ".dib", ".webp", ".avif", ".avifs", ".tif", ".tiff"),
        *(".heic", ".heics", ".heif", ".heifs", ".hif", ".ppm", ".pgm", ".pbm", ".pnm"),
    }
)

# No photograph comes near it; it keeps a mislabelled film, an archive or a zip bomb out of memory.
MAX_FILE_BYTES = 256 * 2**20


@dataclass(frozen=True, slots=True)
class Archive:
    """A zip: a whole file, or the `num_bytes` of it from `start` on (a zip stored in a zip).

    `file_bytes` and `mtime_ns` are the file's when it was listed: another file under its name is noticed by
    them. A zip that is itself compressed in another has `packed`, and the rest speaks of that other's file.
    """

    path: Path
    file_bytes: int
    mtime_ns: int
    start: int
    num_bytes: int
    packed: "Member | None" = None


@dataclass(frozen=True, slots=True)
class Member:
    """A member of a zip, as the zip's directory says; `offset` is where its local header begins in the zip."""

    archive: Archive
    offset: int
    packed_bytes: int
    num_bytes: int
    crc32: int
    method: int


@dataclass(frozen=True, slots=True)
class Record:
    """One picture of a source: where it is opened, what it is called, what it shows.

    `source` is its path relative to the source's root in NFC, through zips as through folders; `num_bytes` its
    size, unpacked (0 when missing). `path` is the file to open: the picture's, or that of the zip whose `member`
    it is. `box` is the dish's place in the picture, x, y, width, height in pixels, where a list beside the
    picture gives one. `problem` is None or the reason why it cannot be used, and `detail` says so in words.
    `split` is the publisher's: train, val, test, another name in a list's column, or "" if the source says none.
    `changed_ns` is when a plain file, or what may be done with it, last changed, in ns since 1970; else 0.

    It is also one sample: `columns` are what a list says of it besides a label, by name, and `more` the records of its
    further pictures, of which only where they lie counts.
    """

    path: Path
    source: str
    label: str = ""
    category: str = ""
    num_bytes: int = 0
    problem: str | None = None
    detail: str = ""
    member: Member | None = None
    box: tuple[int, int, int, int] | None = None
    changed_ns: int = 0
    split: str = ""
    columns: tuple[tuple[str, str], ...] = ()
    more: tuple["Record", ...] = ()

    @property
    def pictures(self) -> tuple["Record", ...]:
        """The records of the sample's pictures, in order."""
        return self, *self.more

    @property
    def identity(self) -> str:
        """What tells the sample from the others of its source: one picture may be asked about several times."""
        if not self.columns and not self.more:
            return self.source
        return json.dumps([[picture.source for picture in self.pictures], self.columns], ensure_ascii=False)

    @property
    def crc32(self) -> int | None:
        """The CRC-32 of a picture's bytes where they need not be read to know it: in a zip."""
        return None if self.member is None else self.member.crc32


def suffix(name: str) -> str:
    """The suffix of a file's name in small letters, with its dot."""
    return os.path.splitext(name)[1].lower()
