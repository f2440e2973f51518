"""The console is best effort: what it cannot take is lost, and ends nothing. A run's log.txt keeps all of it.

    print, warnings, tracebacks, tqdm ──► Console (sys.stdout, sys.stderr) ──► descriptor 1 or 2, if it takes them
                                                          └──► whole lines ──► log.txt, once `keep_in` has named it

Always holds: writing raises nothing, whatever became of the reader, the terminal or the disk, and whatever characters
the console's encoding lacks. The exception is a verb whose output is its result: it stops if nobody can read it.
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
# Where the launcher says which log.txt keeps the lines of the processes it starts.
LOG_VARIABLE = "KFOOD_LOG"
_PATIENCE_MS = 1000


class ReaderLeft(Exception):
    """The reader of a result, such as `head`, has seen enough."""


def best_effort(waits: bool = True) -> None:
    """Let no write to standard output or error fail. Streams that somebody else replaced stay as they are.

    A process that `waits` follows a slow reader's pace. One that does not drops what the reader leaves lying, as a
    terminal does that is paused.
    """
    _open_closed()
    if sys.stdout is sys.__stdout__:
        sys.stdout = Console(1, sys.stdout, waits)
    if sys.stderr is sys.__stderr__:
        sys.stderr = Console(2, sys.stderr, waits)


def output_is_result() -> None:
    """From now on, raise ReaderLeft or KfoodError from writing to standard output, or flushing it, if that fails."""
    if isinstance(sys.stdout, Console):
        sys.stdout.descriptor.is_result = True
        sys.stdout.reconfigure(line_buffering=sys.stdout.isatty())


def keep_in(log: Path) -> None:
    """From now on, append every line that this process prints to `log` too. Nothing if `log` cannot be opened."""
    try:
        file = LineFile(log)
    except OSError:
        return  # the run's folder cannot be written to, which the run itself says
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, Console):
            stream.log = file


def show(text: str) -> None:
    """Print a line that the log has already."""
    if isinstance(sys.stdout, Console):
        sys.stdout.show(text + "\n")
    else:
        print(text, flush=True)


def _open_closed() -> None:
    """Open /dev/null for each standard descriptor that is closed: the next file would get its number, and the text."""
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # open(2) takes the lowest number free


class Console(io.TextIOWrapper):
    """A text stream to a descriptor. Characters that its encoding lacks are shown as escapes, such as \\u2013."""

    def __init__(self, number: int, before: TextIO | None, waits: bool = True):
        """`before` is the stream that this one stands in for; None if its descriptor was closed."""
        self.descriptor = _Descriptor(number, waits)
        encoding = before.encoding if before else "utf-8"
        super().__init__(self.descriptor, encoding, "backslashreplace", line_buffering=True)  # type: ignore[arg-type]
        self.log: LineFile | None = None
        self._line = ""

    def write(self, text: str) -> int:
        if self.log and not text.startswith("\r"):  # a state of a progress bar is no line
            *lines, self._line = (self._line + text).split("\n")
            for line in filter(None, lines):
                self.log.write(stamped(line))
        return super().write(text)

    def show(self, text: str) -> None:
        """Write `text` here and not to the log."""
        super().write(text)


def stamped(line: str) -> str:
    """A line of log.txt."""
    return f"{time.strftime('%Y-%m-%d %H:%M:%S')} {line}\n"


class _Descriptor(io.RawIOBase):
    """Writes whole to a file descriptor, or drops. No buffer: a signal's handler may print at any time."""

    def __init__(self, number: int, waits: bool):
        self._number = number
        self.is_result = False
        self._patience_ms = None if waits else _PATIENCE_MS
        self._took = True

    def write(self, data: Any) -> int:
        rest = memoryview(data).cast("B")
        try:
            while rest and self._takes():
                rest = rest[os.write(self._number, rest[: select.PIPE_BUF]) :]  # so much does not block, see pipe(7)
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
        """Whether there is room; a reader that let it run out once is not waited for again until there is."""
        poll = select.poll()  # one for each call, as threads and signal handlers write too
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
    """A text file to append to that keeps what a full disk refuses, and writes it when there is room again."""

    def __init__(self, path: Path):
        self._descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        self._waiting = b""

    def write(self, text: str) -> None:
        """Append `text`, now or later."""
        self._waiting += text.encode("utf-8", "backslashreplace")  # a file's name may hold what is no character
        try:
            while self._waiting:
                self._waiting = self._waiting[os.write(self._descriptor, self._waiting) :]
        except OSError:
            pass  # the checkpoint, which needs more room than this, says so and tries again

    def close(self) -> None:
        os.close(self._descriptor)
