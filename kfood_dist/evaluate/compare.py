"""`kfood compare`: reports on the same pictures side by side, such as those of the base and of the tuned model.

    REPORT … ──► load, refuse reports that cannot be compared ──► base, tuned ──► difference, by dish, McNemar's test
             ──► a table on the console, comparison.html, comparison.json

Always holds: all reports are about the same pictures. The first is the base and the last is the tuned model, unless
names say otherwise.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kfood_dist.evaluate.metrics import mcnemar_exact
from kfood_dist.evaluate.page import Column, interval, page, percent, table
from kfood_dist.evaluate.report import PREDICTIONS, Report, ReportError, load_report
from kfood_dist.system.files import require_writable_folder, write_atomically
from kfood_dist.system.words import plural

FORMAT, VERSION = "kfood-comparison", 1
COMPARISON, COMPARISON_PAGE = "comparison.json", "comparison.html"
BASE, TUNED = "base", "tuned"


@dataclass(frozen=True)
class Named:
    """A report and the name under which it is shown."""

    name: str
    report: Report


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `kfood compare`."""
    parser.description = (
        "Put reports of `kfood eval` on the same pictures side by side. The first is the base and the last is the "
        "tuned model, unless names say otherwise: base=DIR tuned=DIR. Writes comparison.json and comparison.html."
    )
    parser.add_argument(
        "reports", nargs="+", metavar="REPORT", help="a report.json or its folder; NAME=REPORT to give it a name"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for the comparison")


def run(args: argparse.Namespace) -> int:
    """Compare reports, write the files and print a table. Raises ReportError if they cannot be read or compared."""
    require_writable_folder(args.out, "--out")
    if len(args.reports) < 2:
        raise ReportError(f"{args.reports[0]} has nothing to be compared with", "name two reports or more")
    all_named = in_order([parse_name(text) for text in args.reports])
    require_comparable(all_named)
    comparison = compare(all_named)
    args.out.mkdir(parents=True, exist_ok=True)
    write_atomically(args.out / COMPARISON_PAGE, comparison_page(comparison))
    write_atomically(args.out / COMPARISON, json.dumps(comparison, ensure_ascii=False, indent=2) + "\n")
    print(describe(comparison))
    print(f"page: {args.out / COMPARISON_PAGE}")
    return 0


def parse_name(text: str) -> Named:
    """Read `REPORT`, or `NAME=REPORT` if no such path exists. A report without a name gets an empty one."""
    name, equals, path = text.partition("=")
    if equals and name and not Path(text).exists():
        return Named(name, load_report(Path(path)))
    return Named("", load_report(Path(text)))


def in_order(all_named: Sequence[Named]) -> list[Named]:
    """Return the base first and the tuned model last, each with its own name. Raises ReportError if names repeat."""
    roles = {BASE: 0, TUNED: 2}
    ranked = sorted(all_named, key=lambda named: roles.get(named.name, 1))
    last = len(ranked) - 1
    filled = [
        named if named.name else Named({0: BASE, last: TUNED}.get(i, f"report {i + 1}"), named.report)
        for i, named in enumerate(ranked)
    ]
    names = [named.name for named in filled]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ReportError(f"several reports have the name {twice[0]}", "give each its own name: NAME=REPORT")
    return filled


def require_comparable(all_named: Sequence[Named]) -> None:
    """Raise ReportError unless all reports are about the same pictures."""
    first = all_named[0].report
    for named in all_named[1:]:
        other = named.report
        differing = [
            f"{what} {mine} and {theirs}"
            for what, mine, theirs in (
                ("split", first.split, other.split),
                ("index_hash", first.index_hash[:12], other.index_hash[:12]),
                ("number of pictures", first.images, other.images),
            )
            if mine != theirs
        ]
        if differing:
            raise ReportError(
                f"{first.path} and {other.path} are not about the same pictures: {'; '.join(differing)}",
                "evaluate both with the same --shards, --split and --limit",
            )


def compare(all_named: Sequence[Named]) -> dict[str, Any]:
    """Return the content of comparison.json for reports in order: first the result, then each report and each dish."""
    base, tuned = all_named[0].report, all_named[-1].report
    dishes = _by_dish(base, tuned)
    return {
        "format": FORMAT,
        "version": VERSION,
        "base_accuracy": base.accuracy,
        "tuned_accuracy": tuned.accuracy,
        "gain": tuned.accuracy - base.accuracy,
        "test_images": base.images,
        "base_wilson_95": list(base.wilson_95),
        "tuned_wilson_95": list(tuned.wilson_95),
        "mcnemar": _mcnemar(base, tuned),
        "split": base.split,
        "index_hash": base.index_hash,
        "settings_that_differ": _differing_settings([named.report for named in all_named]),
        "reports": [_row(named) for named in all_named],
        "better": [name for name, row in dishes.items() if row["delta"] > 0],
        "worse": [name for name, row in dishes.items() if row["delta"] < 0],
        "per_class": dishes,
    }


def _row(named: Named) -> dict[str, Any]:
    report = named.report
    return {
        "name": named.name,
        "path": str(report.path),
        "accuracy": report.accuracy,
        "correct": report.correct,
        "images": report.images,
        "wilson_95": list(report.wilson_95),
        "model": report.raw.get("model"),
        "adapter": report.raw.get("adapter"),
    }


def _by_dish(base: Report, tuned: Report) -> dict[str, dict[str, Any]]:
    if base.per_class.keys() != tuned.per_class.keys():
        raise ReportError(f"{base.path} and {tuned.path} are not about the same dishes", "evaluate both again")
    rows = {
        name: {
            "images": row["images"],
            BASE: row["accuracy"],
            TUNED: tuned.per_class[name]["accuracy"],
            "delta": tuned.per_class[name]["accuracy"] - row["accuracy"],
        }
        for name, row in base.per_class.items()
    }
    return dict(sorted(rows.items(), key=lambda item: (-item[1]["delta"], item[0])))


def _mcnemar(base: Report, tuned: Report) -> dict[str, Any] | None:
    """Return McNemar's exact test on the paired pictures, or None if a report has no predictions beside it."""
    if base.predictions is None or tuned.predictions is None:
        return None
    before = {record.key: record.correct for record in base.predictions}
    after = {record.key: record.correct for record in tuned.predictions}
    if before.keys() != after.keys():
        raise ReportError(f"the {PREDICTIONS} beside {base.path} and {tuned.path} differ in keys", "evaluate again")
    only_base = sum(before[key] and not after[key] for key in before)
    only_tuned = sum(after[key] and not before[key] for key in before)
    return {
        "only_base_right": only_base,
        "only_tuned_right": only_tuned,
        "p_value": mcnemar_exact(only_base, only_tuned),
    }


def _differing_settings(reports: Sequence[Report]) -> list[str]:
    settings = [report.raw.get("settings") or {} for report in reports]
    return [key for key in settings[0] if any(other.get(key) != settings[0][key] for other in settings[1:])]


def describe(comparison: dict[str, Any]) -> str:
    """Return the aligned table for the console, followed by remarks."""
    head = ("", "accuracy", "right", "pictures", "95% interval")
    rows = [head] + [
        (r["name"], percent(r["accuracy"]), str(r["correct"]), str(r["images"]), interval(r["wilson_95"]))
        for r in comparison["reports"]
    ]
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    lines = [
        "  ".join(
            cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
    return "\n".join(lines + _remarks(comparison))


def _remarks(comparison: dict[str, Any]) -> list[str]:
    better, worse = len(comparison["better"]), len(comparison["worse"])
    lines = [f"{plural(better, 'dish', 'dishes')} got better, {worse} worse, of {len(comparison['per_class'])}"]
    if test := comparison["mcnemar"]:
        lines.append(
            f"only tuned right {test['only_tuned_right']}, only base right {test['only_base_right']}: "
            f"McNemar's exact p = {test['p_value']:.2g}"
        )
    if keys := comparison["settings_that_differ"]:
        lines.append(f"note: these settings differ between the reports: {', '.join(keys)}")
    return lines


def comparison_page(comparison: dict[str, Any]) -> str:
    """Return the page of a comparison."""
    columns = [Column("")] + [Column(h, True) for h in ("accuracy", "right", "pictures", "95% interval")]
    rows = [
        (r["name"], percent(r["accuracy"]), r["correct"], r["images"], interval(r["wilson_95"]))
        for r in comparison["reports"]
    ]
    dishes = [
        (name, row["images"], percent(row[BASE]), percent(row[TUNED]), f"{100 * row['delta']:+.1f}")
        for name, row in comparison["per_class"].items()
    ]
    heads = [Column("dish")] + [Column(h, True) for h in ("pictures", "base", "tuned", "points")]
    sections = [
        f'<p class="headline">{percent(comparison["base_accuracy"])} → {percent(comparison["tuned_accuracy"])}</p>',
        table(columns, rows),
        table([Column("")], [(line,) for line in _remarks(comparison)]),
        "<h2>By dish, largest gain first</h2>" + table(heads, dishes),
    ]
    return page(f"Comparison: {comparison['test_images']} {comparison['split']} pictures", sections)
