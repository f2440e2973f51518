"""The files of an evaluation, written by atomic renames and checked when they are read back.

    records + facts ──► predictions.jsonl, report.html, then report.json, each under a temporary name first
    report.json (or its folder) ──► load_report ──► Report ──► compare, re-use

Always holds: if report.json exists, the other files are complete and belong to it.
"""

import json
import math
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from kfood_dist.errors import KfoodError
from kfood_dist.evaluate.metrics import Prediction, by_class, confusions, summarise
from kfood_dist.system.files import file_sha256, write_atomically

FORMAT, VERSION = "kfood-report", 1  # the version rises when the same inputs would get another score
REPORT, PREDICTIONS, PAGE = "report.json", "predictions.jsonl", "report.html"


class ReportError(KfoodError):
    """A report is missing or damaged, or two reports are not about the same pictures."""


@dataclass(frozen=True)
class Report:
    """A report that was read back. `raw` is its complete JSON.

    `predictions` is None if there is no predictions.jsonl beside it.
    """

    path: Path
    raw: dict[str, Any]
    accuracy: float
    correct: int
    images: int
    wilson_95: tuple[float, float]
    index_hash: str
    split: str
    per_class: dict[str, dict[str, Any]]
    predictions: list[Prediction] | None


def build_report(records: Sequence[Prediction], refused: Sequence[str], facts: dict[str, Any]) -> dict[str, Any]:
    """Return the content of report.json: first the result, then its circumstances (`facts`), then the details."""
    return {
        "format": FORMAT,
        "version": VERSION,
        **summarise(records),
        "refused": list(refused),
        **facts,
        "per_class": by_class(records),
        "confusions": confusions(records),
    }


def write_report(out: Path, report: dict[str, Any], records: Sequence[Prediction], page: str) -> None:
    """Write an evaluation's three files into `out`. Removes an older report.json first, and writes the new one last."""
    with suppress(FileNotFoundError):
        (out / REPORT).unlink()
    write_atomically(out / PREDICTIONS, "".join(_line(r) for r in records))
    write_atomically(out / PAGE, page)
    report = report | {"predictions_sha256": file_sha256(out / PREDICTIONS)}
    write_atomically(out / REPORT, json.dumps(report, ensure_ascii=False, indent=2) + "\n")


def reusable(out: Path, inputs: dict[str, Any]) -> Report | None:
    """Return the report in `out` if it has exactly these inputs and its files are complete."""
    try:
        report = load_report(out)
    except ReportError:
        return None
    whole = report.predictions is not None and (out / PAGE).is_file()
    return report if whole and report.raw.get("inputs") == inputs else None


def load_report(path: Path) -> Report:
    """Read a report.json, or the one in a folder, and the predictions beside it.

    Raises ReportError if it is missing, has another format, or contradicts itself or those predictions.
    """
    path = path / REPORT if path.is_dir() else path
    raw = _read_json(path)
    try:
        report = Report(
            path=path,
            raw=raw,
            accuracy=float(raw["accuracy"]),
            correct=int(raw["correct"]),
            images=int(raw["images"]),
            wilson_95=(float(raw["wilson_95"][0]), float(raw["wilson_95"][1])),
            index_hash=str(raw["index_hash"]),
            split=str(raw["split"]),
            per_class={str(k): _class_row(v) for k, v in raw["per_class"].items()},
            predictions=_read_predictions(path.with_name(PREDICTIONS), raw.get("predictions_sha256")),
        )
        _require_consistent(report)
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise ReportError(f"{path} is damaged ({type(error).__name__}: {error})", _AGAIN) from None
    return report


_AGAIN = "make it again with `kfood eval … --out`"


def _read_json(path: Path) -> dict[str, Any]:
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ReportError(
            f"report {path} cannot be read ({error.strerror})",
            "name a report.json or the --out folder of a `kfood eval`",
        ) from None
    except (ValueError, RecursionError):
        raise ReportError(f"{path} is not JSON", _AGAIN) from None
    if not isinstance(raw, dict) or raw.get("format") != FORMAT:
        raise ReportError(f"{path} is not a report of `kfood eval`", "name a report.json or the folder that holds it")
    if raw.get("version") != VERSION:
        raise ReportError(f"{path} has version {raw.get('version')!r}, but this kfood reads {VERSION}", _AGAIN)
    return raw


def _class_row(row: Any) -> dict[str, Any]:
    return {"images": int(row["images"]), "correct": int(row["correct"]), "accuracy": float(row["accuracy"])}


def _read_predictions(path: Path, sha256: str | None) -> list[Prediction] | None:
    if not path.is_file():
        return None
    if sha256 is not None and file_sha256(path) != sha256:
        raise ValueError(f"{path.name} beside it is not the file that it was written with")
    with open(path, encoding="utf-8") as file:
        return [Prediction(**json.loads(line)) for line in file]


def _require_consistent(report: Report) -> None:
    rows = report.per_class.values()
    counted = (sum(r["images"] for r in rows), sum(r["correct"] for r in rows))
    if counted != (report.images, report.correct) or report.images <= 0:
        raise ValueError("its dishes do not add up to its total")
    if not math.isclose(report.accuracy, report.correct / report.images, abs_tol=1e-9):
        raise ValueError("its accuracy is not correct / images")
    if report.predictions is not None and (
        len(report.predictions) != report.images or sum(r.correct for r in report.predictions) != report.correct
    ):
        raise ValueError(f"{PREDICTIONS} beside it has another result")


def _line(record: Prediction) -> str:
    return json.dumps(asdict(record), ensure_ascii=False) + "\n"
