"""A cache of JSON files in the folder ``LARES_FAST_CACHE``: results of self-tests, and launch settings of GPUs."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

from lares_fast import _settings


def folder(kind: str) -> Path:
    """Return the folder of the files of one ``kind``."""
    return _settings.cache_folder() / kind


def read(kind: str, key: dict[str, Any]) -> dict[str, Any] | None:
    """Return the entry that was stored under ``key``, or ``None``.

    An entry is returned only if its file can be read, belongs to the current user and repeats every field of ``key``.
    """
    try:
        with _path(kind, key).open() as file:
            if os.fstat(file.fileno()).st_uid != os.geteuid():
                return None
            stored = json.load(file)
    # JSON that is nested too deeply raises RecursionError.
    except (OSError, ValueError, RecursionError):
        return None
    same = isinstance(stored, dict) and all(name in stored and stored[name] == value for name, value in key.items())
    return stored if same else None


def write(kind: str, key: dict[str, Any], entry: dict[str, Any]) -> None:
    """Atomically store ``entry`` under ``key``. Raises OSError if the file cannot be written."""
    path = _path(kind, key)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
        try:
            json.dump({**key, **entry}, file, indent=1)
            file.flush()
            os.replace(file.name, path)
        except BaseException:
            with suppress(OSError):
                os.unlink(file.name)
            raise


def _path(kind: str, key: dict[str, Any]) -> Path:
    name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:32]
    return folder(kind) / f"{name}.json"
