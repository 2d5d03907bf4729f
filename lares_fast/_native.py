"""Load the native module ``lares_fast._C`` on first use, and describe it."""

from __future__ import annotations

import functools
import importlib
import json
from pathlib import Path
from types import ModuleType
from typing import Any

from lares_fast import _settings
from lares_fast._errors import InputError, NotBuiltError

# This must equal ABI in csrc/bindings.cpp. Python passes addresses to the module, so it must not call a module that was built
# from other sources.
ABI = 11

_REMEDY = "run pip install . in the source folder"


@functools.cache
def _attempt() -> tuple[ModuleType | None, str]:
    """Return the module, or ``None`` and why it cannot be loaded, as a clause without a full stop."""
    if _settings.strict():
        _settings.check_strict(importlib.import_module("torch").backends.cpu.get_cpu_capability())
    try:
        module = importlib.import_module("lares_fast._C")
    # A foreign or damaged file may raise any error. The package must work without it.
    except Exception as error:
        return None, _why_missing(error)
    if getattr(module, "ABI", None) != ABI:
        return None, f"the native module {module.__file__} was built from other sources: {_REMEDY} again"
    simd = _settings.simd()
    try:
        module.use_level(name=simd)
    except ValueError as error:
        raise InputError(f"LARES_FAST_SIMD: {error}.") from None
    return module, ""


def _why_missing(error: Exception) -> str:
    folder = Path(__file__).parent
    files = sorted(folder.glob("_C.*"))
    if not isinstance(error, ModuleNotFoundError) and files:
        return f"the native module {files[0]} does not load ({error}): {_REMEDY} again"
    if files:
        return f"the native module {files[0]} is for another Python or platform: {_REMEDY} with this Python"
    try:
        note = json.loads((folder / "_build.json").read_text())
        reason = str(note["reason"])
    except (OSError, ValueError, KeyError, TypeError):
        return f"the native module is not built, because the package was not installed: {_REMEDY}"
    if not reason:
        return f"the native module was built, but its file is no longer in {folder}: {_REMEDY} again"
    remedy = f": {_REMEDY} without LARES_FAST_BUILD" if "LARES_FAST_BUILD" in reason else ""
    return f"the native module is not built ({reason}){remedy}"


def load() -> ModuleType:
    """Return the native module. Raises :class:`NotBuiltError`, which says why it is missing and how to build it."""
    module, reason = _attempt()
    if module is None:
        raise NotBuiltError(reason[0].upper() + reason[1:] + ".")
    return module


def available() -> tuple[bool, str]:
    """Return whether the native module can be called, and if not, the reason as a clause."""
    module, reason = _attempt()
    return module is not None, reason


def build_info() -> dict[str, Any]:
    """Describe the native module of this installation. The driver of the GPU is not queried.

    The keys ``native`` (bool), ``reason`` (why there is no module, else empty), ``cuda_built`` (bool) and ``cuda_reason`` are
    always there. A module adds keys for its file, SIMD level, bf16 products (bool), version, compiler, flags, build type, CPU
    architecture, CUDA architectures and nvcc version.

    Raises :class:`InputError` only if ``LARES_FAST_SIMD`` or ``LARES_FAST_STRICT`` is not valid, or if a variable is missing
    that the latter needs.
    """
    module, reason = _attempt()
    if module is None:
        return {"native": False, "reason": reason, "cuda_built": False, "cuda_reason": "there is no native module"}
    level = {"simd": module.level(), "bf16": module.has_bf16()}
    return {"native": True, "reason": "", "file": str(module.__file__), **level, **module.build_info()}


def capability(device: int = -1) -> str:
    """Return the driver's answer whether the CUDA code can run on ``device``: ``ok: ...``, or the reason why it cannot.

    -1 is the current device.
    """
    module, reason = _attempt()
    return str(module.capability(device=device)) if module is not None else reason
