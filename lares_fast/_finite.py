"""Checks that numbers are finite and small enough to be scored: a diverged model must not be saved, chosen or served."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from lares_fast._errors import InputError

_FP32_MAX = torch.finfo(torch.float32).max


class NotFiniteError(InputError):
    """Weights or scores are infinite, NaN, or so large that scores overflow."""


def largest(tensors: Iterable[Tensor]) -> float:
    """Return the largest magnitude in the floating-point ``tensors``: NaN if one holds NaN, 0 if there are no numbers."""
    ends = [end for value in tensors if value.is_floating_point() and value.numel() for end in torch.aminmax(value.detach())]
    return torch.stack([end.double() for end in ends]).abs().amax().item() if ends else 0.0


def all_finite(tensors: Iterable[Tensor]) -> bool:
    """Return whether no floating-point tensor holds infinity or NaN."""
    return math.isfinite(largest(tensors))


def require_usable(model: nn.Module, width: int) -> None:
    """Raise :class:`NotFiniteError` unless every dot product of ``width`` weights is finite in fp32."""
    require_finite_scores(largest(model.state_dict().values()), None, width, "the weights of the model")


def require_finite_scores(query: float, items: float | None, width: int, what: str = "the scores of the model") -> None:
    """Raise :class:`NotFiniteError` unless dot products of vectors of ``width`` numbers are finite in fp32.

    ``query`` and ``items`` are the largest magnitudes on the two sides; ``items=None`` stands for the value of ``query``.
    NaN raises the error too. ``what`` begins the message.
    """
    if not query * (query if items is None else items) * width < _FP32_MAX:
        raise NotFiniteError(f"{what} are not finite, or too large for fp32: the model has diverged; train it with a lower lr.")
