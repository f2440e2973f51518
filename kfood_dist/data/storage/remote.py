"""A packed data set behind a URL, read through fsspec: http, https, s3 and every other protocol that fsspec knows.

    ranges ──► one request each, several in flight ──► complete? ──► bytes
                    ▲                                    │
                    └── again, after a pause, up to `num_tries` ◄── reset, 5xx, too few bytes, no answer in time

Each request has its own time limit, so the longest wait is num_tries × timeout_s plus the pauses between the tries.
If another try cannot help (404, 403, a server that ignores ranges), the error is returned at once. fsspec and the
service's own library find the endpoint and the credentials: `shards/README.md` says where.
"""

import asyncio
import os
import random
import re
from collections.abc import Awaitable, Callable, Iterable, Sequence
from functools import partial
from typing import Any, TypeVar

import aiohttp
import fsspec
import fsspec.asyn

from kfood_dist.data.storage.base import MissingFileError, Range, Storage, UnreachableError, read_merged
from kfood_dist.errors import ShardError

T = TypeVar("T")

# The extra of kfood_dist that installs the package for a protocol.
_EXTRAS = {"s3": "s3", "s3a": "s3"}
# HTTP statuses after which another try may succeed: 408 (timeout), 425 (too early), 429 (too many requests).
_PASSING_STATUS = (408, 425, 429)
_AGAIN = "check the network and the server, then run the same command again"

# One file system with its connections for each process and protocol, never released. A forked child also keeps those
# of its parent but does not use them. If the child released one, fsspec's finalizer would wait a second for a loop
# thread that did not survive the fork, and would close the connections that the child shares with the parent.
_FILESYSTEMS: dict[tuple[int, str], Any] = {}


class _TooMany(Exception):
    """The server sent more bytes than the range has."""


class _TooFew(Exception):
    """The body ended before the range did, or the server does not state the size of a file."""


