"""Find the encoding of Korean text: UTF-8, CP949 (Korean Windows) or UTF-16, by evidence from all of the text.

    bytes ──► pieces between separators ──► evidence of each ──► all agree ──► text
                                                            ├──► some differ: an error with line and byte
                                                            └──► no evidence: what fits the files that exist

That bytes decode without an error is little evidence. `회` in CP949 is valid UTF-8 for `ȸ`, and much UTF-8 text is
valid CP949 for other letters. But Hangul in CP949 never decodes to Hangul as UTF-8. And Hangul in UTF-8 never decodes
to only Hangul as CP949.
"""

import codecs
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Set

from kfood_dist.errors import SourceError

UTF8, CP949 = "utf-8", "cp949"

_MARKS = ((codecs.BOM_UTF32_LE, "utf-32"), (codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16"))
# A piece has none of the bytes that end a name or a cell. These are never the second byte of a letter in CP949.
_PIECE = re.compile(rb"[^\x00-\x1f\"',./:;<=>|\\_-]+")
# 가 and 힝 in CP949. The 2,350 syllables in use are between them, and their second byte is at least that of 가.
_FIRST, _LAST = "가힝".encode(CP949)[:2], "가힝".encode(CP949)[2:]
# A Western or Central European letter inside a word, as in `crème`.
_INSIDE_A_WORD = re.compile("[a-z][À-ſ]|[À-ſ][a-z]")


class _Undecided(Exception):
    """Text of unknown encoding: `why`, and `at`, the byte from the start of the text that shows it."""

    def __init__(self, why: str, at: int):
        super().__init__(why, at)
        self.why = why
        self.at = at


def name_text(data: bytes, side: str = UTF8) -> str:
    """Return one name as text. Bytes that fit no encoding become U+FFFD.

    `side` is the encoding of the names beside it, which decides if the name itself does not.
    """
    encoding = _sure(data) or _all_likely(_PIECE.findall(data)) or side
    if encoding == UTF8 and _read(data, UTF8) is None:
        encoding = CP949
    return data.decode(encoding, errors="replace")


def side_of(names: Iterable[bytes]) -> str:
    """Return the encoding of names that one program wrote. It applies to those names that could be in either."""
    return CP949 if {_sure(name) for name in names} - {None} == {CP949} else UTF8


def read_text(
    data: bytes, path: object, encoding: str | None = None, fits: Callable[[str], int] = lambda text: 0
) -> str:
    """Return all of a file's text, with its line breaks unchanged and without a byte order mark (BOM).

    Without `encoding`, the encoding is found from the text. `fits` returns how much of a text is known, such as names
    of existing files. It decides if every letter could be in either encoding. Raises SourceError with line and byte
    if parts of the text are in different encodings, or if it does not fit one.
    """
    try:
        return _decode(data, encoding or _encoding_of(data, fits))
    except _Undecided as fault:
        line = len(re.findall(rb"\r\n|\r|\n", data[: fault.at])) + 1
        raise SourceError(
            f"{path} {fault.why}: line {line}, byte {fault.at} of the file",
            "save all of it as UTF-8; for a CSV, --encoding NAME sets the encoding",
        ) from None


def require_encoding(name: str) -> None:
    """Raise SourceError unless Python knows a text encoding of this name."""
    try:
        "".encode(name)
    except (LookupError, ValueError):
        raise SourceError(
            f"--encoding {name} is not known", "name one that Python knows, such as utf-8, cp949 or utf-16"
        ) from None


def wide_encoding(data: bytes) -> str | None:
    """Return UTF-16 or UTF-32 if the data has its byte order mark, or UTF-16 if its NULs show it; otherwise None.

    The NULs are the other halves of ASCII letters.
    """
    num_even, num_odd = data[::2].count(0), data[1::2].count(0)
    found = next((encoding for mark, encoding in _MARKS if data.startswith(mark)), None)
    if found is None and max(num_even, num_odd) > max(len(data) // 8, 4 * min(num_even, num_odd)):
        found = "utf-16-be" if num_even > num_odd else "utf-16-le"
    # Every such text contains ASCII, at least its line breaks, and therefore NULs.
    return found if found and num_even + num_odd and _fault(data, found) is None else None


def _encoding_of(data: bytes, fits: Callable[[str], int]) -> str:
    if wide := wide_encoding(data):
        return wide
    pieces = Counter(piece for piece in _PIECE.findall(data) if not piece.isascii())
    sure = {piece: _sure(piece) for piece in pieces}
    likely = {piece: encoding or _likely(piece) for piece, encoding in sure.items()}
    num_sure = Counter({UTF8: int(data.startswith(codecs.BOM_UTF8))})
    for piece, count in pieces.items():
        num_sure[sure[piece] or ""] += count
    if not num_sure[UTF8] and not num_sure[CP949]:
        return _by_fit(data, likely, fits)
    main, other = (UTF8, CP949) if num_sure[UTF8] >= num_sure[CP949] else (CP949, UTF8)
    _require_one(data, likely, main, other)
    return main


def _require_one(data: bytes, likely: Mapping[bytes, str | None], main: str, other: str) -> None:
    if strangers := {piece for piece, encoding in likely.items() if encoding == other}:
        raise _Undecided(f"is mostly {_NAMES[main]}, but {_NAMES[other]} here", _find(data, strangers))
    if (at := _fault(data, main)) is not None:
        raise _Undecided(f"is mostly {_NAMES[main]}, but not here", at)


def _by_fit(data: bytes, likely: Mapping[bytes, str | None], fits: Callable[[str], int]) -> str:
    """Return the encoding of a text in which no piece is surely in one encoding.

    Raises _Undecided if the text fits neither.
    """
    sound = [encoding for encoding in (UTF8, CP949) if _fault(data, encoding) is None]
    if not sound:
        raise _Undecided("is neither UTF-8 nor CP949 nor UTF-16 text", _fault(data, UTF8) or 0)
    if UTF8 in sound and (len(sound) == 1 or data.isascii()):
        return UTF8
    if UTF8 not in sound:
        if fits(_decode(data, CP949)):
            return CP949
        raise _Undecided("is not UTF-8, and has no Hangul as CP949", _fault(data, UTF8) or 0)
    utf8, cp949 = (fits(_decode(data, encoding)) for encoding in sound)
    if utf8 != cp949:
        return UTF8 if utf8 > cp949 else CP949
    if CP949 not in likely.values():
        return UTF8
    _require_one(data, likely, CP949, UTF8)
    return CP949


_NAMES = {UTF8: "UTF-8", CP949: "CP949"}


def _decode(data: bytes, encoding: str) -> str:
    try:
        return data.decode(encoding).removeprefix("\ufeff")
    except UnicodeError as error:
        raise _Undecided(f"is not {encoding} here", getattr(error, "start", 0)) from None


def _sure(piece: bytes) -> str | None:
    """Return the only encoding in which a piece can be Hangul, damaged or not. Returns None if that is not sure."""
    if piece.isascii():
        return None
    utf8, cp949 = piece.decode(UTF8, errors="replace"), _read(piece, CP949)
    num_damaged = utf8.count("\ufffd")
    letters = [c.encode(CP949) for c in cp949 or "" if not c.isascii()]
    in_use = [letter for letter in letters if _FIRST <= letter <= _LAST and letter[1] >= _FIRST[1]]
    if num_damaged and letters and len(in_use) == len(letters):
        return CP949
    # In UTF-8, Hangul begins with one of these bytes. In CP949, Chinese letters begin with them.
    is_misread = any(0xEA <= letter[0] <= 0xED for letter in letters)
    if _num_hangul(utf8) and (is_misread or _num_hangul(utf8) >= num_damaged):
        return UTF8
    return CP949 if num_damaged and 2 * len(in_use) >= max(len(letters), 1) else None


def _all_likely(pieces: Iterable[bytes]) -> str | None:
    found = {_likely(piece, is_name=True) for piece in pieces} - {None}
    return found.pop() if len(found) == 1 else None


def _likely(piece: bytes, is_name: bool = False) -> str | None:
    """Return the likelier encoding of a piece that is valid UTF-8 without Hangul, or None if it gives no evidence.

    It is CP949 if the piece is Hangul in CP949, of the 2,350 syllables in use, and in UTF-8 is text that no language
    writes in this way. A cell with other signs than letters, such as `½` or `±5`, gives no evidence. A name that has
    no letter or digit in UTF-8, such as `±`, is CP949 (`is_name`).
    """
    utf8, cp949 = _read(piece, UTF8), _read(piece, CP949)
    if piece.isascii() or utf8 is None:
        return None
    in_use = all(byte < 0x80 or byte >= _FIRST[1] for byte in piece)
    if cp949 is None or not in_use or _num_hangul(cp949) < sum(not c.isascii() for c in cp949):
        return UTF8
    if _INSIDE_A_WORD.search(utf8):
        return UTF8
    if not all(c.isascii() or (c.isalpha() and c >= "À") for c in utf8):
        return CP949 if is_name and not any(c.isalnum() for c in utf8) else None
    is_european = all(c <= "ſ" for c in utf8)
    return None if is_european and any(c.isascii() and c.isalpha() for c in utf8) else CP949


def _num_hangul(text: str) -> int:
    return sum("가" <= c <= "힣" for c in unicodedata.normalize("NFC", text))


def _read(data: bytes, encoding: str) -> str | None:
    try:
        return data.decode(encoding)
    except UnicodeDecodeError:
        return None


def _fault(data: bytes, encoding: str) -> int | None:
    """Return the place of the first byte that does not fit an encoding, or None if all bytes fit."""
    try:
        data.decode(encoding)
    except UnicodeDecodeError as error:
        return error.start
    return None


def _find(data: bytes, pieces: Set[bytes]) -> int:
    """Return the place of the first non-ASCII byte in the first of these pieces."""
    at, piece = next((found.start(), found[0]) for found in _PIECE.finditer(data) if found[0] in pieces)
    return at + next(i for i, byte in enumerate(piece) if byte >= 0x80)
