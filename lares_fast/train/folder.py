"""The folder of a run: who may write into it, and the files that it holds."""

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
from lares_fast.config import LARESConfig
from lares_fast.train.checkpoint import Weights, load_weights_about, same_form, save_state, save_weights, sha256
from lares_fast.train.files import append_line, locked, remove_leftovers, write_text
from lares_fast.train.metrics import rows_csv
from lares_fast.train.state import State, load_run

_FILES = ("state.pt", "metrics.csv", "model.safetensors", "item_ids.json", "config.yaml", "curves.png")


class RunFolder:
    """The folder ``path``, which need not be there yet."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.state_file = path / "state.pt"
        # The state that was there when this object was made, or that it wrote last.
        self._stamp = _stamp(self.state_file)

    def has_state(self) -> bool:
        """Whether the folder held a run when it was looked at last."""
        return self._stamp is not None

    def load(self) -> State:
        """The state in the folder; raises as :func:`lares_fast.train.state.load_run`."""
        return load_run(self.state_file)

    @contextmanager
    def holding(self, tell: Callable[[str], Any]) -> Iterator[None]:
        """Keep other runs out while the block runs, and clean up after those that were killed.

        Raises :class:`InputError` if another one holds the folder, or has changed its state since this object saw it.
        ``tell`` as in :func:`lares_fast.train.files.locked`.
        """
        with locked(self.path, tell):
            if _stamp(self.state_file) != self._stamp:
                raise InputError(f"{self.path} was changed by another run since this one read it: begin again from its state.")
            remove_leftovers(self.path, _FILES)
            yield

    def save(self, state: State) -> None:
        """Write ``state`` and the table of its results."""
        save_state(self.state_file, state)
        self._stamp = _stamp(self.state_file)
        write_text(self.path / "metrics.csv", rows_csv(state["history"]))

    def export(self, weights: Weights, config: LARESConfig, item_ids: list[Any], about: dict[str, str]) -> None:
        """Write what serving reads, unless it is there, whole and the same already."""
        text = json.dumps(item_ids)
        about = {**about, "item_ids": sha256(text.encode())}
        if self._exported(weights, config, about):
            return
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
        """Append ``record`` with its time to events.jsonl."""
        append_line(self.path / "events.jsonl", json.dumps({"time": round(time.time(), 3), **record}))


def _stamp(path: Path) -> tuple[int, ...] | None:
    """What changes when another process replaces ``path``; ``None`` if there is nothing."""
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns
