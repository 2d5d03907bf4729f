"""Checks of plain numbers that callers give. A number is used exactly as it is given, or an error is raised."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor

from lares_fast._errors import InputError


def whole(name: str, value: Any) -> int:
    """Return ``value`` as an integer. Raises :class:`InputError` for anything else, such as 2.7, ``"2"`` or ``True``."""
    if isinstance(value, torch.SymInt):
        # A compiler traces with symbols instead of numbers.
        return value  # type: ignore[return-value]
    if isinstance(value, bool) or (isinstance(value, Tensor) and (value.dim() or value.dtype == torch.bool)):
        raise InputError(f"{name} must be an integer, but got {_shown(value)}.")
    try:
        return operator.index(value)
    except (TypeError, ValueError):
        raise InputError(f"{name} must be an integer, but got {_shown(value)}.") from None


def number(name: str, value: Any) -> float:
    """Return ``value`` as a float. Raises :class:`InputError` for anything that is not a number.

    A tensor that requires a gradient is not accepted, because it would get none.
    """
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


def is_integer(tensor: Tensor) -> bool:
    """Return whether the dtype of ``tensor`` is an integer type. ``bool`` is not one."""
    return not (tensor.dtype == torch.bool or tensor.dtype.is_floating_point or tensor.dtype.is_complex)


def _shown(value: Any) -> str:
    """Return a short description of ``value`` for an error message."""
    if isinstance(value, Tensor):
        return f"a {value.dtype} tensor of shape {list(value.shape)}" if value.numel() != 1 else f"the tensor {value.item()}"
    return repr(value)[:40]
