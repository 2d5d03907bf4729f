"""Whose run it is: the model, the seed, the log and the split, which must stay the same as long as a run goes on."""

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

# The part that an exported model takes along, so that it can be compared with a log.
ABOUT = ("data", "split", "rows", "events")

# What must be the same, in the words of an error.
_CALLED = {"rows": "split of the same name", "events": "data of the same order"}


def identity_of(config: RunConfig, model_config: LARESConfig, log: InteractionLog, split: Split) -> dict[str, Any]:
    """What must not change between the parts of one run.

    ``data`` is of the dense items in their order, ``events`` of raw ids in any order of users, ``rows`` of the split.
    """
    return {"model": model_config.to_dict(), "seed": config.seed, **log_identity(log, split)}


def log_identity(log: InteractionLog, split: Split) -> dict[str, str]:
    """The part of :func:`identity_of` that a log and its split have: the entries :data:`ABOUT`."""
    digest = hashlib.sha256()
    for part in (split.train, split.valid, split.test):
        digest.update(part.users.astype("<i4").tobytes())
        digest.update(part.ends.astype("<i8").tobytes())
    return {"data": log.fingerprint(), "split": split.protocol, "rows": digest.hexdigest(), "events": events_digest(log)}


def events_digest(log: InteractionLog) -> str:
    """SHA-256 of who had which item in which order, by raw id: it does not depend on how a file is sorted."""
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


def require_same(theirs: dict[str, Any], ours: dict[str, Any], run: Path, purpose: str) -> None:
    """Raise :class:`InputError` where the identity ``theirs`` of ``run`` is not ``ours``; what an old one lacks is let be."""
    # A setting that the model had before it had a name is the default.
    theirs = {**theirs, "model": LARESConfig.from_dict(theirs["model"]).to_dict()}
    for name, value in ours.items():
        if theirs.get(name, value) != value:
            detail = ""
            if name == "model":
                detail = "; " + ", ".join(
                    f"{key} is {theirs['model'][key]} there and {new} here"
                    for key, new in value.items()
                    if theirs["model"][key] != new
                )
            raise InputError(
                f"{run} holds a run with another {_CALLED.get(name, name)}: {purpose} the same one, or choose another "
                f"folder{detail}."
            )
