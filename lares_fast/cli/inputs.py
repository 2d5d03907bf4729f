"""The log and the split that a configuration names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from lares_fast._errors import InputError
from lares_fast.data import InteractionLog, Split, cutoffs, leave_one_out, read_log, synthetic_log, temporal_split
from lares_fast.train.config import MEMORY, DataConfig
from lares_fast.train.evaluate import Progress

# With this value of data.time, events keep the order of the file.
NO_TIME = "none"


def open_log(
    settings: DataConfig, path: str | None = None, *, min_events: int = 3, progress: Progress | None = None
) -> InteractionLog:
    """Read the log ``path`` (default: ``settings.path``) with ``settings``. Without any path, make the synthetic log.

    ``min_events`` and ``progress`` are used as in :func:`lares_fast.data.read_log`, whose errors are raised.
    """
    path = path or settings.path
    if settings.format == MEMORY:
        if path is None:
            raise InputError("the log of the run was made in memory and has no file: give its events with --data FILE.")
        settings = replace(settings, format="auto")
    if path is None:
        return synthetic_log(n_users=settings.synthetic_users, n_items=settings.synthetic_items, seed=settings.synthetic_seed)
    return read_log(path, format=settings.format, columns=_columns(settings), min_events=min_events, progress=progress)


def split_log(settings: DataConfig, log: InteractionLog) -> Split:
    """Split ``log`` with ``settings``. Raises the errors of the split, for example for a log without times."""
    if settings.split == "leave-one-out":
        return leave_one_out(log)
    return temporal_split(log, *cutoffs(log, settings.valid_fraction, settings.test_fraction))


def _columns(settings: DataConfig) -> Mapping[str, str | None] | None:
    given = {role: name for role in ("user", "item", "time") if (name := getattr(settings, role)) is not None}
    if not given:
        return None
    return {role: None if (role, name) == ("time", NO_TIME) else name for role, name in given.items()}
