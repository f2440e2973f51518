"""Names of files are always read as UTF-8, also under a locale with another encoding.

    kfood, launch, ranks         ──► the same command in Python's UTF-8 mode, once; ranks and workers inherit it
    a program that calls `main`  ──► a refusal, because its running Python can no longer change the encoding

Under such a locale, Python reads each name in the locale's encoding: `갈비구이` silently becomes another class.
"""

import codecs
import locale
import os
import sys
from collections.abc import Sequence

from kfood_dist.errors import LaunchError

_REMEDY = "start Python with PYTHONUTF8=1, or under a UTF-8 locale such as LC_ALL=C.UTF-8"


def names_are_utf8() -> bool:
    """Return whether this Python reads and writes the names of files as UTF-8."""
    return codecs.lookup(sys.getfilesystemencoding()).name == "utf-8"


def require_utf8_names() -> None:
    """Raise LaunchError unless names are UTF-8 in this process."""
    if not names_are_utf8():
        raise LaunchError(f"Python reads the names of files as {sys.getfilesystemencoding()}, not as UTF-8", _REMEDY)


def ensure_utf8(argv: Sequence[str] | None) -> None:
    """Return if names are UTF-8. Otherwise restart the same command in UTF-8 mode if `argv` is None.

    None means that kfood is the program itself and no other program calls it. The console keeps its encoding, and shows
    an escape for a character that the encoding lacks. Raises LaunchError if names are not UTF-8 and `argv` is given, or
    if UTF-8 mode was tried already.
    """
    if argv is not None or names_are_utf8() or os.environ.get("PYTHONUTF8") == "1":  # PYTHONUTF8=1: tried already
        require_utf8_names()
        return
    with open("/proc/self/cmdline", "rb") as file:  # sys.orig_argv was decoded with the locale
        words = file.read().split(b"\0")[:-1]
    num_own = len(sys.argv) - 1
    typed = words[len(words) - num_own :]
    words = [words[0], b"-X", b"utf8", *words[1 : len(words) - num_own], *as_utf8(typed, locale.getencoding())]
    environment = {**os.environb, b"PYTHONUTF8": b"1", **_console(locale.getencoding())}
    os.execvpe(words[0], words, environment)


def as_utf8(words: Sequence[bytes], encoding: str) -> list[bytes]:
    """Return words typed under a locale of another `encoding` in UTF-8. The name of an existing file stays as it is."""
    return [word if _is_utf8(word) or os.path.lexists(word) else _recoded(word, encoding) for word in words]


def _is_utf8(word: bytes) -> bool:
    try:
        word.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


def _recoded(word: bytes, encoding: str) -> bytes:
    try:
        return word.decode(encoding).encode("utf-8")
    except (UnicodeError, LookupError):
        return word


def _console(encoding: str) -> dict[bytes, bytes]:
    """Return the variable that keeps the standard streams in the locale's encoding.

    Returns none for ASCII, as under the locale C: the streams are then UTF-8, as in Python itself.
    """
    try:
        name = codecs.lookup(encoding).name
    except LookupError:
        return {}
    if name == "ascii" or os.environ.get("PYTHONIOENCODING"):
        return {}
    return {b"PYTHONIOENCODING": f"{name}:backslashreplace".encode("ascii")}
