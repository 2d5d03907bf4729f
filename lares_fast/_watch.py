"""Detect that the values of a tensor have changed."""

from __future__ import annotations

import functools
import weakref
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook

_SAMPLED = 256
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

# All watches that are alive.
_watches: weakref.WeakSet[Watch] = weakref.WeakSet()


class Watch:
    """Remember the values that ``tensor`` has now, and report later whether they have changed.

    A cache of a value that is computed from a tensor must build the watch first and compute the value second, so that a change
    in between is noticed. Before each use it must call :meth:`changed`. If that returns a reason, it must build the watch and
    the value again.

    A watch notices three kinds of change:

    - an in-place operation of PyTorch, by the tensor's version counter (an inference tensor has none);
    - a step of a ``torch.optim`` optimizer that holds a parameter in the same memory, because a fused step leaves the
      version counter as it was;
    - any other change of a sampled row: 256 to 511 rows at equal distances, or all rows of a smaller tensor, are compared
      bit by bit in every call of :meth:`changed`. A tensor that is not on the CPU is not compared, because the comparison
      would wait for its device.

    A write that bypasses PyTorch (``.data``, NumPy, another process) and changes none of the sampled rows is not noticed.

    Args:
        tensor: a dense tensor with at least one dimension. The watch keeps a reference, so that no other tensor can be
            allocated at its address.
    """

    def __init__(self, tensor: Tensor) -> None:
        self._tensor = tensor.detach()
        self._version = _version(self._tensor)
        self._stepped = False
        self._sample = self._sampled().clone() if self._tensor.device.type == "cpu" else None
        _hook_optimizers()
        _watches.add(self)

    def changed(self) -> str | None:
        """Return how the tensor has changed since this watch was built, as a clause, or ``None``."""
        if _version(self._tensor) != self._version:
            return "an in-place operation changed it"
        if self._stepped:
            return "an optimizer changed it"
        if self._sample is not None and not torch.equal(self._sampled(), self._sample):
            return "its values changed"
        return None

    def _sampled(self) -> Tensor:
        """Return the sampled rows as integers, so that a NaN is equal to itself."""
        rows = self._tensor[:: max(1, len(self._tensor) // _SAMPLED)]
        return rows.view(_INTEGERS[rows.element_size()])

    def _shares_memory(self, tensor: Tensor) -> bool:
        ours = self._tensor
        return tensor.device == ours.device and tensor.untyped_storage().data_ptr() == ours.untyped_storage().data_ptr()


def _version(tensor: Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version


@functools.cache
def _hook_optimizers() -> None:
    register_optimizer_step_post_hook(_after_step)


def _after_step(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    for watch in _watches:
        watch._stepped |= any(watch._shares_memory(p) for group in optimizer.param_groups for p in group["params"])
