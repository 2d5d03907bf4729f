"""Where the log of a run comes from, as settings, so that another command can read it again."""

from __future__ import annotations

from dataclasses import fields, replace

from lares_fast.data import InteractionLog, Split
from lares_fast.train.config import MEMORY, SPLITS, DataConfig, RunConfig


def with_source(config: RunConfig, log: InteractionLog, split: Split) -> RunConfig:
    """Return ``config`` with the settings that read ``log`` again and make ``split``.

    No setting can name a log that was made in memory. Then ``data.format`` is ``memory``, unless ``config`` names a file.
    """
    names = {each.name for each in fields(DataConfig)}
    changes = {name: value for name, value in (log.source or {}).items() if name in names}
    if log.source is None and config.data.path is None:
        changes["format"] = MEMORY
    kind = split.protocol.partition(" ")[0]
    if kind in SPLITS:
        changes["split"] = kind
    return replace(config, data=replace(config.data, **changes))
