"""HTML pages for people, each in one file: no script, no network, readable on a phone, in light and dark mode.

    title, sections ──► page ──► one HTML file        report, pictures ──► report_page

All text from data goes through `escape`. Pictures are embedded as they were packed.
"""

import base64
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from kfood_dist.evaluate.metrics import Prediction
from kfood_dist.system.words import plural

_STYLE = """
:root { color-scheme: light dark; --edge: #8884; --good: #1a7f37; --bad: #c4302b; }
@media (prefers-color-scheme: dark) { :root { --good: #4ac26b; --bad: #ff7b72; } }
body { font: 16px/1.5 system-ui, sans-serif; margin: 0 auto; padding: 1rem; max-width: 60rem; }
h1 { font-size: 1.4rem; } h2 { font-size: 1.1rem; margin-top: 2rem; }
.headline { font-size: 2.4rem; font-weight: 600; margin: 0; } .small { opacity: .75; font-size: .875rem; }
.wide { overflow-x: auto; } table { border-collapse: collapse; width: 100%; }
th, td { text-align: left; padding: .3rem .6rem; border-bottom: 1px solid var(--edge); vertical-align: top; }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
td.bar { min-width: 6rem; } td.bar div { height: .7rem; background: var(--good); border-radius: .2rem; }
.grid { display: grid; gap: .8rem; grid-template-columns: repeat(auto-fill, minmax(9rem, 1fr)); }
figure { margin: 0; overflow-wrap: anywhere; }
figure img { width: 100%; border-radius: .4rem; display: block; }
.good { color: var(--good); } .bad { color: var(--bad); }
"""


@dataclass(frozen=True)
class Column:
    """A table column: its heading, and whether it holds numbers."""

    heading: str
    number: bool = False


def page(title: str, sections: Iterable[str]) -> str:
    """Return a complete HTML document. `sections` are HTML already, `title` is text."""
    return (
        '<!DOCTYPE html>\n<html lang="ko">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<h1>{escape(title)}</h1>\n"
        + "\n".join(sections)
        + "\n</body>\n</html>\n"
    )


def table(columns: Sequence[Column], rows: Iterable[Sequence[object]]) -> str:
    """Return an HTML table. Every cell is text, and is escaped."""

    def cells(tag: str, values: Iterable[object]) -> str:
        return "".join(
            f"<{tag}{' class=number' if column.number else ''}>{escape(str(value))}</{tag}>"
            for column, value in zip(columns, values, strict=True)
        )

    body = "\n".join(f"<tr>{cells('td', row)}</tr>" for row in rows)
    head = cells("th", (column.heading for column in columns))
    return f'<div class="wide"><table>\n<tr>{head}</tr>\n{body}\n</table></div>'


def percent(share: float) -> str:
    """Format a share as a percentage with one decimal: 0.943 → 94.3%."""
    return f"{100 * share:.1f}%"


def interval(bounds: Sequence[float]) -> str:
    """Format two shares as a range: (0.891, 0.971) → 89.1–97.1%."""
    return f"{100 * bounds[0]:.1f}–{100 * bounds[1]:.1f}%"


def report_page(report: Mapping[str, Any], samples: Sequence[tuple[Prediction, bytes]]) -> str:
    """Return the page of one evaluation. `samples` are pictures to show, with their JPEG bytes."""
    sections = [_headline(report), _settings(report), _dishes(report), _confusions(report)]
    sections.append("<h2>Some of the pictures</h2>" + _grid(samples))
    if report["refused"]:
        names = ", ".join(escape(key) for key in report["refused"])
        sections.append(f"<h2>Refused as too long, counted as wrong</h2><p>{names}</p>")
    return page(f"Evaluation: {report['split']} pictures", sections)


def _headline(report: Mapping[str, Any]) -> str:
    return (
        f'<p class="headline">{percent(report["accuracy"])}</p>\n'
        f"<p>{report['correct']} of {plural(report['images'], 'picture')} named correctly; "
        f"95% interval {interval(report['wilson_95'])}. An answer must match exactly after one normalisation.</p>"
    )


def _settings(report: Mapping[str, Any]) -> str:
    settings = report["settings"]
    rows = [
        ("base model", report["model"]),
        ("adapter", report["adapter"] or "none"),
        ("pictures", f"{report['shards']}, {report['image_size']} px"),
        ("prompt", settings["prompt"]),
        ("quantisation", f"{settings['quantization']}, {settings['precision']}"),
        (
            "speed",
            f"{report['samples_per_second']} pictures/s, {report['world_size']} × {report['device']}",
        ),
    ]
    return "<h2>Settings</h2>" + table([Column(""), Column("")], rows)


def _dishes(report: Mapping[str, Any]) -> str:
    ranked = sorted(report["per_class"].items(), key=lambda item: (item[1]["accuracy"], item[0]))
    rows = [(name, row["images"], row["correct"], percent(row["accuracy"])) for name, row in ranked]
    columns = [Column("dish"), Column("pictures", True), Column("right", True), Column("accuracy", True)]
    return "<h2>By dish, worst first</h2>" + table(columns, rows)


def _confusions(report: Mapping[str, Any]) -> str:
    if not report["confusions"]:
        return "<h2>Most frequent mistakes</h2><p>None.</p>"
    rows = [(row["label"], row["prediction"] or "(nothing)", row["count"]) for row in report["confusions"]]
    columns = [Column("dish"), Column("was named"), Column("times", True)]
    return "<h2>Most frequent mistakes</h2>" + table(columns, rows)


def _grid(samples: Sequence[tuple[Prediction, bytes]]) -> str:
    return '<div class="grid">\n' + "\n".join(_figure(*sample) for sample in samples) + "\n</div>"


def _figure(record: Prediction, jpeg: bytes) -> str:
    data = base64.b64encode(jpeg).decode("ascii")
    tone, mark = ("good", "✓") if record.correct else ("bad", "✗")
    return (
        f'<figure><img alt="{escape(record.label)}" src="data:image/jpeg;base64,{data}">'
        f"<figcaption>{escape(record.label)}<br>"
        f'<span class="{tone}">{mark} {escape(record.prediction or "(nothing)")}</span> '
        f'<span class="small">{percent(record.confidence)}</span></figcaption></figure>'
    )
