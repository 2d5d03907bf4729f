"""The separator of the columns of a text table."""

from __future__ import annotations

import csv
from pathlib import Path

from lares_fast._errors import InputError
from lares_fast._numbers import choice
from lares_fast.data._text import readable

# A separator is given by its name or as it is.
SEPARATORS = {"comma": ",", "tab": "\t", "semicolon": ";", "pipe": "|"}
# The header is looked for in this many bytes.
HEADER_BYTES = 1 << 16


def checked_separator(given: str, format: str, path: Path) -> str | None:
    """Return the character of the separator ``given``, or ``None`` for ``auto``. Raises :class:`InputError` for another value.

    It is also raised for a separator of a file in a ``format`` that has its own.
    """
    if given in SEPARATORS.values():
        found: str | None = given
    else:
        found = SEPARATORS.get(choice("separator", given, ("auto", *SEPARATORS)))
    if found is not None and format != "csv":
        raise InputError(
            f"separator is for csv, but {path} is read as {format}: leave separator out, or give the format csv.",
            "data.format=csv",
        )
    return found


def guessed_separator(path: Path, wanted: list[str]) -> tuple[str, list[str]]:
    """Return the separator that gives a header with all the ``wanted`` names, else the longest header, and this header.

    The usual separator of the ending of the file's name is preferred.
    """
    usual = "\t" if path.suffix.lower() == ".tsv" else ","
    with readable(path), path.open("rb") as file:
        data = file.read(HEADER_BYTES).removeprefix(b"\xef\xbb\xbf")
    candidates = sorted(SEPARATORS.values(), key=lambda separator: separator != usual)
    headers = {separator: header_of(data, separator) for separator in candidates}
    # Of equal values, max returns the first.
    best = max(candidates, key=lambda separator: (set(wanted) <= set(headers[separator]), len(headers[separator])))
    return best, headers[best]


def header_of(data: bytes, separator: str) -> list[str]:
    """Return the fields of the first line of ``data`` that is not blank. Fields between tabs have no quotes."""
    line = data.lstrip(b"\r\n").partition(b"\n")[0].partition(b"\r")[0].decode(errors="replace")
    if separator == "\t":
        return line.split(separator)
    try:
        return next(csv.reader([line], delimiter=separator), [])
    except csv.Error:
        return []
