"""Send all tensors of a batch to a GPU in one copy."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, is_dataclass, replace
from math import prod
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")
# Words of 8 bytes. A kernel takes tensors at addresses that 16 bytes divide.
_ALIGNMENT = 2


class Parcel(Generic[T]):
    """The tensors of ``content`` in one int64 buffer on the CPU.

    ``content`` consists of dataclasses, tuples, CPU tensors and plain values.

    ``host``
        The buffer, in page-locked memory if ``pinned`` is set. Then a copy to a GPU does not wait.
    ``key``
        Everything about the content except the values of its tensors. Parcels with equal keys have equal places for tensors.
    """

    def __init__(self, content: T, *, pinned: bool) -> None:
        self._content = content
        self._places: list[tuple[torch.dtype, torch.Size, int]] = []
        plain: list[Any] = []
        tensors: list[Tensor] = []
        size = 0

        def add(value: Any) -> Any:
            nonlocal size
            if not isinstance(value, Tensor):
                plain.append(value)
                return value
            tensors.append(value)
            self._places.append((value.dtype, value.shape, size))
            size += -(-_words(value.dtype, value.shape) // _ALIGNMENT) * _ALIGNMENT
            return value

        _mapped(content, add)
        self.key = (tuple(self._places), tuple(plain))
        self.host = torch.empty(size, dtype=torch.int64, pin_memory=pinned)
        for tensor, (dtype, shape, place) in zip(tensors, self._places, strict=True):
            _view(self.host, dtype, shape, place).copy_(tensor)

    def opened(self, buffer: Tensor) -> T:
        """Return the content with views into ``buffer``, a copy of :attr:`host` on any device, instead of its tensors."""
        places = iter(self._places)
        result: T = _mapped(self._content, lambda x: _view(buffer, *next(places)) if isinstance(x, Tensor) else x)
        return result


def _words(dtype: torch.dtype, shape: torch.Size) -> int:
    return -(-prod(shape) * dtype.itemsize // 8)


def _view(buffer: Tensor, dtype: torch.dtype, shape: torch.Size, place: int) -> Tensor:
    part = buffer[place : place + _words(dtype, shape)].view(dtype)
    return part[: prod(shape)].view(shape)


def _mapped(value: Any, function: Callable[[Any], Any]) -> Any:
    """Return a copy of ``value`` with ``function(x)`` for each tensor and plain value x in it."""
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{field.name: _mapped(getattr(value, field.name), function) for field in fields(value)})
    if isinstance(value, tuple):
        parts = [_mapped(part, function) for part in value]
        return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
    return function(value)
