"""The state of a run, and how it is saved in ``state.pt`` and loaded from it."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, get_args, get_origin, get_type_hints

from torch import Tensor

from lares_fast._weights import Weights
from lares_fast.train.checkpoint import StateError, load_state, save_state
from lares_fast.train.config import PHASES, PhaseConfig, needs_start


@dataclass(kw_only=True)
class Progress:
    """The progress of the current phase. A new phase begins with the default values.

    ``epoch, step, steps``
        Finished epochs, finished steps of the current epoch, and finished steps of the phase.
    ``sums``
        The sum of the loss, and of each of its parts, over the finished steps of the current epoch.
    ``seconds, waited``
        Seconds that the current epoch has taken so far, and how many of them went into preparing batches.
    ``best_value, best_epoch, best``
        The best value of the watched metric so far (-1 before the first validation), its epoch and the weights that
        reached it. Before the first validation, ``best`` holds the weights that the run started from, if any.
    ``bad_epochs``
        Epochs since the last improvement.
    ``kept``
        The training rows that the filter of phase ``rpt`` has kept: ``users`` and ``ends`` as in
        :class:`lares_fast.data.Rows`, or ``None`` before the filter has run.
    """

    epoch: int = 0
    step: int = 0
    steps: int = 0
    sums: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0
    waited: float = 0.0
    best_value: float = -1.0
    best_epoch: int = 0
    bad_epochs: int = 0
    best: Weights | None = None
    kept: dict[str, Tensor] | None = None

    def is_over(self, settings: PhaseConfig) -> bool:
        """Return whether the phase has reached its last epoch or step, or has stopped improving."""
        out_of_steps = settings.max_steps is not None and self.steps >= settings.max_steps
        return self.bad_epochs > settings.patience or self.epoch >= settings.epochs or out_of_steps

    def add_step(self, parts: dict[str, float]) -> None:
        """Count one step, whose loss and parts of the loss are ``parts``."""
        self.sums = {name: self.sums.get(name, 0.0) + value for name, value in parts.items()}
        self.step += 1
        self.steps += 1

    def end_epoch(self) -> None:
        """Count the epoch and begin the next one."""
        self.epoch += 1
        self.step, self.sums, self.seconds, self.waited = 0, {}, 0.0, 0.0

    def means(self) -> dict[str, float]:
        """Return the mean of the loss, and of each of its parts, over the finished steps of the current epoch."""
        return {name: value / self.step for name, value in self.sums.items()}

    def data_wait(self) -> float:
        """Return the share of the epoch's time that went into preparing batches."""
        return self.waited / (self.seconds or 1.0)


@dataclass(kw_only=True)
class RunState:
    """The state of a run.

    ``identity``
        The model, seed, data and split of the run: see :mod:`lares_fast.train.identity`.
    ``phase, progress``
        The current phase and how far it has come.
    ``restarts``
        The number of earlier runs in a chain of runs, each of which started from the model of the run before it.
    ``history``
        The rows of metrics.csv.
    """

    identity: dict[str, Any]
    phase: str = PHASES[0]
    restarts: int = 0
    history: list[dict[str, Any]] = field(default_factory=list)
    progress: Progress = field(default_factory=Progress)


@dataclass(frozen=True, kw_only=True)
class SavedRun:
    """The content of ``state.pt``.

    ``state``
        The phase of the run, its progress and its results so far.
    ``optimizer``
        The ``state_dict`` of Adam, or ``None`` before the training of the phase has begun.
    ``model, start``
        The weights of the model, and of the frozen model that phase ``rpt`` started from (``None`` in phase ``spt``).
    ``settings, environment``
        The settings and the software that the run had: see :mod:`lares_fast.train.resume`. ``None`` in a file of an
        earlier version.
    ``files``
        The checksums of other files in the folder: see :meth:`lares_fast.train.folder.RunFolder.checksums`. ``None`` in a
        file of an earlier version.
    """

    state: RunState
    optimizer: dict[str, Any] | None
    model: Weights
    start: Weights | None
    settings: dict[str, Any] | None
    environment: dict[str, Any] | None
    files: dict[str, Any] | None


# In the file, the fields of the three classes are entries of one dictionary.
_NESTED = ("state", "progress")
_HINTS: dict[str, Any] = {
    name: hint for kind in (RunState, Progress, SavedRun) for name, hint in get_type_hints(kind).items() if name not in _NESTED
}
# Files of an earlier version lack these entries.
_NEWER = ("restarts", "seconds", "waited", "settings", "environment", "files")


def save_run(path: Path, saved: SavedRun, older: Path | None = None) -> None:
    """Write ``saved`` to ``path`` atomically, and keep the former file under the name ``older``."""
    state = saved.state
    rest = {name: value for name, value in vars(saved).items() if name not in _NESTED}
    outer = {name: value for name, value in vars(state).items() if name not in _NESTED}
    save_state(path, {**outer, **vars(state.progress), **rest}, older)


