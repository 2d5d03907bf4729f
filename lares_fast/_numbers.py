"""Plain numbers from callers: taken exactly as they are, or refused."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor

from lares_fast._errors import InputError


def whole(name: str, value: Any) -> int:
    """``value`` as an integer; :class:`InputError` for what is not one, such as 2.7, ``"2"`` or ``True``."""
    if isinstance(value, torch.SymInt):
        # A compiler's symbol goes on as it is.
        return value  # type: ignore[return-value]
    if isinstance(value, bool) or (isinstance(value, Tensor) and (value.dim() or value.dtype == torch.bool)):
        raise InputError(f"{name} must be an integer, but got {_shown(value)}.")
    try:
        return operator.index(value)
    except (TypeError, ValueError):
        raise InputError(f"{name} must be an integer, but got {_shown(value)}.") from None


def number(name: str, value: Any) -> float:
    """``value`` as a float; :class:`InputError` for what is not a number, and for a tensor that wants a gradient."""
    if isinstance(value, torch.SymFloat):
        return value  # type: ignore[return-value]
    if isinstance(value, Tensor) and value.requires_grad:
        raise InputError(f"{name} is a plain number and gets no gradient: give {name}.item(), or multiply by it outside.")
    try:
        if isinstance(value, bool | str | bytes) or (isinstance(value, Tensor) and value.dtype == torch.bool):
            raise TypeError
        return float(value)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        raise InputError(f"{name} must be a number, but got {_shown(value)}.") from None


def _shown(value: Any) -> str:
    """``value`` in a sentence."""
    if isinstance(value, Tensor):
        return f"a {value.dtype} tensor of shape {list(value.shape)}" if value.numel() != 1 else f"the tensor {value.item()}"
    return repr(value)[:40]
