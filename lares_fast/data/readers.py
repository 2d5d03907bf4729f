"""Readers of interaction logs: text, JSON, RecBole atomic files, MovieLens ratings, CSV and parquet."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lares_fast._errors import InputError, printable
from lares_fast._memory import allocating
from lares_fast._numbers import choice, shown
from lares_fast.data._ids import IdColumn
from lares_fast.data._lists import Lists, from_lists, read_json
from lares_fast.data._separators import checked_separator
from lares_fast.data._tables import Events, Names, check_columns, finish, ratings_of, read_csv, read_parquet
from lares_fast.data._text import Block, Progress, cells, check_file, readable, words
from lares_fast.data._times import TimeColumn
from lares_fast.data.filters import Filters
from lares_fast.data.log import InteractionLog, assemble

FORMATS = ("sequences", "pairs", "json", "inter", "movielens", "csv", "parquet")
COLUMNS: Names = {"user": "user_id", "item": "item_id", "time": "timestamp", "rating": "rating"}

_SUFFIXES = {".json": "json", ".inter": "inter", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet", ".pq": "parquet"}
LISTS = ("sequences", "pairs", "json")


def read_log(
    path: str | os.PathLike[str],
    *,
    format: str = "auto",
    columns: Mapping[str, str | None] | None = None,
    separator: str = "auto",
    min_rating: float | None = None,
    duplicates: str = "keep",
    min_events: int = 3,
    min_item_events: int = 1,
    progress: Progress | None = None,
) -> InteractionLog:
    """Read a log of interactions.

    ``format``
        - ``sequences``: one line ``user item item ...`` for each user, oldest item first.
        - ``pairs``: one line ``user item`` for each event. The events of a user are in order of time.
        - ``json``: one object of user -> list of items, oldest first.
        - ``inter``: a RecBole atomic file.
        - ``movielens``: one line of user, item, rating and time for each event, separated by ``::`` or tabs, without a header.
        - ``csv``: one row for each event, below a header.
        - ``parquet``: one row for each event.
        - ``auto``: the format follows from the ending of the file's name. For other text it follows from the first lines:
          ``::`` between the fields is ``movielens``, and two fields in each line are ``pairs``.
    ``columns``
        For formats with columns: the names of the columns under ``user``, ``item``, ``time`` and ``rating``. The defaults are
        user_id, item_id, timestamp and rating. Rows are sorted by time, and rows of equal time keep the order of the file. With
        ``{"time": None}`` all rows keep the order of the file. Ratings are read only for ``min_rating``.
    ``separator``
        For ``csv``: what separates the columns: ``comma``, ``tab``, ``semicolon`` or ``pipe``, or the character itself. With
        ``auto`` it is the one that gives a header with the user and the item column. Columns between tabs have no quotes.
    ``min_rating, duplicates, min_events, min_item_events``
        The filters, which are applied in this order: see :class:`Filters`. What they leave out is counted in ``dropped``.
    ``progress``
        Called from time to time as ``progress(done_bytes, total_bytes)``.

    Raw ids are stored in ``user_ids`` and ``item_ids``. Integer item ids are numbered in ascending order, so ids 1..m keep
    their number. Strings are numbered in order of first appearance in the file. Users keep the order of the file in
    ``sequences`` and ``json``. In other formats they are numbered like items.

    An id column of a text file is integer if all of its ids are. In ``sequences`` and ``pairs`` all ids must be integers
    greater than 0 if the first id is an integer. Integers that do not fit 64 bits are stored as strings.

    Times are int64 if all are integers, else float64. Times that would lose digits as float64 raise an error. Dates in CSV are
    counted in days if all are dates, in seconds if some have a time of day, and in nanoseconds if some have a fraction of a
    second. Typed dates and timestamps in parquet are counted in their own unit.

    Raises :class:`InputError`, one sentence with the file and the line, row or column, for everything that cannot be read in
    the given format, and :class:`MissingExtraError` for CSV and parquet without pyarrow.
    """
    if not isinstance(path, str | os.PathLike):
        raise InputError(f"path must be the path of a file, but got {shown(path)}.")
    source = Path(path)
    choice("format", format, ("auto", *FORMATS))
    filters = Filters(min_rating=min_rating, duplicates=duplicates, min_events=min_events, min_item_events=min_item_events)
    check_file(source)
    with allocating(f"the log {source}", "end other programs, or read a part of the log"):
        log = _read(source, format, columns, separator, filters, progress)
    names = {role: "none" if (role, name) == ("time", None) else name for role, name in (columns or {}).items()}
    read_again = {**dict.fromkeys(COLUMNS), **names, **vars(filters), "separator": separator}
    return replace(log, source={"path": str(source.absolute()), "format": format, **read_again})


def _read(
    source: Path,
    format: str,
    columns: Mapping[str, str | None] | None,
    separator: str,
    filters: Filters,
    progress: Progress | None,
) -> InteractionLog:
    chosen = detect_format(source) if format == "auto" else format
    delimiter = checked_separator(separator, chosen, source)
    if chosen in LISTS:
        return _read_lists(source, chosen, columns, filters, progress)
    names = _column_names(columns, filters)
    if chosen == "csv":
        events = read_csv(source, names, filters, progress, delimiter)
    elif chosen == "parquet":
        events = read_parquet(source, names, filters, progress)
    else:
        events = _read_cells(source, names, filters, progress, None if chosen == "inter" else _MOVIELENS)
    return assemble(*events, name=source.name, filters=filters)


def _read_lists(
    source: Path, chosen: str, columns: Mapping[str, str | None] | None, filters: Filters, progress: Progress | None
) -> InteractionLog:
    if columns is not None:
        raise InputError(
            f"columns name the columns of inter, csv and parquet files, but {source} is read as {chosen}.", "data.format"
        )
    if filters.min_rating is not None:
        raise InputError(f"min_rating compares ratings, but {source} is read as {chosen}, which has none.", "data.format")
    read = {"sequences": _read_sequences, "pairs": _read_pairs, "json": read_json}[chosen]
    return assemble(*read(source, progress), None, None, name=source.name, filters=filters)


def log_from_sequences(
    sequences: Mapping[Any, Sequence[Any]],
    *,
    name: str = "memory",
    duplicates: str = "keep",
    min_events: int = 3,
    min_item_events: int = 1,
) -> InteractionLog:
    """Return the log of a mapping of user -> items, oldest first. The rules for ``json`` files apply.

    The items are integers greater than 0, or strings. Raises :class:`InputError` for everything else.
    """
    if not isinstance(sequences, Mapping):
        raise InputError(f"sequences must be a mapping of user -> items, but got {shown(sequences)}.")
    filters = Filters(duplicates=duplicates, min_events=min_events, min_item_events=min_item_events)
    return assemble(*from_lists(sequences.items(), name), None, None, name=name, filters=filters)


def detect_format(path: Path) -> str:
    """Return the format that ``auto`` stands for: by the ending of the name, else by the first lines."""
    if known := _SUFFIXES.get(path.suffix.lower()):
        return known
    with readable(path), path.open("rb") as file:
        lines = [line.split() for line in islice(file, 20) if line.strip()]
    if lines and lines[0][0].startswith(b"{"):
        return "json"
    if lines and len(lines[0]) == 1 and lines[0][0].count(b"::") >= len(_MOVIELENS) - 1:
        return "movielens"
    return "pairs" if all(len(fields) == 2 for fields in lines) else "sequences"


def _column_names(columns: Mapping[str, str | None] | None, filters: Filters) -> dict[str, str | None]:
    """Return the names of the columns to read by role; the name is ``None`` for a column that is not read."""
    if columns is not None and not isinstance(columns, Mapping):
        raise InputError(f"columns must be a mapping of user, item, time and rating to names, but got {shown(columns)}.")
    names = {**COLUMNS, **(columns or {})}
    for role, name in names.items():
        if name is not None and not isinstance(name, str):
            raise InputError(f"columns must name the {shown(role)} column by a text, but got {shown(name)}.")
    if unknown := sorted(set(names) - set(COLUMNS), key=str):
        raise InputError(f"columns must name {', '.join(COLUMNS)}, but got {shown(unknown[0])}.")
    if filters.min_rating is None:
        if columns and columns.get("rating") is not None:
            raise InputError(
                "columns name a rating column, which only min_rating uses: give min_rating too, or leave rating out.",
                "data.min_rating",
            )
        names["rating"] = None
    for role in ("user", "item", *(["rating"] if filters.min_rating is not None else [])):
        if names[role] is None:
            raise InputError(f"columns must name the {role} column; only the time column can be None.")
    roles: dict[str | None, str] = {}
    for role, name in names.items():
        if name is not None and (other := roles.setdefault(name, role)) != role:
            raise InputError(
                f"{name!r} cannot be the {other} column and the {role} column too: name another {role} column in columns.",
                f"data.{role}=NAME",
            )
    return names


def _read_sequences(path: Path, progress: Progress | None) -> Lists:
    users, items = IdColumn(), IdColumn()
    lengths, lines = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
    for block in words(path, progress):
        first, width = _per_line(block)
        is_user = np.zeros(len(block), bool)
        is_user[first] = True
        users.add_positive(block.take(is_user), "user id", path)
        items.add_positive(block.take(~is_user), "item id", path)
        lengths.append(width - 1)
        lines.append(block.lines[first])
    codes, user_ids = users.finish()
    if len(user_ids) < len(codes):
        again = np.setdiff1d(np.arange(len(codes)), np.unique(codes, return_index=True)[1])[0]
        raise InputError(
            f"{path}, line {np.concatenate(lines)[again]}: user {printable(str(user_ids[codes[again]]), 40)} has a line "
            "already; join the two lines, or give the format pairs if each line is one event.",
            "data.format=pairs",
        )
    return np.repeat(np.arange(len(codes)), np.concatenate(lengths)), user_ids[codes], *items.finish()


def _read_pairs(path: Path, progress: Progress | None) -> Lists:
    users, items = IdColumn(), IdColumn()
    for block in words(path, progress):
        _check_width(path, block, 2, "user and item")
        users.add_positive(block.take(slice(0, None, 2)), "user id", path)
        items.add_positive(block.take(slice(1, None, 2)), "item id", path)
    return *users.finish(), *items.finish()


# The columns of a file without a header.
_MOVIELENS = ("user_id", "item_id", "rating", "timestamp")


def _read_cells(path: Path, names: Names, filters: Filters, progress: Progress | None, known: Sequence[str] | None) -> Events:
    """Read an atomic file of RecBole: it is separated by tabs and has a header of ``name:type`` fields.

    If the header is ``known``, read a file without one, which may also be separated by ``::``.
    """
    users, items = IdColumn(), IdColumn()
    times = None if names["time"] is None else TimeColumn(path, names["time"])
    ratings = ratings_of(path, names, filters)
    cells_of_header: list[str] = []
    header: list[str] = []
    if known is not None:
        header = list(known)
        check_columns(path, names, header)
    for block in cells(path, progress, b"::" if known is not None else None):
        if not header:
            end = int(np.searchsorted(block.lines, block.lines[:1], "right")[0]) if len(block) else 0
            cells_of_header = block.take(slice(end)).strings()
            header = [cell.split(":")[0] for cell in cells_of_header]
            if not header:
                continue
            if "item_id_list" in header:
                raise InputError(
                    f"{path} is a RecBole benchmark file with prepared item_id_list rows; give the file of single events."
                )
            check_columns(path, names, header)
            block = block.take(slice(end, None))
        _check_width(path, block, len(header), "tab-separated" if known is None else "MovieLens")
        for role, column in (("user", users), ("item", items)):
            name = names[role]
            cell = _cells_of(block, header, name)
            if (empty := np.flatnonzero(cell.starts == cell.ends)).size:
                raise InputError(f"{path}, line {cell.lines[empty[0]]}: {name} is empty.")
            column.add(cell)
        if times is not None:
            times.add_text(_cells_of(block, header, names["time"]))
        if ratings is not None:
            ratings.add_text(_cells_of(block, header, names["rating"]))
    raw = dict(zip(header, cells_of_header, strict=False))
    return finish(path, {role: raw.get(str(name)) for role, name in names.items()}, users, items, times, ratings)


def _cells_of(block: Block, header: list[str], name: str | None) -> Block:
    return block.take(slice(header.index(str(name)), None, len(header)))


def _per_line(block: Block) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the first field and the number of fields of each line that has any."""
    first = np.flatnonzero(np.diff(block.lines, prepend=0))
    return first, np.diff(np.append(first, len(block)))


def _check_width(path: Path, block: Block, expected: int, what: str) -> None:
    """Raise :class:`InputError` unless every line of ``block`` has ``expected`` fields."""
    first, width = _per_line(block)
    if (bad := np.flatnonzero(width != expected)).size:
        line = block.lines[first[bad[0]]]
        raise InputError(f"{path}, line {line}: the line must have {expected} {what} fields, but it has {width[bad[0]]}.")
