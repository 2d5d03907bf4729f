"""The log and the split that a configuration names."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from lares_fast._errors import InputError
from lares_fast.data import InteractionLog, Split, cutoffs, leave_one_out, read_log, synthetic_log, temporal_split
from lares_fast.train.config import DataConfig

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Flags:
    """What a command calls the settings of a log: a role or a format is to follow."""

    column: str
    format: str


SET = Flags(column="--set data.", format="--set data.format=")

# data.time with this value keeps the file's order.
NO_TIME = "none"


def open_log(
    settings: DataConfig,
    path: str | None = None,
    *,
    min_events: int = 3,
    progress: Progress | None = None,
    flags: Flags = SET,
) -> InteractionLog:
    """Read ``path``, by default ``settings.path``, as ``settings`` say; without a path, make the synthetic log.

    ``flags`` are how the user of the command would change the settings, for the advice of errors.
    """
    path = path or settings.path
    if path is None:
        return synthetic_log(n_users=settings.synthetic_users, n_items=settings.synthetic_items, seed=settings.synthetic_seed)
    try:
        return read_log(path, format=settings.format, columns=_columns(settings), min_events=min_events, progress=progress)
    except InputError as error:
        raise InputError(_advice(str(error), flags)) from None


def _advice(text: str, flags: Flags) -> str:
    """The reader speaks to Python; here its arguments are settings."""
    text = re.sub(r"name the (\w+) column in columns", rf"name the \1 column with {flags.column}\1=NAME", text)
    text = re.sub(r"columns=\{'(\w+)': None\}", rf"{flags.column}\1={NO_TIME}", text)
    text = re.sub(r"columns=\{'(\w+)': '([^']*)'\}", rf"{flags.column}\1=\2", text)
    text = re.sub(r"format='(\w+)'", rf"{flags.format}\1", text)
    return re.sub(r"^columns name ", f"{flags.column}NAME names ", text)


def split_log(settings: DataConfig, log: InteractionLog) -> Split:
    """The split that ``settings`` name."""
    if settings.split == "leave-one-out":
        return leave_one_out(log)
    return temporal_split(log, *cutoffs(log, settings.valid_fraction, settings.test_fraction))


def log_label(settings: DataConfig) -> str:
    """A short name for folders."""
    return Path(settings.path).name.split(".")[0] or "data" if settings.path else "synthetic"


def _columns(settings: DataConfig) -> Mapping[str, str | None] | None:
    given = {role: name for role in ("user", "item", "time") if (name := getattr(settings, role)) is not None}
    if not given:
        return None
    return {role: None if (role, name) == ("time", NO_TIME) else name for role, name in given.items()}
