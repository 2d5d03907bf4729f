"""Notices that a tensor changed after something was computed from it."""

from __future__ import annotations

import functools
import weakref
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook

# About this many rows are compared at every call.
_SAMPLED = 256

# All that are alive.
_watches: weakref.WeakSet[Watch] = weakref.WeakSet()


class Watch:
    """Compares ``tensor`` [N, ...], which is on the CPU and tracks changes, with the values that it has now.

    It notices an in-place operation of PyTorch, a step of a ``torch.optim`` optimizer that holds the tensor, and every other
    change of one of the 256 or more rows, at equal distances, that it compares at each call. It does not notice a write past
    PyTorch (``.data``, NumPy, another process) that leaves all of those rows as they were.
    """

    def __init__(self, tensor: Tensor) -> None:
        # The tensor is held, so that no other tensor can get its address.
        self._tensor = tensor.detach()
        self._version, self._stepped, self._sample = self._tensor._version, False, self._sampled().clone()
        _watch_optimizers()
        _watches.add(self)

    def changed(self) -> str | None:
        """Return how the tensor was changed since this watch was made, or ``None``."""
        if self._stepped:
            return "an optimizer made a step"
        if self._tensor._version != self._version:
            return "an operation wrote to it in place"
        # The bytes are compared, because a NaN does not equal itself.
        if not torch.equal(self._sampled().view(torch.uint8), self._sample.view(torch.uint8)):
            return "its values changed"
        return None

    def _sampled(self) -> Tensor:
        """Return up to 512 rows at equal distances, from the first row on."""
        return self._tensor[:: max(1, len(self._tensor) // _SAMPLED)].contiguous()

    def _overlaps(self, tensor: Tensor) -> bool:
        return tensor.device.type == "cpu" and tensor.untyped_storage().data_ptr() == self._tensor.untyped_storage().data_ptr()


@functools.cache
def _watch_optimizers() -> None:
    """Let every optimizer step mark the watches of its parameters: a fused step does not count up their version."""
    register_optimizer_step_post_hook(_after_step)


def _after_step(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    for watch in _watches:
        watch._stepped |= any(watch._overlaps(p) for group in optimizer.param_groups for p in group["params"])
