"""Where a packed data set lies: a folder, or a place that fsspec reaches (http, s3 and others).

    open_storage (`open.py`)                                    ──► LocalStorage | RemoteStorage
    storage.read_ranges([(name, offset, size), …])              ──► bytes, or the ShardError of that range

What lies in memory already is read one range after another, as fast as can be. As soon as a read has to wait, near
ranges are merged and several of the merged reads are in flight; behind a URL always.

Either kind opens its files or connections when first used, anew in each process: an object may be pickled or
forked. One fault never hides the other ranges, and always names the file.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from kfood_dist.errors import ShardError

# (file name, offset in bytes, number of bytes)
Range = tuple[str, int, int]

# Ranges that lie nearer than this are read in one go: two short reads cost more than the bytes between.
_GAP_BYTES = 32 << 10
# One read is no longer than this, so that a long run of ranges is several reads in flight.
_SPAN_BYTES = 4 << 20


class OutOfReachError(ShardError):
    """A file cannot be read, which says nothing of what is in it: another try may succeed."""


class MissingFileError(OutOfReachError):
    """A file of the data set, or the whole of it, is not where it was looked for."""


class Storage(ABC):
    """The files of one packed data set. `where` names it in messages: a path or a URL."""

    where: str
    is_local: bool

    @abstractmethod
    def place(self, name: str) -> str:
        """The path or URL of one file."""

    @abstractmethod
    def read(self, name: str) -> bytes:
        """A whole file. Raises MissingFileError, or ShardError where it cannot be read."""

    @abstractmethod
    def sizes(self, names: Iterable[str]) -> dict[str, int | ShardError]:
        """The size of each file in bytes, or what keeps it from being known."""

    def size(self, name: str) -> int:
        """The size of one file in bytes; raises as `read` does."""
        size = self.sizes([name])[name]
        if isinstance(size, ShardError):
            raise size
        return size

    @abstractmethod
    def read_ranges(self, ranges: Sequence[Range]) -> list[bytes | ShardError]:
        """The bytes of each range in order, several in flight; fewer than asked for where a file ends inside."""

    def will_need(self, ranges: Iterable[Range]) -> None:  # noqa: B027 - only a local disk can be told
        """Say which ranges will soon be read; returns at once."""

    @abstractmethod
    def fault(self, name: str, what: str) -> ShardError:
        """The error of one file that is not as its manifest says."""

    @abstractmethod
    def close(self) -> None:
        """Close what this process has open; a later read opens it again."""


def spans(ranges: Sequence[Range], gap: int, longest: int | None = None) -> list[tuple[Range, list[int]]]:
    """The reads that serve all ranges: what to read, and the positions of the ranges that lie in it.

    Ranges of one file become one read if at most `gap` bytes lie between them and it stays within `longest` bytes.
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
    """The bytes of each range, taken from what `read` gives for the merged ones."""
    results: list[Any] = [None] * len(ranges)
    merged = spans(ranges, _GAP_BYTES, _SPAN_BYTES)
    for (span, members), data in zip(merged, read([span for span, _ in merged]), strict=True):
        for n in members:
            _, offset, size = ranges[n]
            at = offset - span[1]
            results[n] = data if isinstance(data, ShardError) or len(members) == 1 else data[at : at + size]
    return results