def load_run(path: Path) -> SavedRun:
    """Read the file that :func:`save_run` wrote.

    Raises :class:`StateError` if the file is missing or damaged, lacks an entry or has a wrong one. No entry is replaced
    by a default value, except the entries that files of an earlier version lack.
    """
    values = load_state(path)
    if fault := _fault(values):
        raise StateError(path, f"is not a usable state of a run ({fault})")
    state = RunState(**_fields_of(RunState, values), progress=Progress(**_fields_of(Progress, values)))
    return SavedRun(state=state, **{"settings": None, "environment": None, "files": None, **_fields_of(SavedRun, values)})


def _fields_of(kind: type, values: dict[str, Any]) -> dict[str, Any]:
    """Return the ``values`` that are fields of the dataclass ``kind``."""
    return {each.name: values[each.name] for each in fields(kind) if each.name in values}


def _fault(values: dict[str, Any]) -> str | None:
    """Return what is wrong with the content of a file, or ``None``."""
    return _wrong_type(values) or _wrong_value(values) or _wrong_structure(values)


def _wrong_type(values: dict[str, Any]) -> str | None:
    # A file with settings must have the newer entries before it too. The others may be missing in any file.
    optional = ("seconds", "waited", "files") if "settings" in values else _NEWER
    for name, hint in _HINTS.items():
        if name not in values:
            if name in optional:
                continue
            return f"it lacks {name!r}"
        # A file never holds None where an earlier version had no entry.
        kinds = _kinds(hint, none=name not in _NEWER)
        if not isinstance(values[name], kinds) or isinstance(values[name], bool):
            return f"{name!r} is a {type(values[name]).__name__}"
    return None


def _kinds(hint: Any, *, none: bool) -> tuple[type, ...]:
    """Return the classes that a type hint allows; ``none`` tells whether ``None`` may be one of them."""
    parts = get_args(hint) if isinstance(hint, UnionType) else (hint,)
    kinds = tuple(get_origin(part) or part for part in parts if none or part is not NoneType)
    return (*kinds, int) if float in kinds else kinds


def _wrong_value(values: dict[str, Any]) -> str | None:
    for name in ("epoch", "step", "steps", "best_epoch", "bad_epochs", "restarts"):
        if values.get(name, 0) < 0:
            return f"{name!r} is {values[name]}"
    if values["phase"] not in PHASES:
        return f"'phase' is {values['phase']!r:.40}"
    if needs_start(values["phase"]) and not values["start"]:
        return f"'start' is empty in phase {values['phase']}"
    numbers = [values["best_value"], *values["sums"].values(), values.get("seconds", 0.0), values.get("waited", 0.0)]
    if not all(isinstance(value, int | float) and math.isfinite(value) for value in numbers):
        return "its running sums are not finite numbers"
    return None


def _wrong_structure(values: dict[str, Any]) -> str | None:
    for name in ("model", "start", "best"):
        if not _all_are((values[name] or {}).values(), Tensor):
            return f"{name!r} holds something other than tensors"
    if not all(isinstance(row, dict) and {"phase", "split", "history"} <= row.keys() for row in values["history"]):
        return "'history' is not a table of results"
    optimizer, kept, identity, files = values["optimizer"], values["kept"], values["identity"], values.get("files")
    if optimizer is not None and not (isinstance(optimizer.get("state"), dict) and _all_are(optimizer["state"].values(), dict)):
        return "'optimizer' is not the state of an optimizer"
    if kept is not None and not (
        kept.keys() == {"users", "ends"}
        and all(isinstance(value, Tensor) and value.dim() == 1 for value in kept.values())
        and len(kept["users"]) == len(kept["ends"])
    ):
        return "'kept' is not a list of rows"
    if not all(isinstance(identity.get(name), kind) for name, kind in _IDENTITY.items()):
        return "'identity' does not describe the run"
    if files is not None and not (
        all(isinstance(files.get(name), kind) for name, kind in _FILES.items()) and _are_sizes(files.get("steps", {}))
    ):
        return "'files' does not describe the other files"
    return None


# The entries of ``identity`` that every version has written.
_IDENTITY: dict[str, type] = {"model": dict, "seed": int, "data": str, "split": str}
# The entries of ``files``.
_FILES: dict[str, type] = {"model": str, "events": str, "events_bytes": int}


def _are_sizes(value: Any) -> bool:
    """Return whether ``value`` has a size and a digest for some of the phases."""
    return isinstance(value, dict) and all(
        phase in PHASES and isinstance(entry, list) and [type(part) for part in entry] == [int, str] and entry[0] >= 0
        for phase, entry in value.items()
    )


def _all_are(values: Iterable[Any], kind: type) -> bool:
    return all(isinstance(value, kind) for value in values)
