"""Reads samples from a JSONL file: each line is an object with the pictures and the texts of one sample.

    {"image": "a.jpg", "question": "무슨 음식인가요?", "answer": "비빔밥"}
    {"images": ["a.jpg", "b.jpg"], "question": "두 사진의 음식이 같은가요?", "answer": "아니요"}

A faulty line becomes a record that names the line. The other lines are still used.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from kfood_dist.errors import SourceError
from kfood_dist.pack.sources.names import file_name
from kfood_dist.pack.sources.record import Record
from kfood_dist.pack.sources.rows import ASKED, LABEL, has_label_or_question, row_record
from kfood_dist.pack.sources.spelling import Files

_PICTURES = ("images", "image", "image_path")


class _BadLine(Exception):
    """The error of a line that describes no sample, with the reason."""


def list_jsonl(path: Path, image_root: Path) -> Iterator[Record]:
    """Yield one record for each line that is not blank. Raises SourceError if the file cannot be read as UTF-8."""
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise SourceError(f"{path} cannot be read ({error.strerror})", "check its permissions") from None
    except UnicodeDecodeError as error:
        raise SourceError(f"{path} is not UTF-8: byte {error.start} of the file", "save it as UTF-8") from None
    files = Files(image_root)
    for number, line in enumerate(text.split("\n"), start=1):  # not splitlines: JSON may hold other line breaks
        if not line.strip():
            continue
        try:
            paths, texts, split = _read(line)
        except _BadLine as why:
            yield Record(path, f"{file_name(path.name)}:{number}", problem="bad_row", detail=str(why))
        else:
            yield row_record(image_root, files, paths, texts, split)


def _read(line: str) -> tuple[list[str], dict[str, str], str]:
    """Return the paths of the pictures, the texts by column, and the split. Raises _BadLine for a faulty line."""
    try:
        found = json.loads(line)
        json.dumps(found, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        raise _BadLine(f"half a character, which is not text: {line.strip()[:200]}") from None
    except (ValueError, RecursionError):
        raise _BadLine(f"not JSON: {line.strip()[:200]}") from None
    if not isinstance(found, dict):
        raise _BadLine(f"not a JSON object: {line.strip()[:200]}")
    if len(given := [name for name in _PICTURES if found.get(name) is not None]) > 1:
        raise _BadLine(f"`{given[0]}` and `{given[1]}` are both given")
    pictures = next((found[name] for name in _PICTURES if name in found), None)
    paths: list[Any] = pictures if isinstance(pictures, list) else [pictures]
    if not paths or not all(isinstance(text, str) and text.strip() for text in paths):
        raise _BadLine("no `image` with a path, and no `images` with several")
    texts = {name: _text(name, found[name]) for name in (LABEL, *ASKED) if found.get(name) is not None}
    if not has_label_or_question(texts):
        raise _BadLine("no `label`, and no `question` with its `answer`")
    return [text.strip().replace("\\", "/") for text in paths], texts, _text("split", found.get("split") or "")


def _text(name: str, value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise _BadLine(f"`{name}` is not text: {json.dumps(value, ensure_ascii=False)[:100]}")
    return str(value)
