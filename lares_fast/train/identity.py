"""The identity of a run: its model, seed, log and split, which must not change when the run is resumed."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np

from lares_fast._errors import InputError
from lares_fast.config import LARESConfig
from lares_fast.data import InteractionLog, Split
from lares_fast.train.config import RunConfig

# The entries that an exported model carries, so that a log can be compared with the training log.
ABOUT = ("data", "split", "rows", "events")

# The words for an entry in an error, where its name would not be clear.
_CALLED = {"rows": "split of the same name", "events": "data of the same order"}


def identity_of(config: RunConfig, model_config: LARESConfig, log: InteractionLog, split: Split) -> dict[str, Any]:
    """Return the entries that must not change when a run is resumed.

    ``model``, ``seed``
        The configuration of the model, and the seed.
    ``data, split, rows, events``
        As in :func:`log_identity`.
    """
    return {"model": model_config.to_dict(), "seed": config.seed, **log_identity(log, split)}


def log_identity(log: InteractionLog, split: Split) -> dict[str, str]:
    """Return the identity of a log and its split: the entries :data:`ABOUT`.

    ``data``
        A fingerprint of the dense items in their order.
    ``split, rows``
        The name of the split, and the SHA-256 of its rows.
    ``events``
        As in :func:`events_digest`.
    """
    digest = hashlib.sha256()
    for part in (split.train, split.valid, split.test):
        digest.update(part.users.astype("<i4").tobytes())
        digest.update(part.ends.astype("<i8").tobytes())
    return {"data": log.fingerprint(), "split": split.protocol, "rows": digest.hexdigest(), "events": events_digest(log)}


def events_digest(log: InteractionLog) -> str:
    """Return the SHA-256 of every user's items in order, by raw ids. The order of the users in the file has no effect."""
    users = np.argsort(log.user_ids, kind="stable")
    order = np.argsort(log.item_ids[1:], kind="stable")
    rank = np.empty(log.n_items, np.int64)
    rank[order + 1] = np.arange(len(order))
    lengths = log.lengths[users]
    places = np.arange(log.n_events) + np.repeat(log.offsets[users] - (np.cumsum(lengths) - lengths), lengths)
    digest = hashlib.sha256(json.dumps([log.user_ids[users].tolist(), log.item_ids[1:][order].tolist()]).encode())
    digest.update(lengths.astype("<i8").tobytes())
    digest.update(rank[log.items[places]].astype("<i8").tobytes())
    return digest.hexdigest()


def require_same(
    theirs: dict[str, Any], ours: dict[str, Any], run: Path, purpose: str, changed: dict[str, tuple[Any, Any]] | None = None
) -> None:
    """Raise :class:`InputError` if the identity ``theirs`` of the run in the folder ``run`` differs from ``ours``.

    Entries that an earlier version did not write are not compared. ``purpose`` begins the remedy: "resume with". ``changed``
    holds settings of the data with their values there and here, which the error names.
    """
    # An earlier version had fewer settings of the model. It computed what the other settings give by default.
    theirs = {**theirs, "model": LARESConfig.from_dict(theirs["model"]).to_dict()}
    for name, value in ours.items():
        if theirs.get(name, value) != value:
            differ = changed or {}
            if name == "model":
                differ = {key: (theirs["model"][key], new) for key, new in value.items() if theirs["model"][key] != new}
                if changed and differ.keys() == {"n_items"}:
                    # Other settings of the data give another number of items.
                    differ |= changed
            detail = "; " * bool(differ) + ", ".join(
                f"{key} is {old} there and {new} here" for key, (old, new) in differ.items()
            )
            raise InputError(
                f"{run} holds a run with another {_CALLED.get(name, name)}: {purpose} the same one, or choose another "
                f"folder{detail}."
            )
