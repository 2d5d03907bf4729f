"""What was found out about this GPU and is kept for other processes: JSON files in the folder ``LARES_FAST_CACHE``."""

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
    """Where the files of ``kind`` are."""
    return _settings.cache_folder() / kind


def read(kind: str, about: dict[str, Any]) -> dict[str, Any] | None:
    """What this user wrote about ``about``, or ``None`` if nothing whole is there, or another user's file or subject."""
    try:
        with _path(kind, about).open() as file:
            if os.fstat(file.fileno()).st_uid != os.geteuid():
                return None
            stored = json.load(file)
    # Lists in lists without end are a RecursionError.
    except (OSError, ValueError, RecursionError):
        return None
    same = isinstance(stored, dict) and all(name in stored and stored[name] == value for name, value in about.items())
    return stored if same else None


def write(kind: str, about: dict[str, Any], found: dict[str, Any]) -> None:
    """Keep ``found``, whole or not at all; raises OSError where it cannot be kept."""
    path = _path(kind, about)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
        try:
            json.dump({**about, **found}, file, indent=1)
            file.flush()
            os.replace(file.name, path)
        except BaseException:
            with suppress(OSError):
                os.unlink(file.name)
            raise


def _path(kind: str, about: dict[str, Any]) -> Path:
    """The file of ``kind`` for what is known about ``about``."""
    name = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:32]
    return folder(kind) / f"{name}.json"