class RemoteStorage(Storage):
    """A folder behind a URL.

    `num_tries` includes the first request. The pause before try n+1 is `pause_s` × 2**(n-1) seconds, shortened by up to
    half at random, so that many ranks do not try again at the same time. `timeout_s` limits one request, including its
    body. `num_in_flight` limits the requests of one process that are in flight at once.
    """

    is_local = False

    def __init__(
        self, url: str, num_tries: int = 5, timeout_s: float = 60.0, pause_s: float = 0.5, num_in_flight: int = 16
    ):
        _require_no_query(url)
        self.where = url.rstrip("/")
        self.num_tries = num_tries
        self.timeout_s = timeout_s
        self.pause_s = pause_s
        self.num_in_flight = num_in_flight
        self._protocol = url.partition("://")[0]
        _require_protocol(self._protocol)

    def __reduce__(self) -> tuple[Callable[..., "RemoteStorage"], tuple[Any, ...]]:
        return RemoteStorage, (self.where, self.num_tries, self.timeout_s, self.pause_s, self.num_in_flight)

    def place(self, name: str) -> str:
        return f"{self.where}/{name}"

    def read(self, name: str) -> bytes:
        [data] = self._all([partial(self._read, name, 0, None)])
        if isinstance(data, ShardError):
            raise data
        return data

    def read_ranges(self, ranges: Sequence[Range]) -> list[bytes | ShardError]:
        return read_merged(ranges, lambda merged: self._all([partial(self._read, *r) for r in merged]))

    def sizes(self, names: Iterable[str]) -> dict[str, int | ShardError]:
        names = list(names)
        return dict(zip(names, self._all([partial(self._size, n) for n in names]), strict=True))

    def fault(self, name: str, what: str) -> ShardError:
        return ShardError(
            f"{self.place(name)} {what}", "copy it there again from a folder in which `kfood verify` finds no fault"
        )

    def close(self) -> None:
        """Do nothing: idle connections close by themselves, and the next read may need them."""

    def _all(self, jobs: Sequence[Callable[[], Awaitable[T | ShardError]]]) -> list[T | ShardError]:
        """Run the jobs in fsspec's own loop, `num_in_flight` at a time. Returns the results in their order."""

        async def run() -> list[T | ShardError]:
            free = asyncio.Semaphore(self.num_in_flight)

            async def one(job: Callable[[], Awaitable[T | ShardError]]) -> T | ShardError:
                async with free:
                    return await job()

            return await asyncio.gather(*(one(job) for job in jobs))

        return fsspec.asyn.sync(self._open().loop if self._open().async_impl else fsspec.asyn.get_loop(), run)

    def _open(self) -> Any:
        """Return the file system of this process: another's loop thread and connections do not survive a fork."""
        key = os.getpid(), self._protocol
        if key not in _FILESYSTEMS:
            try:
                _FILESYSTEMS[key] = fsspec.filesystem(self._protocol, skip_instance_cache=True)
            except (TypeError, ValueError, OSError) as error:  # for example ftp, whose file system needs a host
                what = f"{self.where} cannot be opened: {self._protocol}:// needs more than an address ({error})"
                raise ShardError(what, "use a path, or http, https or s3") from None
        return _FILESYSTEMS[key]

    async def _read(self, name: str, offset: int, size: int | None) -> bytes | ShardError:
        async def request() -> bytes:
            limits = {} if size is None else {"start": offset, "end": offset + size}
            data = await self._call("cat_file", name, **limits)
            if size is not None and len(data) > size:
                raise _TooMany(f"the server sent {len(data):,} bytes, not {size:,}; it ignores range requests")
            if size is not None and len(data) < size:
                raise _TooFew(f"only {len(data):,} of {size:,} bytes came")
            return data

        return b"" if size == 0 else await self._try(name, request)

    async def _size(self, name: str) -> int | ShardError:
        async def request() -> int:
            size = (await self._call("info", name))["size"]
            if size is None:
                raise _TooFew("the server does not state its size")
            return int(size)

        return await self._try(name, request)

    async def _call(self, method: str, name: str, **options: Any) -> Any:
        filesystem = self._open()
        path = filesystem._strip_protocol(self.place(name))
        if filesystem.async_impl:
            return await getattr(filesystem, f"_{method}")(path, **options)
        return await asyncio.to_thread(getattr(filesystem, method), path, **options)

    async def _try(self, name: str, request: Callable[[], Awaitable[T]]) -> T | ShardError:
        """Return the request's result, or one error with the file, the number of tries and the last cause."""
        error: Exception
        for attempt in range(1, self.num_tries + 1):
            try:
                return await asyncio.wait_for(request(), self.timeout_s)
            except Exception as fault:
                error = fault
                if _is_final(fault):
                    break
            if attempt < self.num_tries:
                await asyncio.sleep(self.pause_s * 2 ** (attempt - 1) * _RANDOM.uniform(0.5, 1))
        return self._give_up(name, error, attempt)

    def _give_up(self, name: str, error: Exception, num_tries: int) -> UnreachableError:
        place, cause = self.place(name), self._describe(error)
        if isinstance(error, FileNotFoundError) and _is_final(error):
            return MissingFileError(f"{place} does not exist", "check the address")
        if _is_refusal(error):
            return UnreachableError(f"{place} is refused ({cause})", "check the credentials for that server")
        tries = f"{num_tries} tries" if num_tries > 1 else "1 try"
        return UnreachableError(f"{place} cannot be read, after {tries} ({cause})", _AGAIN)

    def _describe(self, error: Exception) -> str:
        if isinstance(error, TimeoutError):
            return f"no answer within {self.timeout_s:g} s"
        if isinstance(error, aiohttp.ClientResponseError):
            return f"status {error.status} {error.message}"
        if isinstance(error, _TooFew | _TooMany):
            return str(error)
        return f"{type(error).__name__}: {error}"


# Training seeds the global random generator, so this is a separate one.
_RANDOM = random.SystemRandom()


def _require_no_query(url: str) -> None:
    # The message leaves out the query: it may be a signature.
    if place := re.match(r"([^?#]*)[?#]", url):
        raise ShardError(
            f"{place[1]} is followed by a query or fragment (? or #), so file names cannot be added to it",
            "give only the folder's address; for a private bucket use s3:// with keys, as shards/README.md says",
        )


def _require_protocol(protocol: str) -> None:
    try:
        fsspec.get_filesystem_class(protocol)
    except ImportError as error:
        extra = _EXTRAS.get(protocol)
        remedy = f"pip install 'kfood_dist[{extra}]'" if extra else "install that package"
        raise ShardError(f"{protocol}:// needs a package that is not installed ({error})", remedy) from None
    except ValueError:
        raise ShardError(
            f"{protocol}:// is not a protocol that fsspec knows", "use a path, or http, https or s3"
        ) from None


def _is_final(error: BaseException) -> bool:
    """Return whether the same request would fail again."""
    cause = error.__cause__
    if isinstance(error, FileNotFoundError) and isinstance(cause, aiohttp.ClientError | TimeoutError):
        return _is_final(cause)  # fsspec raises this whenever it cannot get a size
    status = getattr(error, "status", None)
    if isinstance(status, int):
        return 400 <= status < 500 and status not in _PASSING_STATUS
    return isinstance(error, FileNotFoundError | _TooMany) or _is_refusal(error)


def _is_refusal(error: BaseException) -> bool:
    return (
        isinstance(error, PermissionError)
        or getattr(error, "status", None) in (401, 403)
        or type(error).__name__ == "NoCredentialsError"  # from botocore, which may not be installed
    )
