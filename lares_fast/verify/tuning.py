"""Launch configurations that ``lares-fast tune`` measured on this GPU, kept beside the canaries' verdicts by the same identity.

They are used only where one for a call's very sizes is there and is one that may be tried.
"""

from __future__ import annotations

import importlib
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from lares_fast.verify import cache, self_test

# Of each op the kernels that are launched alike: those of the catalog must score a target with the same bits.
KERNELS: dict[str, tuple[tuple[str, ...], ...]] = {
    "attention": (("attention_forward",), ("attention_backward_query",), ("attention_backward_key_value",)),
    "linear_cross_entropy": (("target_score", "softmax_forward", "softmax_backward_hidden", "softmax_backward_items"),),
    "recurrence": (
        ("recurrence_forward",), ("attention_half_backward",), ("feed_half_backward",), ("input_gradient",),
        ("join_backward",), ("weight_gradient",),
    ),
}  # fmt: skip
_WARPS, _STAGES = (1, 2, 4, 8), (1, 2, 3)

# Device -> what is stored for it, by call.
_known: dict[torch.device, dict[str, Any]] = {}
# (op, choice) that goes before what is stored. Not a context variable: a backward may run in a thread of its own.
_forced: tuple[str, Any] | None = None


def rows(op: str, sizes: Mapping[str, int]) -> tuple[int, ...]:
    """Rows that a tile of ``op`` may have."""
    longest = sizes.get("longest", 64)
    if op == "recurrence":
        # A tile holds whole sequences.
        return tuple(n for n in (64, 128) if longest <= n)
    return tuple(n for n in (16, 32, 64) if n == 16 or longest > n // 2)


def launches(dtype: torch.dtype, capability: int) -> list[tuple[int, int]]:
    """(warps, stages) that may be tried."""
    # With four, products of half precision are tcgen05 on Blackwell, which Triton compiled wrongly in places.
    sound = _WARPS[:2] if 100 <= capability < 120 and dtype != torch.float32 else _WARPS
    return [(warps, stages) for warps in sound for stages in _STAGES]


def find(op: str, tensor: Tensor, sizes: Mapping[str, int]) -> Any:
    """The choice for a call, or ``None`` to launch as shipped."""
    if _forced is not None and _forced[0] == op:
        return _forced[1]
    known = of_device(tensor.device)
    stored = known.get(call_key(op, tensor.dtype, sizes)) if known else None
    return _choice(op, tensor, sizes, stored) if stored else None


def call_key(op: str, dtype: torch.dtype, sizes: Mapping[str, int]) -> str:
    """The name of a call."""
    return " ".join([op, str(dtype).removeprefix("torch."), *(f"{name}={value}" for name, value in sorted(sizes.items()))])


@contextmanager
def forced(op: str, choice: Any) -> Iterator[None]:
    """Launch the kernels of ``op`` as ``choice`` says, whatever is stored."""
    global _forced
    before, _forced = _forced, (op, choice)
    try:
        yield
    finally:
        _forced = before


def of_device(device: torch.device) -> dict[str, Any]:
    """All that is stored for ``device``, by call."""
    if device not in _known:
        _known[device] = _read(device) if cache.folder("tuned").is_dir() and _is_gpu(device) else {}
    return _known[device]


def keep(device: torch.device, found: Mapping[str, Any]) -> None:
    """Store ``found`` (call -> choice as plain values) beside what is there. Raises OSError."""
    about = self_test.identity(device)
    calls = {**_read(device), **found}
    cache.write("tuned", about, {"calls": calls})
    _known.clear()


def clear() -> bool:
    """Remove what is stored for every GPU; whether anything was."""
    _known.clear()
    there = cache.folder("tuned").is_dir()
    if there:
        shutil.rmtree(cache.folder("tuned"))
    return there


def note(op: str, tensor: Tensor) -> str | None:
    """What ``explain`` says beside a backend that uses stored choices, or ``None``."""
    sizes = [key.partition(" ")[2] for key in of_device(tensor.device) if key.split()[0] == op]
    return f"launched as lares-fast tune found best for {'; '.join(sizes)}" if sizes else None


def _read(device: torch.device) -> dict[str, Any]:
    stored = cache.read("tuned", self_test.identity(device)) or {}
    calls = stored.get("calls")
    return calls if isinstance(calls, dict) else {}


def _choice(op: str, tensor: Tensor, sizes: Mapping[str, int], stored: Any) -> Any:
    """``stored`` if it may be tried for this call, else ``None``."""
    allowed = launches(tensor.dtype, capability(tensor.device))
    names = {name for group in KERNELS[op] for name in group}
    try:
        chosen_rows = stored["rows"]
        kernels = {name: tuple(how) for name, how in stored["kernels"].items()}
        valid = chosen_rows in (None, *rows(op, sizes)) and kernels.keys() <= names and set(kernels.values()) <= set(allowed)
    except (AttributeError, KeyError, TypeError):
        return None
    if not valid:
        return None
    return importlib.import_module("lares_fast.kernels._launch").Choice(chosen_rows, kernels)


def capability(device: torch.device) -> int:
    """80 for 8.0."""
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def _is_gpu(device: torch.device) -> bool:
    return device.type == "cuda"
