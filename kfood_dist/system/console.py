"""The console is best effort: it may lose text, but never ends the process. A run's log.txt keeps all lines.

    print, warnings, tracebacks, tqdm ──► Console (sys.stdout, sys.stderr) ──► descriptor 1 or 2, if it has room
                                                       └──► complete lines ──► log.txt, once `keep_in` has named it

Always holds: writing raises nothing. The reader or the terminal may be gone, the disk may be full, and the console's
encoding may lack characters. The exception is a verb whose output is its result: it stops if nobody can read it.
"""

import io
import os
import select
import sys
import time
from pathlib import Path
from typing import Any, TextIO

from kfood_dist.errors import KfoodError

LOG_FILE = "log.txt"
# The launcher puts the path of the log.txt here, for the processes that it starts.
LOG_VARIABLE = "KFOOD_LOG"
_PATIENCE_MS = 1000


class ReaderLeft(Exception):
    """The reader of a result, such as `head`, has closed its end of the pipe."""


def best_effort(waits: bool = True) -> None:
    """Let no write to standard output or error fail. Streams that other code has replaced stay as they are.

    A process that `waits` follows the pace of a slow reader. Any other process drops text that the reader does not take
    in time, for example on a paused terminal.
    """
    _open_closed()
    if sys.stdout is sys.__stdout__:
        sys.stdout = Console(1, sys.stdout, waits)
    if sys.stderr is sys.__stderr__:
        sys.stderr = Console(2, sys.stderr, waits)


def output_is_result() -> None:
    """From now on, raise ReaderLeft or KfoodError if a write to standard output or its flush fails."""
    if isinstance(sys.stdout, Console):
        sys.stdout.descriptor.is_result = True
        sys.stdout.reconfigure(line_buffering=sys.stdout.isatty())


def keep_in(log: Path) -> None:
    """From now on, also append every line that this process prints to `log`. Does nothing if it cannot be opened."""
    try:
        file = LineFile(log)
    except OSError:
        return  # the run's folder is not writable: the run itself reports that
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, Console):
            stream.log = file


def show(text: str) -> None:
    """Print a line that is in the log already."""
    if isinstance(sys.stdout, Console):
        sys.stdout.show(text + "\n")
    else:
        print(text, flush=True)


def _open_closed() -> None:
    """Open /dev/null for each closed standard descriptor. Otherwise the next file gets its number and the text."""
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # open(2) takes the lowest free number


class Console(io.TextIOWrapper):
    """A text stream to a descriptor. Characters that its encoding lacks are shown as escapes, such as \\u2013."""

    def __init__(self, number: int, before: TextIO | None, waits: bool = True):
        """`before` is the stream that this one replaces, or None if its descriptor was closed."""
        self.descriptor = _Descriptor(number, waits)
        encoding = before.encoding if before else "utf-8"
        super().__init__(self.descriptor, encoding, "backslashreplace", line_buffering=True)  # type: ignore[arg-type]
        self.log: LineFile | None = None
        self._line = ""

    def write(self, text: str) -> int:
        if self.log and not text.startswith("\r"):  # one state of a progress bar is not a line
            *lines, self._line = (self._line + text).split("\n")
            for line in filter(None, lines):
                self.log.write(stamped(line))
        return super().write(text)

    def show(self, text: str) -> None:
        """Write `text` here, and not to the log."""
        super().write(text)


def stamped(line: str) -> str:
    """Return a line of log.txt: `line` after the date and time."""
    return f"{time.strftime('%Y-%m-%d %H:%M:%S')} {line}\n"


class _Descriptor(io.RawIOBase):
    """A raw stream that writes all bytes to a file descriptor, or drops the rest.

    It has no buffer, because a signal handler may print at any time.
    """

    def __init__(self, number: int, waits: bool):
        self._number = number
        self.is_result = False
        self._patience_ms = None if waits else _PATIENCE_MS
        self._took = True

    def write(self, data: Any) -> int:
        rest = memoryview(data).cast("B")
        try:
            while rest and self._takes():
                rest = rest[os.write(self._number, rest[: select.PIPE_BUF]) :]  # does not block, see pipe(7)
        except BrokenPipeError:
            if self.is_result:
                raise ReaderLeft from None
        except OSError as error:
            if self.is_result:
                raise KfoodError(
                    f"the output cannot be written ({error.strerror})", "write it to another place"
                ) from None
        return len(data)

    def _takes(self) -> bool:
        """Return whether there is room. After a wait that timed out, does not wait again until there is room."""
        poll = select.poll()  # a new one for each call, because threads and signal handlers write too
        poll.register(self._number, select.POLLOUT)
        self._took = bool(poll.poll(self._patience_ms if self._took else 0))
        return self._took

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._number

    def isatty(self) -> bool:
        return os.isatty(self._number)


class LineFile:
    """A text file to append to. It keeps the text that a full disk refuses, and writes it when there is room again."""

    def __init__(self, path: Path):
        self._descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        self._waiting = b""

    def write(self, text: str) -> None:
        """Append `text` now, or with a later call if the disk is full."""
        self._waiting += text.encode("utf-8", "backslashreplace")  # a file name may hold bytes that are not UTF-8
        try:
            while self._waiting:
                self._waiting = self._waiting[os.write(self._descriptor, self._waiting) :]
        except OSError:
            pass  # the checkpoint needs more room than this: it reports the full disk and tries again

    def close(self) -> None:
        os.close(self._descriptor)
