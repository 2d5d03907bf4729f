"""What was found out about this GPU and is kept for other processes: JSON files in the folder ``LARES_FAST_CACHE``."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from pathlib import Path
from typing import Any

from lares_fast import _settings


def folder(kind: str) -> Path:
    """Where the files of ``kind`` are."""
    return _settings.cache_folder() / kind


def name_of(about: dict[str, Any]) -> str:
    """A name for what is known about ``about``."""
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:32]


def read(kind: str, name: str) -> dict[str, Any] | None:
    """What was written, or ``None`` if nothing whole is there."""
    try:
        stored = json.loads((folder(kind) / f"{name}.json").read_text())
    except (OSError, ValueError):
        return None
    return stored if isinstance(stored, dict) else None


def write(kind: str, name: str, value: dict[str, Any]) -> None:
    """Whole or not at all; raises OSError where it cannot be kept."""
    folder(kind).mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=folder(kind), delete=False) as file:
        json.dump(value, file, indent=1)
    os.replace(file.name, folder(kind) / f"{name}.json")
