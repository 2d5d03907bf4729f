"""Load the native module ``lares_fast._C`` on first use, and report what it is."""

from __future__ import annotations

import functools
import importlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from lares_fast import _settings
from lares_fast._errors import InputError, NotBuiltError
from lares_fast._random import Key

# Equal to ABI in csrc/bindings.cpp. Python passes addresses to the module, so a module of other sources must not be called.
ABI = 10

_REMEDY = "run pip install . in the sources' folder"


@functools.cache
def _attempt() -> tuple[ModuleType | None, str]:
    """Return the module, or ``None`` and why it cannot be loaded, as a clause without a full stop."""
    try:
        module = importlib.import_module("lares_fast._C")
    except Exception as error:  # A foreign or damaged file may raise anything, and must not stop the pure-Python package.
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
        return f"the native module is not built, because these are bare sources: {_REMEDY}"
    if not reason:
        return f"the native module was built, but its file is no longer in {folder}: {_REMEDY} again"
    remedy = f": {_REMEDY} without LARES_FAST_BUILD" if "LARES_FAST_BUILD" in reason else ""
    return f"the native module is not built ({reason}){remedy}"


def load() -> ModuleType:
    """Return the native module; :class:`NotBuiltError` says why it is missing and how to build it."""
    module, reason = _attempt()
    if module is None:
        raise NotBuiltError(reason[0].upper() + reason[1:] + ".")
    return module


def available() -> tuple[bool, str]:
    """Return whether the native module can be called, and if not, why."""
    module, reason = _attempt()
    return module is not None, reason


def build_info() -> dict[str, Any]:
    """Describe the native module of this installation. Never raises, and never queries the driver.

    ``native`` (bool) and ``reason`` (why there is no module, else empty) are always there, and so are ``cuda_built`` and
    ``cuda_reason``. If there is a module, its file, SIMD level, bf16 products (bool), version, compiler, flags, build type, CPU
    architecture, CUDA architectures and nvcc version are there too.
    """
    module, reason = _attempt()
    if module is None:
        return {"native": False, "reason": reason, "cuda_built": False, "cuda_reason": "there is no native module"}
    level = {"simd": module.level(), "bf16": module.has_bf16()}
    return {"native": True, "reason": "", "file": str(module.__file__), **level, **module.build_info()}


def capability(device: int = -1) -> str:
    """Query the driver whether the CUDA code can run on ``device`` (-1 is the current device): ``ok: ...``, or why not."""
    module, reason = _attempt()
    return str(module.capability(device=device)) if module is not None else reason


@dataclass(frozen=True)
class RecurrenceCall:
    """The arguments of :func:`lares_fast.ops.recurrence` as the native code takes them, checked; fp32 on the CPU."""

    h: Tensor
    pre: Tensor | None
    offsets: Tensor
    depth: Tensor
    weights: Sequence[Tensor]
    rows: Tensor | None
    key: Key
    thresholds: tuple[int, int]
    n_heads: int
    inner_size: int
    n_layers: int
    adapter: int
    output: int
    eps: float
    bf16: bool

    def arguments(self, tape: Tensor | None) -> tuple[object, ...]:
        """What both native functions begin with. The tensors must outlive the call: only their addresses cross."""
        width = self.h.shape[1]
        batch = len(self.depth)
        sizes = (width, self.n_heads, self.inner_size, self.n_layers, self.adapter, self.output, batch, self.bf16)
        dropout = (*self.key, *self.thresholds, 0 if self.pre is None else 1)
        tensors = (self.h, self.pre, self.offsets, self.depth, self.rows, tape)
        inputs = [0 if tensor is None else tensor.data_ptr() for tensor in tensors]
        return sizes, dropout, self.eps, inputs, [weight.data_ptr() for weight in self.weights]


def recurrence_forward(call: RecurrenceCall, out: Tensor, tape: Tensor | None, *, threads: int | None = None) -> None:
    """Fill ``out`` and, unless it is None, the ``tape`` that the backward reads; the same bits for every ``threads``."""
    _call(load().recurrence_forward, *call.arguments(tape), out.data_ptr(), _threads(threads))


def recurrence_backward(
    call: RecurrenceCall, out_grad: Tensor, tape: Tensor, *, threads: int | None = None
) -> tuple[Tensor, Tensor | None, list[Tensor]]:
    """Gradients of ``h``, ``pre`` and the weights; the same bits for every ``threads``."""
    h_grad = torch.empty_like(call.h)
    pre_grad = None if call.pre is None else torch.empty_like(call.pre)
    weight_grads = [torch.empty_like(weight) for weight in call.weights]
    addresses = (out_grad.data_ptr(), h_grad.data_ptr(), 0 if pre_grad is None else pre_grad.data_ptr())
    _call(
        load().recurrence_backward,
        *call.arguments(tape),
        *addresses,
        [grad.data_ptr() for grad in weight_grads],
        _threads(threads),
    )
    return h_grad, pre_grad, weight_grads


def _threads(threads: int | None) -> int:
    threads = torch.get_num_threads() if threads is None else threads
    if threads < 1:
        raise InputError(f"threads must be at least 1, but got {threads}.")
    return threads


def _call(function: Callable[..., None], *arguments: object) -> None:
    try:
        function(*arguments)
    except (ValueError, TypeError) as error:
        sentence = str(error).partition("\n")[0]
        raise InputError(f"{function.__name__}: {sentence}.") from error
