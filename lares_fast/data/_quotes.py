"""Quotes of a CSV file, checked before it is parsed: a stray one joins rows, and CSV parsers do not tell."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from lares_fast._errors import InputError
from lares_fast.data._text import decode, pieces

_REMEDY = "write a quote that is part of a value twice and the value in quotes, or give the log as .tsv, which has no quotes"
_NEWLINE, _RETURN, _QUOTE = b'\n\r"'
_TIME = re.compile(rb"[-+]?[0-9][-+.:0-9TZeE ]*")


def spans_lines(path: Path, delimiter: str, time: str | None) -> bool:
    """Whether a quoted value of the CSV file ``path`` holds a line end.

    A quote that begins a field opens a value, and the quote that ends the value must end the field; inside, quotes are
    doubled. Quotes elsewhere are plain characters. Raises :class:`InputError` where this does not hold, and where a
    line inside a quoted value reads as a row of its own: two stray quotes would swallow the rows between them.
    ``time`` names the time column, which tells a row from prose.
    """
    separates = np.isin(np.arange(256), [_NEWLINE, _RETURN, ord(delimiter)])
    inside, opened, spans, header = False, 0, False, list[str]()
    for data, line in pieces(path):
        if b"\0" in data:
            decode(path, data, line)
        header = header or _header(data, delimiter)
        if not inside and b'"' not in data:
            continue
        buffer = np.frombuffer(data, np.uint8)

        # Adjacent quotes are a run. In a run of odd length the quotes but one pair up and change nothing; that one opens or
        # closes a value if it begins a field, and can only close one elsewhere.
        quotes = np.flatnonzero(buffer == _QUOTE)
        begins_run = np.append([0], np.flatnonzero(quotes[1:] - quotes[:-1] > 1) + 1)[: len(quotes)]
        first, length = quotes[begins_run], np.diff(begins_run, append=len(quotes))
        odd, begins_field = (length & 1) == 1, (first == 0) | separates[buffer[first - 1]]
        toggles = int(inside) + np.cumsum(begins_field & odd)
        outside_at = np.maximum.accumulate(np.where(~begins_field & odd, toggles, 0))
        state = np.concatenate(([inside], ((toggles - outside_at) & 1) == 1))
        before, after = state[:-1], state[1:]

        opens = first[~before & after]
        closes = np.where(before, odd, begins_field & ~odd)
        wrong = np.flatnonzero(closes & ~separates[buffer[np.minimum(first + length, len(data) - 1)]])
        if len(wrong):
            at = first[wrong[0]]
            origin = f" that begins in line {_begun(data, line, opens, opened, at)}" if before[wrong[0]] else ""
            here = _line(data, line, at)
            raise InputError(f"{path}, line {here}: text follows the end of a quoted value{origin}; {_REMEDY}.")
        ends = np.flatnonzero((buffer == _NEWLINE) | (buffer == _RETURN) if b"\r" in data else buffer == _NEWLINE)
        held = ends[state[np.searchsorted(first, ends)]]
        if inside or len(held):
            spans = True
            starts = np.append([0] if inside else [], held + 1).astype(np.int64)
            for at in _rows_inside(data, delimiter, header, time, starts[starts < len(data)], ends):
                raise InputError(
                    f"{path}, line {_line(data, line, at)}: the line reads as a row, but stands inside a quoted value that "
                    f"begins in line {_begun(data, line, opens, opened, at)}; {_REMEDY}."
                )
        if len(opens):
            opened = _line(data, line, opens[-1])
        inside = bool(state[-1])
    if inside:
        raise InputError(f"{path}, line {opened}: a quote opens a value that no quote closes; {_REMEDY}.")
    return spans


def _header(data: bytes, delimiter: str) -> list[str]:
    """The first line that is not blank."""
    line = next((line for line in data.splitlines() if line), b"")
    try:
        return next(csv.reader([line.decode(errors="replace")], delimiter=delimiter), [])
    except csv.Error:
        return []


def _line(data: bytes, line: int, at: int) -> int:
    return line + data.count(b"\n", 0, int(at))


def _begun(data: bytes, line: int, opens: NDArray[np.int64], opened: int, at: int) -> int:
    """The line of the last opening quote before ``at``; ``opened`` where it stands before ``data``."""
    earlier = opens[opens < at]
    return _line(data, line, earlier[-1]) if len(earlier) else opened


def _rows_inside(
    data: bytes, delimiter: str, header: list[str], time: str | None, starts: NDArray[np.int64], ends: NDArray[np.int64]
) -> Iterator[int]:
    """Those of ``starts``, where lines begin inside a quoted value, whose line reads as a row."""
    stops = ends[np.searchsorted(ends, starts)]
    marks = np.flatnonzero(np.frombuffer(data, np.uint8) == ord(delimiter))
    width = 1 + np.searchsorted(marks, stops) - np.searchsorted(marks, starts)
    for start, stop in zip(starts[width == len(header)], stops[width == len(header)], strict=True):
        fields = data[start:stop].split(delimiter.encode())
        if time not in header or _TIME.fullmatch(fields[header.index(time)].strip(b'" \t')):
            yield start
