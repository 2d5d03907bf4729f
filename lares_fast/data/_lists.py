"""Read logs that hold a list of items for each user: JSON files, and mappings in memory."""

from __future__ import annotations

import json
import operator
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lares_fast._errors import InputError
from lares_fast.data._ids import IdColumn
from lares_fast.data._text import Progress, decode, readable
from lares_fast.data.log import Ids

# Users, user ids, items, item ids. The events of a user are in order.
Lists = tuple[NDArray[Any], Ids, NDArray[np.int32], Ids]

_SURROGATE = re.compile("[\ud800-\udfff]")
_NO_TEXT = "an id must not be empty or hold a lone surrogate, which is half a character"


def read_json(path: Path, progress: Progress | None) -> Lists:
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
    return from_lists(pairs, str(path))


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


def from_lists(pairs: Iterable[tuple[Any, Any]], source: str) -> Lists:
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
