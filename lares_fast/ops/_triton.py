"""Load Triton kernels on first use, and say why a kernel cannot run a call.

:mod:`lares_fast.verify` tests each kernel before its first use on a GPU and finds tuned launch settings. It calls the ops, so
the ops must not import it. The ops know only its name, and load it when they need the first kernel.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

VERIFIER = "lares_fast.verify"

DTYPES = (torch.float32, torch.float16, torch.bfloat16)

# This is not a context variable, because a backward may run in another thread.
_anywhere = False


def kernels(stem: str) -> ModuleType:
    """Return the module with the kernels of op ``stem``."""
    _use_tuned_settings()
    return importlib.import_module(f"lares_fast.kernels.{stem}")


@functools.cache
def _use_tuned_settings() -> None:
    """Let launches ask the verifier for tuned settings."""
    launch: Any = importlib.import_module("lares_fast.kernels._launch")
    launch.find = lambda *call: _verifier().launch_settings(*call)


def refusal(op: str, tensor: Tensor, **variant: Any) -> str | None:
    """Return why the kernels of ``op`` cannot run on the device of ``tensor``, as a clause, or ``None``.

    The reason is an :func:`obstacle`, or on a GPU a fault that the self-test of the kernels found. ``variant`` selects the
    kernels of ``op``.
    """
    said = obstacle(tensor)
    if said is None and _is_gpu(tensor) and not _anywhere:
        said = _verifier().refusal(op, tensor.device, tensor.dtype, **variant)
    return said


def note(op: str, tensor: Tensor) -> str | None:
    """Return the text that ``explain`` adds to the backend ``triton``, which names the tuned launch settings, or ``None``."""
    said: str | None = _verifier().launch_note(op, tensor)
    return said


@functools.cache
def _verifier() -> Any:
    return importlib.import_module(VERIFIER)


def _is_gpu(tensor: Tensor) -> bool:
    return tensor.device.type == "cuda"


@contextmanager
def anywhere() -> Iterator[None]:
    """Allow kernels to take tensors on any device, for tools that interpret, compile or count the kernels."""
    global _anywhere
    before, _anywhere = _anywhere, True
    try:
        yield
    finally:
        _anywhere = before


def obstacle(tensor: Tensor) -> str | None:
    """Return why no Triton kernel can run on the device of ``tensor``, as a clause, or ``None``."""
    if _anywhere:
        return None
    if not _is_gpu(tensor):
        return f"it runs on an NVIDIA GPU, and the tensors are on {tensor.device}"
    return _obstacle_of(tensor.device)


@functools.cache
def _obstacle_of(device: torch.device) -> str | None:
    """Return why no Triton kernel can run on the GPU ``device``, as a clause, or ``None``. The questions take microseconds."""
    if torch.version.hip is not None:
        return "it has not been tested on AMD GPUs"
    for package in ("triton", "lares_fast.kernels"):
        if importlib.util.find_spec(package) is None:
            return f"the package {package} is not installed"
    major, minor = torch.cuda.get_device_capability(device)
    if major < 8:
        return f"it needs compute capability 8.0, and {torch.cuda.get_device_name(device)} has {major}.{minor}"
    return None
