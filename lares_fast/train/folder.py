"""The folder of a run: its lock, and the files in it.

``state.pt`` is the newest state. The state before it is kept as ``state.previous.pt``, so that a damaged file costs one
checkpoint and not the run.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lares_fast._errors import InputError, with_path
from lares_fast._files import append_line, content, locked, remove_leftovers, write_text
from lares_fast._model_folder import write_model
from lares_fast._weights import Weights, load_weights_about, sha256, stored_digest, weights_digest
from lares_fast.config import ITEMS, MODEL, LARESConfig
from lares_fast.train.checkpoint import StateError, peek
from lares_fast.train.config_file import is_written, marked
from lares_fast.train.files import CONFIG, EVENTS, FILES, METRICS, NEWEST, OLDER
from lares_fast.train.ranking import rows_csv
from lares_fast.train.state import SavedRun, load_run, save_run
from lares_fast.train.steps_file import StepsFiles


class RunFolder:
    """The run folder ``path``, which may not exist yet."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.state_file, self.older_file = path / NEWEST, path / OLDER
        # Identifies the state file that this object found when it was made, or that it wrote last.
        self._stamp = self._current_stamp()
        # Whether state.pt is whole and may become the older state.
        self._whole = False
        # The digest of the last exported model.
        self._exported = ""
        self.steps = StepsFiles(path, {})

    def has_state(self) -> bool:
        """Return whether the folder held a state when this object was made, or this object has written one."""
        return self._stamp is not None

    def load(self) -> tuple[SavedRun, str | None]:
        """Return the newest state that is whole, and a sentence if this is the older one.

        Raises :class:`InputError`, which names both files, if neither is whole. A folder or a pipe in the place of state.pt is
        no damage, and raises the error too.
        """
        notice = None
        _require_no_other(self.state_file)
        try:
            saved = load_run(self.state_file)
            self._whole = True
        except StateError as newest:
            if not os.path.lexists(self.older_file):
                raise
            try:
                saved = load_run(self.older_file)
            except StateError as older:
                faults = f"{newest.fault}, and {self.older_file} {older.fault}"
                raise StateError(self.state_file, faults) from None
            notice = f"{self.state_file} {newest.fault}: the run continues from the checkpoint before it, {OLDER}."
        files = saved.files or {}
        self._exported = files.get("model", "")
        self.steps = StepsFiles(self.path, files.get("steps", {}))
        return saved, notice

    @contextmanager
    def holding(self, tell: Callable[[str], Any]) -> Iterator[None]:
        """Lock the folder while the block runs, and remove temporary files of runs that were killed.

        Raises :class:`InputError` if another run holds the lock, or has changed the state since this object was made, or if
        something else is in the place of a file.
        ``tell`` is used as in :func:`lares_fast._files.locked`.
        """
        with locked(self.path, tell):
            if self._current_stamp() != self._stamp:
                raise InputError(f"another run has changed {self.path} since this run read it: start again from the new state.")
            for name in FILES:
                _require_no_other(self.path / name)
            remove_leftovers(self.path, FILES)
            yield

    def write_config(self, text: str) -> None:
        """Write config.yaml with the settings ``text``.

        Raises :class:`InputError` if a new run would replace a file of the user.
        """
        path = self.path / CONFIG
        if not self.has_state() and os.path.lexists(path) and not is_written(path):
            raise InputError(f"{path} is not from a run: choose another folder for the run, or move this file away.")
        write_text(path, marked(text))

    def save(self, saved: SavedRun) -> None:
        """Write state.pt, and the table of results as metrics.csv. The former state.pt becomes the older state."""
        # A damaged file must not take the place of a whole one.
        save_run(self.state_file, saved, self.older_file if self._whole else None)
        self._whole, self._stamp = True, self._current_stamp()
        write_text(self.path / METRICS, rows_csv(saved.state.history))

    def checksums(self) -> dict[str, Any]:
        """Return the checksums of other files, which the state holds.

        ``model``
            The digest of the exported model, or an empty text.
        ``events, events_bytes``
            The SHA-256 of events.jsonl up to its present size, and this size. Later lines do not matter.
        ``steps``
            As in :meth:`StepsFiles.sizes`.
        """
        events = self._events()
        return {
            "model": self._exported,
            "events": sha256(events),
            "events_bytes": len(events),
            "steps": self.steps.sizes(),
        }

    def mend(self, saved: SavedRun) -> list[str]:
        """Write metrics.csv again if it does not belong to ``saved``, and return a sentence on each file that does not.

        The exported model is compared by :meth:`export`. Call this before anything is written after :meth:`load`.
        """
        texts = []
        table = rows_csv(saved.state.history)
        if content(self.path / METRICS) != table.encode():
            write_text(self.path / METRICS, table)
            texts.append(f"{self.path / METRICS} did not have the results of the state, so it was written again.")
        files = saved.files
        if files and sha256(self._events()[: files["events_bytes"]]) != files["events"]:
            texts.append(
                f"{self.path / EVENTS} is damaged or lacks lines that it had; it stays as it is, and new lines follow."
            )
        return [*texts, *self.steps.mend((files or {}).get("steps", {}))]

    def export(self, weights: Weights, config: LARESConfig, item_ids: list[Any], about: dict[str, str]) -> bool:
        """Write model.safetensors and item_ids.json for serving. Return ``False`` if both already had exactly this content."""
        text = json.dumps(item_ids)
        about = {**about, "item_ids": sha256(text.encode())}
        self._exported = weights_digest(weights, config, about)
        if self._is_exported() and sha256(content(self.path / ITEMS)) == about["item_ids"]:
            return False
        write_model(self.path, weights, config, item_ids, about)
        return True

    def _is_exported(self) -> bool:
        try:
            load_weights_about(self.path / MODEL)
        except InputError:
            return False
        return stored_digest(self.path / MODEL) == self._exported

    def add_event(self, record: dict[str, Any]) -> None:
        """Append ``record`` and the current time to events.jsonl."""
        append_line(self.path / EVENTS, json.dumps({"time": round(time.time(), 3), **record}))

    def _current_stamp(self) -> tuple[int, ...] | None:
        return _stamp(self.state_file) or _stamp(self.older_file)

    def _events(self) -> bytes:
        return content(self.path / EVENTS)


def foreign_model(folder: Path) -> str | None:
    """Return a sentence if model.safetensors in ``folder`` is not the model that the state there names, else ``None``.

    A state that is missing or cannot be read names no model.
    """
    files = peek(folder / NEWEST, "files")
    expected = files.get("model") if isinstance(files, dict) else None
    if not expected or stored_digest(folder / MODEL) == expected:
        return None
    return (
        f"{folder / MODEL} is not the best model that {NEWEST} names: it is older or newer, or of another run; "
        f"lares-fast train {with_path('--resume', folder)} writes it again."
    )


def _require_no_other(path: Path) -> None:
    """Raise :class:`InputError` if a folder, a pipe or a device has the name ``path``."""
    if os.path.exists(path) and not os.path.isfile(path):
        raise InputError(f"{path} is not a file: move it away, because a run writes a file of this name.")


def _stamp(path: Path) -> tuple[int, ...] | None:
    """Return values that change when another process replaces ``path``, or ``None`` if there is no file."""
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns
