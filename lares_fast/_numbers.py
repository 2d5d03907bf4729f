"""Checks of values that callers give. A value is used exactly as it is given, or an error is raised.

The command line uses this module before NumPy and torch are imported, which takes seconds. Plain values need neither.
"""

from __future__ import annotations

import math
import operator
import reprlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from lares_fast._errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

# The most steps of a model: steps and layers have 16 bits each in the address of a random number. The recurrence counts steps
# from 1, the pre-block from 0.
MOST_STEPS = 2**16 - 2

_PLAIN = (type(None), bool, int, float, str, bytes)


def is_masked(value: Any) -> bool:
    """Return whether ``value`` is a masked entry of NumPy, or an array with one. Its number has no meaning."""
    import numpy as np

    return isinstance(value, np.ma.MaskedArray) and bool(np.ma.is_masked(value))


def is_truth(value: Any) -> bool:
    """Return whether ``value`` is ``True`` or ``False``, of Python or of NumPy."""
    if type(value) in _PLAIN:
        return isinstance(value, bool)
    import numpy as np

    return isinstance(value, np.bool_)


def whole(name: str, value: Any) -> int:
    """Return ``value`` as an integer. Raises :class:`InputError` for anything else, such as 2.7, ``"2"`` or ``True``.

    It also raises it for an integer that does not fit into 64 bits.
    """
    if type(value) in _PLAIN:
        if type(value) is not int:
            raise InputError(f"{name} must be an integer, but got {shown(value)}.")
        found = value
    else:
        import torch

        if isinstance(value, torch.SymInt):
            # A compiler traces with symbols instead of numbers.
            return value  # type: ignore[return-value]
        if is_masked(value) or (isinstance(value, torch.Tensor) and (value.dim() or value.dtype == torch.bool)):
            raise InputError(f"{name} must be an integer, but got {shown(value)}.")
        try:
            found = operator.index(value)
        except (TypeError, ValueError, RuntimeError):
            raise InputError(f"{name} must be an integer, but got {shown(value)}.") from None
    if not -(2**63) <= found < 2**64:
        raise InputError(f"{name} must be an integer of 64 bits, but got {shown(value)}.")
    return found


def number(name: str, value: Any) -> float:
    """Return ``value`` as a float. Raises :class:`InputError` for anything that is not a finite number.

    A tensor that requires a gradient is not accepted, because it would get none.
    """
    if type(value) not in _PLAIN:
        import torch

        if isinstance(value, torch.SymFloat):
            return value  # type: ignore[return-value]
        if isinstance(value, torch.Tensor) and value.requires_grad:
            raise InputError(f"{name} is a plain number and gets no gradient: give {name}.item(), or multiply by it outside.")
    try:
        if isinstance(value, bool | str | bytes) or _is_odd(value):
            raise TypeError
        found = float(value)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        raise InputError(f"{name} must be a number, but got {shown(value)}.") from None
    if not -math.inf < found < math.inf:
        raise InputError(f"{name} must be a finite number, but got {found}.")
    return found


def _is_odd(value: Any) -> bool:
    """Return whether ``value`` is an object of NumPy or torch that Python takes for a number, but that is none."""
    if type(value) in _PLAIN:
        return False
    import torch

    return is_truth(value) or is_masked(value) or (isinstance(value, torch.Tensor) and value.dtype == torch.bool)


def flag(name: str, value: Any) -> bool:
    """Return ``value`` as a truth value. Raises :class:`InputError` for anything but true, false, 1 and 0."""
    if is_truth(value):
        return bool(value)
    try:
        if not is_masked(value) and (found := operator.index(value)) in (0, 1):
            return bool(found)
    except (TypeError, ValueError, RuntimeError):
        pass
    raise InputError(f"{name} must be true or false, but got {shown(value)}.")


def choice(name: str, value: Any, allowed: Sequence[str]) -> str:
    """Return ``value``. Raises :class:`InputError` unless it is one of the texts ``allowed``."""
    if not isinstance(value, str) or value not in allowed:
        raise InputError(f"{name} must be one of {', '.join(allowed)}, but got {shown(value)}.")
    return value


def check_dense(name: str, value: object) -> None:
    """Raise :class:`InputError` unless ``value`` is a dense tensor, which means that its layout has strides."""
    import torch

    if not isinstance(value, torch.Tensor):
        raise InputError(f"{name} must be a dense tensor, but got {type(value).__name__}.")
    if value.layout != torch.strided or value.is_nested:
        raise InputError(f"{name} must be a dense tensor, but got {'nested' if value.is_nested else value.layout}.")


def check_stored(name: str, value: object) -> None:
    """Raise :class:`InputError` unless ``value`` is a dense tensor with values, which a tensor on the device meta has not."""
    check_dense(name, value)
    if getattr(value, "is_meta", False):
        raise InputError(f"{name} must be a tensor with values, but is on the device meta, which has none.")


def is_integer(tensor: Tensor) -> bool:
    """Return whether the dtype of ``tensor`` is an integer type. ``bool`` is not one."""
    import torch

    return not (tensor.dtype == torch.bool or tensor.dtype.is_floating_point or tensor.dtype.is_complex)


def shown(value: Any) -> str:
    """Return a short text for ``value`` in a message. It is one line of printable characters, whatever ``value`` is."""
    try:
        text = _of_array(value) or reprlib.repr(value)
    except Exception:
        # For example an integer with thousands of digits, a nested tensor, or an object that cannot print itself.
        return f"a value of type {type(value).__name__}"
    line = " ".join(text.split())
    if not line.isprintable():
        line = ascii(line)
    return line if len(line) <= _LONGEST else f"{line[:_LONGEST]}..."


def _of_array(value: Any) -> str | None:
    """Return a text for a tensor or an array, and ``None`` for all else."""
    if type(value) in (*_PLAIN, list, tuple, dict):
        return None
    import numpy as np
    import torch

    if isinstance(value, torch.Tensor):
        one = value.numel() == 1 and value.device.type != "meta"
        return f"the tensor {value.item()}" if one else f"a {value.dtype} tensor of shape {list(value.shape)}"
    if isinstance(value, np.ndarray):
        return "masked" if value is np.ma.masked else f"a {value.dtype} array of shape {list(value.shape)}"
    return None


_LONGEST = 60
