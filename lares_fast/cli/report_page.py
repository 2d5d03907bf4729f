"""The file report.html of a run: one page with the results sheet, the results table and the settings."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from lares_fast._errors import printable
from lares_fast.cli.tables import row_name
from lares_fast.train.evaluate import MASKED, NOT_MASKED
from lares_fast.train.results import Row

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2rem; }
svg { width: 100%; height: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .2rem .7rem; text-align: right; border-bottom: 1px solid #ddd; }
th:first-child, td:first-child { text-align: left; }
td.best { font-weight: 600; }
pre { background: #f6f6f6; padding: .8rem; overflow-x: auto; font-size: 13px; }
"""


def page(
    title: str, notes: Sequence[str], sheet: str, rows: Sequence[Row], ks: Sequence[int], protocol: str, settings: str
) -> str:
    """Return the page as HTML, which needs no other file.

    ``notes`` are sentences above the sheet, ``sheet`` is SVG text, ``rows`` are the rows of the results table, and ``settings``
    is YAML text.
    """
    svg = sheet[sheet.index("<svg") :]
    tables = [_table(history, [row for row in rows if row["history"] == history], ks) for history in (NOT_MASKED, MASKED)]
    parts = [
        "<!DOCTYPE html>",
        f'<html lang="en"><head><meta charset="utf-8"><title>{_text(title)}</title><style>{_STYLE}</style></head><body>',
        f"<h1>{_text(title)}</h1>",
        *(f"<p>{_text(note)}</p>" for note in notes),
        svg,
        "<h2>Results</h2>",
        *tables,
        f"<p>{_text(protocol)}</p>" if protocol else "",
        f"<details><summary>All settings</summary><pre>{escape(settings)}</pre></details>",
        "</body></html>",
    ]
    return "\n".join(parts) + "\n"


def _table(history: str, rows: Sequence[Row], ks: Sequence[int]) -> str:
    if not rows:
        return ""
    columns = [f"{metric}@{k}" for metric in ("recall", "ndcg", "mrr") for k in ks]
    best = {name: max((row[name] for row in rows if name in row), default=None) for name in columns}
    head = "".join(f"<th>{name}</th>" for name in (f"history {history}", *columns))
    body = []
    for row in rows:
        cells = "".join(_cell(row.get(name), best[name]) for name in columns)
        body.append(f"<tr><td>{_text(row_name(row))}</td>{cells}</tr>")
    return f"<table><tr>{head}</tr>{''.join(body)}</table><br>"


def _cell(value: float | None, best: float | None) -> str:
    if value is None:
        return "<td>-</td>"
    return f"<td{' class=best' if value == best else ''}>{value:.4f}</td>"


def _text(text: str) -> str:
    return escape(printable(text, 1000))
