"""Changed settings of a resumed run. A change is applied and announced, or raises an error if the saved state depends on it."""

from __future__ import annotations

import functools
import importlib.metadata
import platform
from pathlib import Path
from typing import Any

import torch

from lares_fast import _native, _settings
from lares_fast._errors import InputError
from lares_fast.train.config import PHASES, RunConfig
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
    # The settings of a phase that an earlier version did not know have default values that do what it did.
    earlier = {name: value for name, value in settings_of(RunConfig()).items() if name.startswith(PHASES)}
    old = {**earlier, **old}
    changes = {name: (old[name], value) for name, value in new.items() if name in old and old[name] != value}
    for name, (before, now) in changes.items():
        if reason := _obstacle(name, state, changes, new):
            raise InputError(
                f"{name} cannot change from {before} to {now} when {run} continues, because {reason}: "
                f"resume with {name}={before}, or begin a new run in another folder.",
                setting=f"{name}={before}",
            )
    return changes


def changed_data(old: dict[str, Any], config: RunConfig) -> dict[str, tuple[Any, Any]]:
    """Return (old value, new value) of each setting of the data that differs from ``old``, except the path."""
    new = settings_of(config)
    return {
        name: (old[name], value)
        for name, value in new.items()
        if name.startswith("data.") and name != "data.path" and name in old and old[name] != value
    }


def _obstacle(name: str, state: RunState, changes: dict[str, tuple[Any, Any]], new: dict[str, Any]) -> str | None:
    """Return why the setting ``name`` cannot change, or ``None`` if it can."""
    phase, progress = state.phase, state.progress
    if name in (f"{phase}.batch_size", f"{phase}.accumulate") and progress.step:
        return f"{progress.step} steps of an epoch are done, and the rest would skip or repeat rows"
    if name in _WATCHED and progress.best_value >= 0:
        return f"the best value of phase {phase} was found with it and could not be compared"
    filtered = new["rpt.data_filter"] or "rpt.data_filter" in changes
    if name in _FILTER and name.startswith(f"{phase}.") and filtered and (progress.kept is not None or progress.steps):
        return f"phase {phase} has chosen its training rows with it"
    return None


def environment(device: torch.device) -> dict[str, Any]:
    """Return what can change a bit of a result on ``device``: versions, threads, instruction sets, device and so on."""
    native = _native.build_info()
    on_gpu = device.type == "cuda"
    precision: Any = torch.backends.cuda if on_gpu else torch.backends.mkldnn
    return {
        "lares_fast": _version("lares_fast"),
        "torch": str(torch.__version__),
        "numpy": _version("numpy"),
        "threads": torch.get_num_threads(),
        "simd": str(native.get("simd", "none")),
        "compiler": f"{native.get('compiler', 'none')} {native.get('flags', '')}".strip(),
        "torch_simd": torch.backends.cpu.get_cpu_capability(),
        "cpu": _cpu(),
        "strict": _settings.strict(),
        # torch.get_float32_matmul_precision raises an error if a program has set the new names.
        "fp32_precision": str(precision.matmul.fp32_precision).replace("none", "ieee"),
        "backend": _settings.backend(),
        "device": torch.cuda.get_device_name(device) if on_gpu else device.type,
        **({"triton": _version("triton"), "cuda_products": _settings.cuda_products()} if on_gpu else {}),
        **_settings.of_libraries(),
    }


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


@functools.cache
def _cpu() -> str:
    """Return the name of the CPU's model, or of its architecture where Linux does not tell the model."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


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
    """Return (old value, new value) of each entry of :func:`environment` that differs from ``old``.

    The state of an earlier version lacks some entries. They are not compared.
    """
    # An earlier version trained on the CPU only.
    old = {"device": "cpu", **old}
    return {name: (old[name], value) for name, value in environment(device).items() if name in old and old[name] != value}
