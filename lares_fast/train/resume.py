"""What a run that goes on may change: settings are honoured and announced, or refused where what is saved depends on them."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path
from typing import Any

import torch

from lares_fast import _native, _settings
from lares_fast._errors import InputError
from lares_fast.train.config import RunConfig
from lares_fast.train.state import State

_FILTER = ("rpt.data_filter", "rpt.filter_top", "rpt.filter_passes")
_WATCHED = ("evaluation.noise_seed", "evaluation.watch_masked")


def settings_of(config: RunConfig) -> dict[str, Any]:
    """Every setting by its dotted name, except those of the identity: a model's are compared there, and the seed."""
    values = config.to_dict()
    del values["model"], values["seed"]
    return {
        name if section is None else f"{section}.{name}": value
        for section, names in ((key, val) if isinstance(val, dict) else (None, {key: val}) for key, val in values.items())
        for name, value in names.items()
    }


def changed_settings(state: State, config: RunConfig, run: Path) -> dict[str, tuple[Any, Any]]:
    """(old, new) of each setting in which ``config`` differs from the run that saved ``state``, ready to be announced.

    All of them hold from the next step on, but for those that what is saved depends on: they raise :class:`InputError`.
    """
    old, new = state["settings"], settings_of(config)
    changes = {name: (old[name], value) for name, value in new.items() if name in old and old[name] != value}
    for name, (before, now) in changes.items():
        if reason := _obstacle(name, state, changes, new):
            raise InputError(
                f"{name} cannot change from {before} to {now} when {run} goes on, because {reason}: "
                f"resume with {name}={before}, or begin a new run in another folder."
            )
    return changes


def _obstacle(name: str, state: State, changes: dict[str, tuple[Any, Any]], new: dict[str, Any]) -> str | None:
    phase = state["phase"]
    if name == f"{phase}.batch_size" and state["step"]:
        return f"{state['step']} batches of an epoch are done, and the rest would skip or repeat rows"
    if name in _WATCHED and state["best_value"] >= 0:
        return f"the best value of phase {phase} was found with it and could not be compared"
    filtered = new["rpt.data_filter"] or "rpt.data_filter" in changes
    if name in _FILTER and filtered and phase == "rpt" and (state["kept"] is not None or state["steps"]):
        return "phase rpt has chosen its training rows with it"
    return None


def environment() -> dict[str, Any]:
    """What the bits of a run depend on besides its settings: versions, threads, instruction set and backend."""
    try:
        version = importlib.metadata.version("lares_fast")
    except importlib.metadata.PackageNotFoundError:
        version = "unknown"
    return {
        "lares_fast": version,
        "torch": str(torch.__version__),
        "threads": torch.get_num_threads(),
        "simd": str(_native.build_info().get("simd", "none")),
        "backend": _settings.backend(),
    }


def news(state: State, config: RunConfig, run: Path) -> list[dict[str, Any]]:
    """What to tell about the run in the folder ``run`` that goes on from ``state``, as events of the trainer.

    Raises :class:`InputError` as :func:`changed_settings`.
    """
    if "settings" not in state:
        text = f"{run / 'state.pt'} is of an earlier version and holds no settings: whether some have changed is not checked."
        return [{"event": "notice", "text": text}]
    changes = {"setting": changed_settings(state, config, run), "environment": changed_environment(state)}
    return [
        {"event": "changed", "what": what, "name": name, "old": old, "new": new}
        for what, values in changes.items()
        for name, (old, new) in values.items()
    ]


def changed_environment(state: State) -> dict[str, tuple[Any, Any]]:
    """(old, new) of each entry of :func:`environment` that is not as it was."""
    old, new = state["environment"], environment()
    return {name: (old.get(name), value) for name, value in new.items() if old.get(name) != value}
