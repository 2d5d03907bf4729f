"""The log and the split that a configuration names."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from lares_fast._errors import InputError
from lares_fast.data import InteractionLog, Split, cutoffs, leave_one_out, read_log, synthetic_log, temporal_split
from lares_fast.data._text import check_file
from lares_fast.data.readers import LISTS, detect_format
from lares_fast.train.config import MEMORY, DataConfig
from lares_fast.train.evaluate import Progress

# With this value of data.time, events keep the order of the file.
NO_TIME = "none"
# The settings that name a column.
ROLES = ("user", "item", "time", "rating")
_FILTERS = ("min_rating", "duplicates", "min_events", "min_item_events")


def open_log(
    settings: DataConfig, path: str | None = None, *, histories: bool = False, progress: Progress | None = None
) -> InteractionLog:
    """Read the log ``path`` (default: ``settings.path``) with ``settings``. Without any path, make the synthetic log.

    With ``histories`` no user and no item is left out for having few events. ``progress`` is used as in
    :func:`lares_fast.data.read_log`, whose errors are raised.
    """
    path = path or settings.path
    if settings.format == MEMORY:
        if path is None:
            raise InputError("the log of the run was made in memory and has no file: give its events with --data FILE.")
        settings = replace(settings, format="auto")
    if path is None:
        for name in _FILTERS:
            if getattr(settings, name) != getattr(DataConfig, name):
                raise InputError(f"data.{name} has no effect on a synthetic log: leave it out, or give a log.")
        return synthetic_log(n_users=settings.synthetic_users, n_items=settings.synthetic_items, seed=settings.synthetic_seed)
    return read_log(
        path,
        format=settings.format,
        columns=_columns(settings),
        separator=settings.separator,
        min_rating=settings.min_rating,
        duplicates=settings.duplicates,
        min_events=1 if histories else settings.min_events,
        min_item_events=1 if histories else settings.min_item_events,
        progress=progress,
    )


def settings_for(path: Path, data: DataConfig, trained_on: str | None, given: Collection[str]) -> DataConfig:
    """Return the settings to read ``path`` with: those of a run, ``data``, without what cannot hold for another format.

    ``trained_on`` is the path of the run's log. The settings that are named in ``given``, such as ``data.format``, stay.
    """
    alike = data.format != MEMORY and (trained_on is None or path.suffix == Path(trained_on).suffix)
    changes: dict[str, Any] = {} if alike else {"format": "auto", "separator": "auto"}
    format = data.format if alike or "data.format" in given else "auto"
    check_file(path)
    format = detect_format(path) if format == "auto" else format
    if format != "csv":
        changes["separator"] = "auto"
    if format in LISTS or (format == "movielens" and not alike):
        changes |= dict.fromkeys(ROLES)
    if format in LISTS:
        # Lists have neither ratings nor times.
        changes["min_rating"] = None
        if data.duplicates == "same-time":
            changes["duplicates"] = "keep"
    return replace(data, **{name: value for name, value in changes.items() if f"data.{name}" not in given})


def split_log(settings: DataConfig, log: InteractionLog) -> Split:
    """Split ``log`` with ``settings``. Raises the errors of the split, for example for a log without times."""
    if settings.split == "leave-one-out":
        return leave_one_out(log)
    return temporal_split(log, *cutoffs(log, settings.valid_fraction, settings.test_fraction))


def _columns(settings: DataConfig) -> Mapping[str, str | None] | None:
    given = {role: name for role in ROLES if (name := getattr(settings, role)) is not None}
    if not given:
        return None
    return {role: None if (role, name) == ("time", NO_TIME) else name for role, name in given.items()}
