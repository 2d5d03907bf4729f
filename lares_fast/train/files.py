"""The names of the files of a run."""

from __future__ import annotations

from pathlib import Path

NEWEST, OLDER = "state.pt", "state.previous.pt"
METRICS, EVENTS, MODEL, ITEMS = "metrics.csv", "events.jsonl", "model.safetensors", "item_ids.json"
CONFIG = "config.yaml"

# The names of all files that a run writes.
FILES = (NEWEST, OLDER, METRICS, EVENTS, MODEL, ITEMS, CONFIG, "curves.png")


def holds_run(folder: Path) -> bool:
    """Return whether ``folder`` has a file with a state, which may be damaged."""
    return any((folder / name).is_file() for name in (NEWEST, OLDER))
