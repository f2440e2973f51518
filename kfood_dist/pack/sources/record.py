"""One input of a source: the values that the modules of this package pass to each other. Small and picklable."""

import json
import os
from dataclasses import dataclass
from pathlib import Path

# The suffixes of Pillow's formats for photographs, and of HEIC.
SUFFIXES = frozenset(
    {
        *(".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".jp2", ".j2k", ".j2c", ".jpc", ".jpf", ".jpx"),
        *(".png", ".apng", ".gif", ".bmp", ".dib", ".webp", ".avif", ".avifs", ".tif", ".tiff"),
        *(".heic", ".heics", ".heif", ".heifs", ".hif", ".ppm", ".pgm", ".pbm", ".pnm"),
    }
)

# No photograph is nearly as large. The limit keeps a mislabelled film, an archive or a zip bomb out of memory.
MAX_FILE_BYTES = 256 * 2**20


@dataclass(frozen=True, slots=True)
class Archive:
    """A zip: a complete file, or the `num_bytes` of it from `start` on (a zip stored in a zip).

    `file_bytes` and `mtime_ns` are those of the file when it was listed. They show whether another file has replaced
    it. `packed` is set for a zip that is compressed in another zip. The path, size and time are then those of the outer
    zip's file.
    """

    path: Path
    file_bytes: int
    mtime_ns: int
    start: int
    num_bytes: int
    packed: "Member | None" = None


@dataclass(frozen=True, slots=True)
class Member:
    """A member of a zip, as the zip's directory describes it. `offset` is where its local header begins in the zip."""

    archive: Archive
    offset: int
    packed_bytes: int
    num_bytes: int
    crc32: int
    method: int


@dataclass(frozen=True, slots=True)
class Record:
    """One picture of a source: the file to open, its name and what it shows.

    `source` is its path relative to the source's root, in NFC. Zips count as folders in it. `num_bytes` is its unpacked
    size (0 if it is missing). `path` is the file to open: the picture's file, or the zip that has it as `member`. `box`
    is the place of the dish in the picture: x, y, width, height in pixels. It is None unless a list beside the picture
    has it. `problem` is None or the reason why the picture cannot be used, and `detail` explains it in words. `split`
    is the publisher's: train, val, test, another name in a list's column, or "" if the source names none. `changed_ns`
    is the time when the content or the permissions of a plain file last changed, in ns since 1970, else 0.

    A record is also one sample. `columns` holds what a list says of it besides a label, as pairs of name and text.
    `more` holds the records of its further pictures. Only their files count, not their labels.
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
        """The text that identifies the sample within its source: several questions may be about one picture."""
        if not self.columns and not self.more:
            return self.source
        return json.dumps([[picture.source for picture in self.pictures], self.columns], ensure_ascii=False)

    @property
    def crc32(self) -> int | None:
        """The CRC-32 of the picture's bytes if it is known without reading them, which is the case in a zip."""
        return None if self.member is None else self.member.crc32


def suffix(name: str) -> str:
    """Return the suffix of a file's name in lower case, with its dot."""
    return os.path.splitext(name)[1].lower()
