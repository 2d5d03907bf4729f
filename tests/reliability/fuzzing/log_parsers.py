"""Simple parsers of logs, by Python's own modules and by pyarrow, and the comparison with what ``read_log`` returns.

A parser returns ``None`` for a file that it does not accept. ``read_log`` may refuse more files than these parsers, because it
also checks what a file means. Where both accept a file, they must find the same events.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterable
from datetime import UTC, datetime
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
from pyarrow import parquet

from lares_fast.data import InteractionLog

# (user, item, time) as texts, with a number as the time, or None.
Events = list[tuple[str, str, Any]]
COLUMNS = ("user_id", "item_id", "timestamp")


def parse(path: Path, kind: str, timed: bool) -> Events | None:
    """Return the events of the file in order, or ``None``. ``timed`` asks for times where the format has them."""
    try:
        if kind == "parquet":
            return _parquet(path, timed)
        text = path.read_bytes().decode("utf-8-sig")
        if kind == "json":
            return _json(text)
        if kind in ("csv", "tsv"):
            return _columns(_csv_rows(text, kind), timed)
        lines = text.replace("\r\n", "\n").split("\n")
        if kind == "inter":
            rows = [line.split("\t") for line in lines if line]
            return _columns([[cell.split(":")[0] for cell in rows[0]], *rows[1:]], timed)
        # White space is that of ASCII.
        words = [re.split("[ \t\v\f\r]+", line.strip(" \t\v\f\r")) for line in lines if line.strip(" \t\v\f\r")]
        if kind == "pairs":
            return [(user, item, None) for user, item in words]
        return [(user, item, None) for user, *items in words for item in items]
    except (ValueError, IndexError, csv.Error, pyarrow.ArrowException, OSError, RecursionError):
        return None


def _csv_rows(text: str, kind: str) -> list[list[str]]:
    if kind == "tsv":
        # There are no quotes.
        rows = list(csv.reader(io.StringIO(text, newline=""), delimiter="\t", quoting=csv.QUOTE_NONE, strict=True))
    else:
        rows = list(csv.reader(io.StringIO(text, newline=""), strict=True))
    return [row for row in rows if row]


def _columns(rows: list[list[str]], timed: bool) -> Events:
    header, places = rows[0], []
    for name in COLUMNS[: 3 if timed else 2]:
        if header.count(name) != 1:
            raise ValueError(name)
        places.append(header.index(name))
    events = []
    for row in rows[1:]:
        if len(row) != len(header):
            raise ValueError("width")
        user, item, *time = (row[place] for place in places)
        events.append((user, item, time_of(time[0]) if time else None))
    return events


def time_of(text: str) -> Any:
    """Return the time as an exact number. Dates are counted in seconds."""
    text = text.strip(" \t\n\r\v\f")
    if re.fullmatch(r"[+-]?[0-9]{1,30}", text):
        return Fraction(text)
    if re.fullmatch(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]{1,3})?", text):
        return Fraction(float(text))
    whole, point, fraction = text.partition(".")
    zone = "Z" if fraction.endswith("Z") else ""
    moment = datetime.fromisoformat(whole + zone)
    moment = moment if moment.tzinfo else moment.replace(tzinfo=UTC)
    seconds = Fraction((moment - datetime(1970, 1, 1, tzinfo=UTC)) // (datetime(1, 1, 1, 0, 0, 1) - datetime(1, 1, 1)))
    return seconds + (Fraction(f"0.{fraction.rstrip('Z')}") if point else 0)


def _json(text: str) -> Events:
    pairs = json.loads(text, object_pairs_hook=list)
    return [(str(user), str(item), None) for user, items in pairs for item in items]


def _parquet(path: Path, timed: bool) -> Events:
    table = parquet.read_table(path, columns=list(COLUMNS[: 3 if timed else 2]), pre_buffer=False, use_threads=False)
    columns = [list(map(str, table.column(name).to_pylist())) for name in COLUMNS[:2]]
    times: Iterable[Any] = [None] * len(table)
    if timed:
        column = table.column(COLUMNS[2])
        if pyarrow.types.is_temporal(column.type):
            column = column.cast(pyarrow.int32()) if pyarrow.types.is_date32(column.type) else column
            column = column.cast(pyarrow.int64())
        times = [Fraction(value) for value in column.to_pylist()]
    return list(zip(*columns, times, strict=True))


def difference(log: InteractionLog, events: Events, min_events: int) -> str | None:
    """Return how ``log`` differs from ``events``, or ``None``."""
    by_user: dict[str, list[tuple[str, Any]]] = {}
    for user, item, time in events:
        by_user.setdefault(user, []).append((item, time))
    expected = {user: found for user, found in by_user.items() if len(found) >= min_events}
    found = {}
    for at, user in enumerate(log.user_ids.tolist()):
        rows = slice(log.offsets[at], log.offsets[at + 1])
        times = [None] * log.lengths[at] if log.times is None else log.times[rows].tolist()
        found[str(user)] = list(zip(map(str, log.item_ids[log.items[rows]].tolist()), times, strict=True))
    if found.keys() != expected.keys():
        return f"users {sorted(found)[:5]} instead of {sorted(expected)[:5]}"
    ticks = _ticks(log, [entry for entries in expected.values() for entry in entries])
    for user, entries in expected.items():
        if log.times is not None:
            entries = sorted(entries, key=lambda entry: entry[1])
            if [time * ticks for _, time in entries] != [Fraction(time) for _, time in found[user]]:
                return f"user {user!r:.60}: times {found[user][:5]} instead of {entries[:5]}"
        if [item for item, _ in entries] != [item for item, _ in found[user]]:
            return f"user {user!r:.60}: {found[user][:5]} instead of {entries[:5]}"
    return None


def _ticks(log: InteractionLog, entries: list[tuple[str, Any]]) -> Fraction:
    """Return the factor from the parsed times to those of ``log``, which counts dates in days, seconds or nanoseconds."""
    if log.times is None:
        return Fraction(1)
    parsed = max((abs(time) for _, time in entries), default=Fraction(1))
    largest = max(abs(Fraction(time)) for time in log.times.tolist()) if len(log.times) else Fraction(1)
    factors = (Fraction(1), Fraction(10**9), Fraction(1, 86400))
    return min(factors, key=lambda factor: abs(parsed * factor - largest)) if parsed else Fraction(1)


def breach(log: InteractionLog, min_events: int) -> str | None:
    """Return which promise of :class:`InteractionLog` the log breaks, or ``None``."""
    ids = log.user_ids, log.item_ids[1:]
    checks = {
        "offsets": log.offsets[0] == 0 and log.offsets[-1] == log.n_events and log.offsets.dtype == np.int64,
        "lengths": bool((log.lengths >= min_events).all()),
        "items": log.items.dtype == np.int32 and (log.items.min(), log.items.max()) == (1, log.n_items - 1),
        "every item occurs": len(np.unique(log.items)) == log.n_items - 1,
        "ids are different": all(len(set(raw.tolist())) == len(raw) for raw in ids),
        "ids": all(raw.dtype == np.int64 or all(type(x) is str and x and x.encode() for x in raw) for raw in ids),
    }
    if log.times is not None:
        inner = np.ones(max(0, log.n_events - 1), bool)
        inner[log.offsets[1:-1] - 1] = False
        checks["times"] = log.times.dtype in (np.int64, np.float64) and bool(np.isfinite(log.times).all())
        checks["order of times"] = bool((log.times[1:] >= log.times[:-1])[inner].all())
    return next((f"breaks its promise: {name}" for name, holds in checks.items() if not holds), None)
