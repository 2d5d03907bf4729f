"""Check the quotes of a CSV file before it is parsed: a stray quote joins rows, and CSV parsers do not report that."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from lares_fast._errors import InputError
from lares_fast.data._separators import header_of
from lares_fast.data._text import BLOCK_BYTES, decode, pieces, readable

_REMEDY = "double each quote that is part of a value and put the value in quotes, or give the log as .tsv, which has no quotes"
_NEWLINE, _RETURN, _QUOTE = b'\n\r"'
_TIME = re.compile(rb"[-+]?[0-9][-+.:0-9TZeE ]*")


def spans_lines(path: Path, delimiter: str, time: str | None) -> bool:
    """Return whether a quoted value of the CSV file ``path`` contains a line end.

    A quote at the beginning of a field opens a value. The quote that closes the value must end the field. Quotes inside are
    doubled. Quotes elsewhere are plain characters. ``time`` names the time column, which helps to tell a row from prose.

    Raises :class:`InputError` where these rules are broken. It is also raised where a line inside a quoted value looks like a
    row: two stray quotes would hide the rows between them.
    """
    if not _has_quote(path):
        return False
    separates = np.isin(np.arange(256), [_NEWLINE, _RETURN, ord(delimiter)])
    inside, opened, spans, header = False, 0, False, list[str]()
    for data, line in pieces(path):
        if b"\0" in data:
            decode(path, data, line)
        header = header or header_of(data, delimiter)
        if not inside and b'"' not in data:
            continue
        buffer = np.frombuffer(data, np.uint8)
        quotes = np.flatnonzero(buffer == _QUOTE)
        ends = np.flatnonzero((buffer == _NEWLINE) | (buffer == _RETURN) if b"\r" in data else buffer == _NEWLINE)
        if not inside and _holds_plain_values(buffer, quotes, separates, ends):
            continue

        # Adjacent quotes form a run. In a run of odd length, all quotes but one form pairs and change nothing. The one that is
        # left opens or closes a value at the beginning of a field. Elsewhere it can only close a value.
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
        held = ends[state[np.searchsorted(first, ends)]]
        if inside or len(held):
            spans = True
            starts = np.append([0] if inside else [], held + 1).astype(np.int64)
            for at in _rows_inside(data, delimiter, header, time, starts[starts < len(data)], ends):
                raise InputError(
                    f"{path}, line {_line(data, line, at)}: the line looks like a row, but is inside a quoted value that "
                    f"begins in line {_begun(data, line, opens, opened, at)}; {_REMEDY}."
                )
        if len(opens):
            opened = _line(data, line, opens[-1])
        inside = bool(state[-1])
    if inside:
        raise InputError(f"{path}, line {opened}: a quote opens a value that no quote closes; {_REMEDY}.")
    return spans


def _has_quote(path: Path) -> bool:
    """Return whether the file holds a quote, or a NUL, which is refused. This is several times as fast as the check."""
    buffer = bytearray(BLOCK_BYTES)
    with readable(path), path.open("rb", buffering=0) as file:
        while size := file.readinto(buffer):
            if buffer.find(b'"', 0, size) >= 0 or buffer.find(b"\0", 0, size) >= 0:
                return True
    return False


def _holds_plain_values(
    buffer: NDArray[np.uint8], quotes: NDArray[np.int64], separates: NDArray[np.bool_], ends: NDArray[np.int64]
) -> bool:
    """Return ``True`` only if the ``quotes`` in ``buffer`` keep the rules and no quoted value contains a line end.

    ``buffer`` holds whole lines and begins outside of a value. ``quotes`` and ``ends`` are the positions of its quotes and line
    ends. Most files pass this test, which is quicker than the check of all rules: values open and close in turn, and the other
    quotes are pairs.
    """
    # The byte before the first one is the last one, which is a line end.
    begin, end = separates[buffer[quotes - 1]], separates[buffer[quotes + 1]]
    opens, closes, others = quotes[begin], quotes[end], quotes[~(begin | end)]
    if len(opens) != len(closes) or (opens >= closes).any() or (closes[:-1] >= opens[1:]).any():
        return False
    if len(others) % 2 or (others[1::2] - others[::2] != 1).any():
        return False
    return bool((ends[np.searchsorted(ends, opens)] > closes).all())


def _line(data: bytes, line: int, at: int) -> int:
    return line + data.count(b"\n", 0, int(at))


def _begun(data: bytes, line: int, opens: NDArray[np.int64], opened: int, at: int) -> int:
    """Return the line of the last opening quote before ``at``, or ``opened`` if that quote is before ``data``."""
    earlier = opens[opens < at]
    return _line(data, line, earlier[-1]) if len(earlier) else opened


def _rows_inside(
    data: bytes, delimiter: str, header: list[str], time: str | None, starts: NDArray[np.int64], ends: NDArray[np.int64]
) -> Iterator[int]:
    """Yield the positions in ``starts`` whose line looks like a row. All of the lines begin inside a quoted value."""
    stops = ends[np.searchsorted(ends, starts)]
    marks = np.flatnonzero(np.frombuffer(data, np.uint8) == ord(delimiter))
    width = 1 + np.searchsorted(marks, stops) - np.searchsorted(marks, starts)
    for start, stop in zip(starts[width == len(header)], stops[width == len(header)], strict=True):
        fields = data[start:stop].split(delimiter.encode())
        if time not in header or _TIME.fullmatch(fields[header.index(time)].strip(b'" \t')):
            yield start
