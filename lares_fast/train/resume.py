"""Changed settings of a resumed run. A change is applied and announced, or raises an error if the saved state depends on it."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path
from typing import Any

import torch

from lares_fast import _native, _settings
from lares_fast._errors import InputError
from lares_fast.train.config import RunConfig
from lares_fast.train.state import RunState, SavedRun

_FILTER = ("rpt.data_filter", "rpt.filter_top", "rpt.filter_passes")
_WATCHED = ("evaluation.noise_seed", "evaluation.watch_masked")


def settings_of(config: RunConfig) -> dict[str, Any]:
    """Return every setting by its dotted name, except the seed and the model's settings, which are part of the identity."""
    values = config.to_dict()
    del values["model"], values["seed"]
    return {
        name if section is None else f"{section}.{name}": value
        for section, names in ((key, val) if isinstance(val, dict) else (None, {key: val}) for key, val in values.items())
        for name, value in names.items()
    }


def changed_settings(old: dict[str, Any], state: RunState, config: RunConfig, run: Path) -> dict[str, tuple[Any, Any]]:
    """Return (old value, new value) of each setting whose value in ``config`` differs from its value in ``old``.

    The new values hold from the next step on. Raises :class:`InputError` if ``state`` depends on a setting that has changed.
    """
    new = settings_of(config)
    changes = {name: (old[name], value) for name, value in new.items() if name in old and old[name] != value}
    for name, (before, now) in changes.items():
        if reason := _obstacle(name, state, changes, new):
            raise InputError(
                f"{name} cannot change from {before} to {now} when {run} continues, because {reason}: "
                f"resume with {name}={before}, or begin a new run in another folder.",
                setting=f"{name}={before}",
            )
    return changes


def _obstacle(name: str, state: RunState, changes: dict[str, tuple[Any, Any]], new: dict[str, Any]) -> str | None:
    """Return why the setting ``name`` cannot change, or ``None`` if it can."""
    phase, progress = state.phase, state.progress
    if name == f"{phase}.batch_size" and progress.step:
        return f"{progress.step} batches of an epoch are done, and the rest would skip or repeat rows"
    if name in _WATCHED and progress.best_value >= 0:
        return f"the best value of phase {phase} was found with it and could not be compared"
    filtered = new["rpt.data_filter"] or "rpt.data_filter" in changes
    if name in _FILTER and name.startswith(f"{phase}.") and filtered and (progress.kept is not None or progress.steps):
        return f"phase {phase} has chosen its training rows with it"
    return None


def environment(device: torch.device) -> dict[str, Any]:
    """Return what can change a bit of a result on ``device``: versions, threads, instruction set, backend, device."""
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
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
    }


def resume_events(saved: SavedRun, config: RunConfig, device: torch.device, run: Path) -> list[dict[str, Any]]:
    """Return the events that announce what has changed since the run in the folder ``run`` was ``saved``.

    Raises :class:`InputError` as :func:`changed_settings`.
    """
    if saved.settings is None or saved.environment is None:
        text = f"{run / 'state.pt'} is of an earlier version and holds no settings, so changed settings are not detected."
        return [{"event": "notice", "text": text}]
    changes = {
        "setting": changed_settings(saved.settings, saved.state, config, run),
        "environment": changed_environment(saved.environment, device),
    }
    return [
        {"event": "changed", "what": what, "name": name, "old": old, "new": new}
        for what, values in changes.items()
        for name, (old, new) in values.items()
    ]


def changed_environment(old: dict[str, Any], device: torch.device) -> dict[str, tuple[Any, Any]]:
    """Return (old value, new value) of each entry of :func:`environment` that differs from ``old``."""
    # An earlier version trained on the CPU only.
    old = {"device": "cpu", **old}
    return {name: (old.get(name), value) for name, value in environment(device).items() if old.get(name) != value}
