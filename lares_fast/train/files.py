"""The names of the files of a run."""

from __future__ import annotations

from pathlib import Path

from lares_fast.config import ITEMS, MODEL
from lares_fast.train.config import PHASES

NEWEST, OLDER = "state.pt", "state.previous.pt"
METRICS, EVENTS = "metrics.csv", "events.jsonl"
CONFIG = "config.yaml"
# The pictures of a run, and the page with its results.
SHEET, REPORT = "results.svg", "report.html"


def steps_file(phase: str) -> str:
    """Return the name of the file with the values of every step of ``phase``."""
    return f"steps-{phase}.csv"


# The names of all files that a run writes.
FILES = (NEWEST, OLDER, METRICS, EVENTS, MODEL, ITEMS, *map(steps_file, PHASES), CONFIG, SHEET, REPORT)


def holds_run(folder: Path) -> bool:
    """Return whether ``folder`` has a file with a state, which may be damaged."""
    return any((folder / name).is_file() for name in (NEWEST, OLDER))
