"""Load Triton kernels on first use, and say in words why a kernel cannot take a call.

:mod:`lares_fast.verify` stands above the ops, because it calls them. It tests each kernel before its first use on a GPU and
finds tuned launch settings. The ops know it by its name alone, and load it when the first kernel is needed.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

VERIFIER = "lares_fast.verify"

DTYPES = (torch.float32, torch.float16, torch.bfloat16)

# Not a context variable: a backward may run in a thread of its own.
_anywhere = False


def kernels(stem: str) -> ModuleType:
    """The module of the kernels of op ``stem``."""
    launch: Any = importlib.import_module("lares_fast.kernels._launch")
    launch.find = _verifier().launch_settings
    return importlib.import_module(f"lares_fast.kernels.{stem}")


def seed(key: Sequence[int], device: torch.device) -> Tensor:
    """The folded ``key`` as the kernels read it; a kernel fills it: no copy from the host, which would wait."""
    packed = key[0] | key[1] << 32
    return torch.full((1,), packed - (packed >> 63 << 64), dtype=torch.int64, device=device)


def refusal(op: str, tensor: Tensor, **variant: Any) -> str | None:
    """:func:`obstacle`, and on a GPU what the canary of the kernels of ``op`` found; ``variant`` says which kernels."""
    said = obstacle(tensor)
    if said is None and _is_gpu(tensor) and not _anywhere:
        said = _verifier().refusal(op, tensor.device, tensor.dtype, **variant)
    return said


def note(op: str, tensor: Tensor) -> str | None:
    """Text that ``explain`` adds to the backend ``triton``: which launch settings are tuned; or ``None``."""
    said: str | None = _verifier().launch_note(op, tensor)
    return said


def _verifier() -> Any:
    return importlib.import_module(VERIFIER)


def _is_gpu(tensor: Tensor) -> bool:
    return tensor.device.type == "cuda"


@contextmanager
def anywhere() -> Iterator[None]:
    """Let kernels take tensors of any device: for tools that interpret, compile or count them."""
    global _anywhere
    before, _anywhere = _anywhere, True
    try:
        yield
    finally:
        _anywhere = before


def obstacle(tensor: Tensor) -> str | None:
    """Why no Triton kernel can take a call on the device of ``tensor``, or ``None``."""
    if _anywhere:
        return None
    if not _is_gpu(tensor):
        return f"it runs on an NVIDIA GPU, and the tensors are on {tensor.device}"
    if torch.version.hip is not None:
        return "it was not tried on AMD GPUs"
    for package in ("triton", "lares_fast.kernels"):
        if importlib.util.find_spec(package) is None:
            return f"the package {package} is not installed"
    major, minor = torch.cuda.get_device_capability(tensor.device)
    if major < 8:
        return f"it needs compute capability 8.0, and {torch.cuda.get_device_name(tensor.device)} has {major}.{minor}"
    return None
