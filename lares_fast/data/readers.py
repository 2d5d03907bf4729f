"""Readers of interaction logs: text, JSON, RecBole atomic files, CSV and parquet."""

from __future__ import annotations

import json
import operator
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lares_fast._errors import InputError, printable
from lares_fast._memory import allocating
from lares_fast._numbers import choice, shown, whole
from lares_fast.data._ids import IdColumn
from lares_fast.data._tables import Events, Names, check_columns, finish, read_csv, read_parquet
from lares_fast.data._text import Block, Progress, cells, check_file, decode, readable, words
from lares_fast.data._times import TimeColumn
from lares_fast.data.log import Ids, InteractionLog, assemble

FORMATS = ("sequences", "pairs", "json", "inter", "csv", "parquet")
COLUMNS: Names = {"user": "user_id", "item": "item_id", "time": "timestamp"}

# Users, user ids, items, item ids. The events of a user are in order.
Lists = tuple[NDArray[Any], Ids, NDArray[np.int32], Ids]

_SURROGATE = re.compile("[\ud800-\udfff]")
_NO_TEXT = "an id must not be empty or hold a lone surrogate, which is half a character"
_SUFFIXES = {".json": "json", ".inter": "inter", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet", ".pq": "parquet"}


def read_log(
    path: str | os.PathLike[str],
    *,
    format: str = "auto",
    columns: Mapping[str, str | None] | None = None,
    min_events: int = 3,
    progress: Progress | None = None,
) -> InteractionLog:
    """Read a log of interactions.

    ``format``
        - ``sequences``: one line ``user item item ...`` for each user, oldest item first.
        - ``pairs``: one line ``user item`` for each event. The events of a user are in order of time.
        - ``json``: one object of user -> list of items, oldest first.
        - ``inter``: a RecBole atomic file.
        - ``csv``: one row for each event. A ``.tsv`` file is separated by tabs and has no quotes.
        - ``parquet``: one row for each event.
        - ``auto``: the format follows from the ending of the file's name. For text it follows from the first lines: two
          fields in each are ``pairs``.
    ``columns``
        For ``inter``, ``csv`` and ``parquet``: the names of the columns under ``user``, ``item`` and ``time``. The defaults
        are user_id, item_id and timestamp. Rows are sorted by time, and rows of equal time keep the order of the file. With
        ``{"time": None}`` all rows keep the order of the file.
    ``min_events``
        Users with fewer events are left out and counted in ``dropped``.
    ``progress``
        Called from time to time as ``progress(done_bytes, total_bytes)``.

    Raw ids are stored in ``user_ids`` and ``item_ids``. Integer item ids are numbered in ascending order, so ids 1..m keep
    their number. Strings are numbered in order of first appearance. Users keep the order of the file in ``sequences`` and
    ``json``. In other formats they are numbered like items.

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
    min_events = whole("min_events", min_events)
    check_file(source)
    with allocating(f"the log {source}", "end other programs, or read a part of the log"):
        log = _read(source, format, columns, min_events, progress)
    names = {role: "none" if (role, name) == ("time", None) else name for role, name in (columns or {}).items()}
    read_again = {"path": str(source.absolute()), "format": format, "user": None, "item": None, "time": None, **names}
    return replace(log, source={**read_again, "min_events": min_events})


def _read(
    source: Path, format: str, columns: Mapping[str, str | None] | None, min_events: int, progress: Progress | None
) -> InteractionLog:
    chosen = _detect(source) if format == "auto" else format
    if chosen in ("sequences", "pairs", "json"):
        if columns is not None:
            raise InputError(
                f"columns name the columns of inter, csv and parquet files, but {source} is read as {chosen}.", "data.format"
            )
        read = {"sequences": _read_sequences, "pairs": _read_pairs, "json": _read_json}[chosen]
        return assemble(*read(source, progress), None, name=source.name, min_events=min_events)
    names = _column_names(columns)
    read_table = {"inter": _read_inter, "csv": read_csv, "parquet": read_parquet}[chosen]
    return assemble(*read_table(source, names, progress), name=source.name, min_events=min_events)


def log_from_sequences(sequences: Mapping[Any, Sequence[Any]], *, name: str = "memory", min_events: int = 3) -> InteractionLog:
    """Return the log of a mapping of user -> items, oldest first. The rules for ``json`` files apply.

    The items are integers greater than 0, or strings. Raises :class:`InputError` for everything else.
    """
    if not isinstance(sequences, Mapping):
        raise InputError(f"sequences must be a mapping of user -> items, but got {shown(sequences)}.")
    min_events = whole("min_events", min_events)
    return assemble(*_from_lists(sequences.items(), name), None, name=name, min_events=min_events)


def _detect(path: Path) -> str:
    if known := _SUFFIXES.get(path.suffix.lower()):
        return known
    with readable(path), path.open("rb") as file:
        lines = [line.split() for line in islice(file, 20) if line.strip()]
    if lines and lines[0][0].startswith(b"{"):
        return "json"
    return "pairs" if all(len(fields) == 2 for fields in lines) else "sequences"


def _column_names(columns: Mapping[str, str | None] | None) -> dict[str, str | None]:
    if columns is not None and not isinstance(columns, Mapping):
        raise InputError(f"columns must be a mapping of user, item and time to names, but got {shown(columns)}.")
    names = {**COLUMNS, **(columns or {})}
    for role, name in names.items():
        if name is not None and not isinstance(name, str):
            raise InputError(f"columns must name the {shown(role)} column by a text, but got {shown(name)}.")
    if unknown := sorted(set(names) - set(COLUMNS), key=str):
        raise InputError(f"columns must name {', '.join(COLUMNS)}, but got {shown(unknown[0])}.")
    for role in ("user", "item"):
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


def _read_inter(path: Path, names: Names, progress: Progress | None) -> Events:
    """Read an atomic file of RecBole. It is separated by tabs and has a header of ``name:type`` fields."""
    users, items = IdColumn(), IdColumn()
    times = None if names["time"] is None else TimeColumn(path, names["time"])
    cells_of_header: list[str] = []
    header: list[str] = []
    for block in cells(path, progress):
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
        _check_width(path, block, len(header), "tab-separated")
        for role, column in (("user", users), ("item", items)):
            name = names[role]
            cell = block.take(slice(header.index(str(name)), None, len(header)))
            if (empty := np.flatnonzero(cell.starts == cell.ends)).size:
                raise InputError(f"{path}, line {cell.lines[empty[0]]}: {name} is empty.")
            column.add(cell)
        if times is not None:
            times.add_text(block.take(slice(header.index(str(names["time"])), None, len(header))))
    raw = dict(zip(header, cells_of_header, strict=True))
    return finish(path, {role: raw.get(str(name)) for role, name in names.items()}, users, items, times)


def _read_json(path: Path, progress: Progress | None) -> Lists:
    with readable(path):
        data = path.read_bytes()
    text = decode(path, data).removeprefix("\ufeff")
    try:
        pairs = json.loads(text, object_pairs_hook=_Pairs)
    except json.JSONDecodeError as error:
        problem = f"{error.msg} at column {error.colno}"
        raise InputError(f"{path}, line {error.lineno}: this is not valid JSON ({problem}).") from None
    except RecursionError:
        raise InputError(f"{path} is not a JSON object of user -> list of items, but nested too deeply.") from None
    except ValueError:
        # Python does not read an integer with thousands of digits.
        raise InputError(f"{path} holds a number that is too long; write ids beyond 64 bits as strings.") from None
    if not isinstance(pairs, _Pairs):
        raise InputError(f"{path} must hold one JSON object of user -> list of items, but holds {_json_type(pairs)}.")
    if progress:
        progress(len(data), len(data))
    return _from_lists(pairs, str(path))


class _Pairs(list[tuple[str, Any]]):
    """A JSON object with its repeated keys. A dictionary would lose them."""


_JSON_TYPES = {
    _Pairs: "an object",
    list: "a list",
    str: "a string",
    bool: "a truth value",
    int: "a number",
    float: "a number",
    type(None): "null",
}


def _json_type(value: object) -> str:
    return _JSON_TYPES.get(type(value), f"of type {type(value).__name__}")


def _from_lists(pairs: Iterable[tuple[Any, Any]], source: str) -> Lists:
    """Read ``pairs`` of user and items. All items must be integers greater than 0, or all must be strings."""
    keys, lists = list[str](), list[Sequence[Any]]()
    for user, items in pairs:
        if isinstance(items, np.ndarray):
            items = items.tolist()
        if isinstance(items, str | bytes | bytearray | memoryview | _Pairs) or not isinstance(items, Sequence):
            raise InputError(f"{source}, user {_shown(user)}: the items must be a list, but are {_json_type(items)}.")
        keys.append(_key(user, source))
        lists.append(items)
    for key, count in Counter(keys).items():
        if count > 1:
            raise InputError(f"{source}, user {_shown(key)}: the user occurs {count} times; join the lists.")
    flat: list[Any] = list(chain.from_iterable(lists))
    kind = type(flat[0]) if flat and isinstance(flat[0], str) else int
    if set(map(type, flat)) - {kind} or not all(map(_usable, flat)):
        _reject_item(keys, lists, kind, source)
    column = IdColumn()
    if kind is str:
        column.add_strings(flat)
    else:
        column.add_integers(np.array(flat, dtype=np.int64))
    users = np.repeat(np.arange(len(keys)), [len(items) for items in lists])
    return users, _user_ids(keys, source), *column.finish()


def _key(user: Any, source: str) -> str:
    """Return a user id as text."""
    if isinstance(user, str):
        if not _usable(user):
            raise InputError(f"{source}, user {_shown(user)}: {_NO_TEXT}.")
        return user
    try:
        if isinstance(user, bool | np.bool_):
            raise TypeError
        return str(operator.index(user))
    except TypeError:
        raise InputError(f"{source}, user {_shown(user)}: a user id must be an integer or a string.") from None
    except ValueError:
        raise InputError(f"{source}, user {_shown(user)}: write ids beyond 64 bits as strings.") from None


def _usable(item: Any) -> bool:
    """Return whether a string is not empty and can be written as UTF-8, or a number is in 1..2**63 - 1."""
    if not isinstance(item, str):
        return bool(0 < item < 2**63)
    return bool(item) and (item.isascii() or not _SURROGATE.search(item))


def _shown(value: object) -> str:
    """Return a short text for a message. A list may be huge, and Python prints no integer with thousands of digits."""
    if value is not None and not isinstance(value, str | int | float):
        return f"of type {type(value).__name__}"
    try:
        return repr(str(value)[:40])
    except ValueError:
        return "with thousands of digits"


def _reject_item(keys: list[str], lists: list[Sequence[Any]], kind: type, source: str) -> None:
    for key, items in zip(keys, lists, strict=True):
        for item in items:
            if type(item) is kind and _usable(item):
                continue
            where = f"{source}, user {_shown(key)}: item {_shown(item)}"
            if kind is int:
                raise InputError(f"{where} must be an integer greater than 0 and of 64 bits, or all must be strings.")
            reason = f": {_NO_TEXT}" if type(item) is kind else " must be a string like the first item"
            raise InputError(f"{where}{reason}.")


def _user_ids(keys: list[str], source: str) -> Ids:
    """Return ``keys`` as integers if every integer prints as its key, else ``keys`` unchanged."""
    try:
        values = [int(key) for key in keys]
        if [str(value) for value in values] == keys:
            if values and min(values) <= 0:
                raise InputError(f"{source}, user {min(values)}: the user id is not greater than 0; number the ids from 1.")
            return np.array(values, dtype=np.int64)
    except (ValueError, OverflowError) as error:
        if isinstance(error, InputError):
            raise
    return np.array(keys, dtype=object)


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
