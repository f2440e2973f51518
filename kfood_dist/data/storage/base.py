"""The storage of a packed data set: a folder, or a place that fsspec reaches (http, s3 and others).

    open_storage (`open.py`)                                    ──► LocalStorage | RemoteStorage
    storage.read_ranges([(name, offset, size), …])              ──► bytes, or the ShardError of that range

Ranges of a folder that are in memory already are read one after another, because that is fastest. As soon as a read
has to wait, ranges that are close together are merged, and several merged reads are in flight. Behind a URL the reads
are always merged and in flight together.

Each process opens its files or connections at their first use, so a storage may be pickled or forked. An error in one
range does not affect the other ranges, and it always names the file.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from kfood_dist.errors import ShardError

# (file name, offset in bytes, number of bytes)
Range = tuple[str, int, int]

# Ranges with a gap of at most this size are read at once: two short reads cost more than the bytes between them.
_GAP_BYTES = 32 << 10
# Ranges are merged up to this size, so that a long run of ranges becomes several reads in flight.
_SPAN_BYTES = 4 << 20


class UnreachableError(ShardError):
    """A file cannot be read now. That does not mean that its contents are damaged: another try may succeed."""


class MissingFileError(UnreachableError):
    """A file of the data set, or the complete data set, does not exist at its path or URL."""


class Storage(ABC):
    """The files of one packed data set. `where` names it in messages: a path or a URL."""

    where: str
    is_local: bool

    @abstractmethod
    def place(self, name: str) -> str:
        """Return the path or URL of one file."""

    @abstractmethod
    def read(self, name: str) -> bytes:
        """Return all bytes of a file. Raises MissingFileError if it does not exist, ShardError if it cannot be read."""

    @abstractmethod
    def sizes(self, names: Iterable[str]) -> dict[str, int | ShardError]:
        """Return the size of each file in bytes, or the ShardError that says why the size is unknown."""

    def size(self, name: str) -> int:
        """Return the size of one file in bytes. Raises ShardError if the size cannot be determined."""
        size = self.sizes([name])[name]
        if isinstance(size, ShardError):
            raise size
        return size

    @abstractmethod
    def read_ranges(self, ranges: Sequence[Range]) -> list[bytes | ShardError]:
        """Return the bytes of each range in order, or the ShardError of that range. Several reads are in flight.

        If a file ends inside a range, the result is the bytes up to the end, or a ShardError.
        """

    def will_need(self, ranges: Iterable[Range]) -> None:  # noqa: B027 - only a local disk can use this
        """Announce which ranges will soon be read. Returns at once."""

    @abstractmethod
    def fault(self, name: str, what: str) -> ShardError:
        """Return the error of one file that is not as its manifest says. `what` says what is wrong with it."""

    @abstractmethod
    def close(self) -> None:
        """Close the files that this process has open. A later read opens them again."""


def merge_ranges(ranges: Sequence[Range], gap: int, longest: int | None = None) -> list[tuple[Range, list[int]]]:
    """Return the reads that cover all ranges: each with the positions in `ranges` of the ranges inside it.

    Ranges of one file become one read if at most `gap` bytes are between them and the read has at most `longest` bytes.
    """
    found: list[tuple[Range, list[int]]] = []
    for n in sorted(range(len(ranges)), key=ranges.__getitem__):
        name, offset, size = ranges[n]
        if found:
            (last, start, length), members = found[-1]
            end = max(start + length, offset + size)
            near = name == last and offset <= start + length + gap
            if near and (longest is None or end - start <= longest):
                found[-1] = (name, start, end - start), members
                members.append(n)
                continue
        found.append(((name, offset, size), [n]))
    return found


def read_merged(
    ranges: Sequence[Range], read: Callable[[list[Range]], list[bytes | ShardError]]
) -> list[bytes | ShardError]:
    """Return the bytes of each range, taken from what `read` returns for the merged ranges."""
    results: list[Any] = [None] * len(ranges)
    merged = merge_ranges(ranges, _GAP_BYTES, _SPAN_BYTES)
    for (span, members), data in zip(merged, read([span for span, _ in merged]), strict=True):
        for n in members:
            _, offset, size = ranges[n]
            at = offset - span[1]
            results[n] = data if isinstance(data, ShardError) or len(members) == 1 else data[at : at + size]
    return results
