"""Launch settings that ``lares-fast tune`` measured on this GPU. They are stored beside the results of self-tests.

A call uses stored settings only if they were stored for its exact sizes, GPU, driver and software, and if ``lares-fast tune``
may try them.
"""

from __future__ import annotations

import importlib
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import NoneType
from typing import Any

import torch
from torch import Tensor

from lares_fast.verify import cache, self_test

_CACHE = "launch_settings"

# The ops that ``lares-fast tune`` tunes, and their kernels in groups that share their launch settings. The catalog kernels are
# one group, because they must compute equal bits for a target's score.
KERNELS: dict[str, tuple[tuple[str, ...], ...]] = {
    "attention": (("attention_forward",), ("attention_backward_query",), ("attention_backward_key_value",)),
    "linear_cross_entropy": (("softmax_forward", "prepare_backward", "softmax_backward_hidden", "softmax_backward_items"),),
    "recurrence": (
        ("recurrence_forward",), ("step_backward",), ("weight_gradients",),
    ),
}  # fmt: skip
_WARPS, _STAGES = (1, 2, 4, 8), (1, 2, 3)

# Device -> the stored settings, by call.
_known: dict[torch.device, dict[str, Any]] = {}
# (op, choice) that replaces the stored settings. This is not a context variable, because a backward may run in another thread.
_forced: tuple[str, Any] | None = None


def rows(op: str, sizes: Mapping[str, int]) -> tuple[int, ...]:
    """Return the numbers of rows that a tile of ``op`` may have."""
    longest = sizes.get("longest", 64)
    if op == "recurrence":
        # A tile holds whole sequences.
        return tuple(n for n in (64, 128) if longest <= n)
    return tuple(n for n in (16, 32, 64) if n == 16 or longest > n // 2)


def launches(dtype: torch.dtype, capability: int) -> list[tuple[int, int]]:
    """Return the pairs (warps, stages) that may be tried."""
    # With four warps, Triton compiles half-precision products to tcgen05 on Blackwell, and some of that code is wrong.
    warps_allowed = _WARPS[:2] if 100 <= capability < 120 and dtype != torch.float32 else _WARPS
    return [(warps, stages) for warps in warps_allowed for stages in _STAGES]


def find(op: str, tensor: Tensor, sizes: Mapping[str, int]) -> Any:
    """Return the settings for a call, or ``None`` for the shipped ones."""
    if _forced is not None and _forced[0] == op:
        return _forced[1]
    known = of_device(tensor.device)
    stored = known.get(call_key(op, tensor.dtype, sizes)) if known else None
    return _choice(op, tensor, sizes, stored) if stored else None


def call_key(op: str, dtype: torch.dtype, sizes: Mapping[str, int]) -> str:
    """Return the key of a call, such as ``attention float32 longest=50 width=32``."""
    return " ".join([op, str(dtype).removeprefix("torch."), *(f"{name}={value}" for name, value in sorted(sizes.items()))])


@contextmanager
def forced(op: str, choice: Any) -> Iterator[None]:
    """Within the ``with`` block, launch the kernels of ``op`` with ``choice`` instead of the stored settings."""
    global _forced
    before, _forced = _forced, (op, choice)
    try:
        yield
    finally:
        _forced = before


def of_device(device: torch.device) -> dict[str, Any]:
    """Return all settings that are stored for ``device``, by call."""
    if device not in _known:
        _known[device] = _read(device) if cache.folder(_CACHE).is_dir() and _is_gpu(device) else {}
    return _known[device]


def store(device: torch.device, found: Mapping[str, Any]) -> None:
    """Store ``found`` (call -> settings as plain values) beside the settings of other calls.

    Raises the errors of :func:`lares_fast.verify.cache.write`.
    """
    calls = {**_read(device), **found}
    cache.write(_CACHE, self_test.identity(device), {"calls": calls})
    _known.clear()


def clear() -> bool:
    """Remove the stored settings of every GPU, and return whether there were any."""
    _known.clear()
    stored = cache.folder(_CACHE).is_dir()
    if stored:
        shutil.rmtree(cache.folder(_CACHE))
    return stored


def note(op: str, tensor: Tensor) -> str | None:
    """Return the text that ``explain`` adds to a backend that uses stored settings, or ``None``."""
    sizes = [key.partition(" ")[2] for key in of_device(tensor.device) if key.split()[0] == op]
    return f"with launch settings from lares-fast tune for {'; '.join(sizes)}" if sizes else None


def _read(device: torch.device) -> dict[str, Any]:
    stored = cache.read(_CACHE, self_test.identity(device)) or {}
    calls = stored.get("calls")
    if not isinstance(calls, dict):
        return {}
    return {call: how for call, how in calls.items() if call.partition(" ")[0] in KERNELS and call.isprintable()}


def _choice(op: str, tensor: Tensor, sizes: Mapping[str, int], stored: Any) -> Any:
    """Return ``stored`` as launch settings if this call may use them, else ``None``."""
    allowed = launches(tensor.dtype, capability(tensor.device))
    names = {name for group in KERNELS[op] for name in group}
    try:
        chosen_rows = stored["rows"]
        kernels = {name: tuple(how) for name, how in stored["kernels"].items()}
        # True and 2.0 equal integers, but a compiler must not get them.
        integers = all(type(number) is int for how in kernels.values() for number in how)
        integers &= type(chosen_rows) in (int, NoneType)
        valid = chosen_rows in (None, *rows(op, sizes)) and kernels.keys() <= names and set(kernels.values()) <= set(allowed)
    except (AttributeError, KeyError, TypeError):
        return None
    if not (integers and valid):
        return None
    return importlib.import_module("lares_fast.kernels._launch").Choice(chosen_rows, kernels)


def capability(device: torch.device) -> int:
    """Return the compute capability as an integer, such as 80 for 8.0."""
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def _is_gpu(device: torch.device) -> bool:
    return device.type == "cuda"
