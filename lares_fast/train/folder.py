"""The folder of a run: its lock, and the files in it."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from lares_fast._errors import InputError
from lares_fast._files import append_line, locked, remove_leftovers, write_text
from lares_fast.config import LARESConfig
from lares_fast.train.checkpoint import Weights, load_weights_about, same_form, save_weights, sha256
from lares_fast.train.metrics import rows_csv
from lares_fast.train.state import SavedRun, load_run, save_run

_FILES = ("state.pt", "metrics.csv", "model.safetensors", "item_ids.json", "config.yaml", "curves.png")


class RunFolder:
    """The run folder ``path``, which may not exist yet."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.state_file = path / "state.pt"
        # Identifies the state file that this object found when it was made, or that it wrote last.
        self._stamp = _stamp(self.state_file)
        # Raises an error if the folder is locked and has been moved or removed.
        self._check: Callable[[], None] = lambda: None

    def has_state(self) -> bool:
        """Return whether the folder held a state when this object was made, or this object has written one."""
        return self._stamp is not None

    def load(self) -> SavedRun:
        """Return the content of state.pt. Raises the errors of :func:`lares_fast.train.state.load_run`."""
        return load_run(self.state_file)

    @contextmanager
    def holding(self, tell: Callable[[str], Any]) -> Iterator[None]:
        """Lock the folder while the block runs, and remove temporary files of runs that were killed.

        Raises :class:`InputError` if another run holds the lock, or has changed the state since this object was made.
        ``tell`` is used as in :func:`lares_fast._files.locked`.
        """
        with locked(self.path, tell) as self._check:
            if _stamp(self.state_file) != self._stamp:
                raise InputError(f"another run has changed {self.path} since this run read it: start again from the new state.")
            remove_leftovers(self.path, _FILES)
            yield

    def save(self, saved: SavedRun) -> None:
        """Write state.pt, and the table of results as metrics.csv."""
        self._check()
        save_run(self.state_file, saved)
        self._stamp = _stamp(self.state_file)
        write_text(self.path / "metrics.csv", rows_csv(saved.state.history))

    def export(self, weights: Weights, config: LARESConfig, item_ids: list[Any], about: dict[str, str]) -> None:
        """Write model.safetensors and item_ids.json for serving, unless both already have exactly this content."""
        text = json.dumps(item_ids)
        about = {**about, "item_ids": sha256(text.encode())}
        if self._exported(weights, config, about):
            return
        self._check()
        write_text(self.path / "item_ids.json", text)
        save_weights(self.path / "model.safetensors", weights, config, about)

    def _exported(self, weights: Weights, config: LARESConfig, about: dict[str, str]) -> bool:
        try:
            there, its_config, its_about = load_weights_about(self.path / "model.safetensors")
            item_ids = (self.path / "item_ids.json").read_bytes()
        except (InputError, OSError):
            return False
        same = same_form(there, weights) and all(torch.equal(there[name], value) for name, value in weights.items())
        return same and (its_config, its_about) == (config, about) and sha256(item_ids) == about["item_ids"]

    def add_event(self, record: dict[str, Any]) -> None:
        """Append ``record`` and the current time to events.jsonl."""
        self._check()
        append_line(self.path / "events.jsonl", json.dumps({"time": round(time.time(), 3), **record}))


def _stamp(path: Path) -> tuple[int, ...] | None:
    """Return values that change when another process replaces ``path``, or ``None`` if there is no file."""
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns
