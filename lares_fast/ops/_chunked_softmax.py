"""Log-probabilities of targets and their gradients in PyTorch, a piece of the catalog at a time: any dtype and device.

Products are in the tensors' dtype, those of a float16 backward in float32. What is done with a score is in fp64: a
log-probability near 0 and the gradient that goes with it would drown in the rounding of the log-sum-exp.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

_SCORES = 2**22


def _chunks(hidden: Tensor, items: Tensor, scale: float, skip_pad: bool) -> Iterator[tuple[int, Tensor, Tensor]]:
    """(first row, rows, scores [M, n] in fp64) of pieces of the softmax's items; about 4 million scores, or 1024 a row."""
    # Long pieces of few rows would be long fp32 sums.
    size = min(8192, max(1024, _SCORES // max(1, len(hidden))))
    for start in range(int(skip_pad), len(items), size):
        chunk = items[start : start + size]
        yield start, chunk, (hidden @ chunk.T).double() * scale


def _accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def logprob_and_lse(hidden: Tensor, items: Tensor, target: Tensor, scale: float, skip_pad: bool) -> tuple[Tensor, Tensor]:
    """log p(target) [M] and log-sum-exp [M] (fp64), both NaN for a target that is not among the softmax's items."""
    own = torch.full((len(hidden),), torch.nan, dtype=torch.float64, device=hidden.device)
    parts = []
    for start, chunk, scores in _chunks(hidden, items, scale, skip_pad):
        inside = (target >= start) & (target < start + len(chunk))
        local = torch.where(inside, target - start, 0)
        own = torch.where(inside, scores.gather(1, local[:, None]).squeeze(1), own)
        parts.append(scores.logsumexp(dim=1))
    # A NaN score makes both NaN as well.
    lse = torch.where(own.isnan(), own, torch.stack(parts).logsumexp(dim=0))
    return (own - lse).to(hidden.dtype), lse


def gradients(
    grad: Tensor,
    hidden: Tensor,
    items: Tensor,
    target: Tensor,
    lse: Tensor,
    scale: float,
    skip_pad: bool,
    needs: tuple[bool, bool],
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of ``grad @ logprob`` by ``hidden`` and by ``items``, from probabilities that are computed again."""
    d_hidden = hidden.new_zeros(hidden.shape, dtype=_accumulator(hidden.dtype)) if needs[0] else None
    d_items = torch.zeros_like(items) if needs[1] else None
    factor = -(grad.double() * scale)[:, None]
    # A small gradient times a probability is below what half precision with a narrow exponent holds.
    precise = torch.float32 if hidden.dtype == torch.float16 else hidden.dtype
    for start, chunk, scores in _chunks(hidden, items, scale, skip_pad):
        logprob = scores - lse[:, None]
        ids = torch.arange(start, start + len(chunk), device=target.device)
        weight = (torch.where(ids == target[:, None], logprob.expm1(), logprob.exp()) * factor).to(precise)
        if d_hidden is not None:
            d_hidden += weight @ chunk.to(precise)
        if d_items is not None:
            d_items[start : start + len(chunk)] = weight.T @ hidden.to(precise)
    return None if d_hidden is None else d_hidden.to(hidden.dtype), d_items
