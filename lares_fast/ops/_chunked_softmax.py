"""The ``reference`` backend of ``linear_cross_entropy``: PyTorch on one part of the catalog at a time, any dtype and device.

Products have the dtype of the tensors, but the products of a float16 backward are float32. A value that is computed from a
score is fp64: in a narrower dtype the rounding of the log-sum-exp would hide a log-probability near 0 and its gradient.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from lares_fast.ops._catalog_calls import LogprobBackwardCall, LogprobCall, SoftmaxCall
from lares_fast.reference.target_rank import target_rank

_SCORES = 2**22


def forward(call: LogprobCall) -> tuple[Tensor, Tensor | None, Tensor]:
    """Return the log-probabilities, the ranks or ``None`` without ``call.ties``, and the log-sum-exp in fp64.

    The results have the shape of ``target``, but the ranks are [``call.counted()``]. The log-probability and the log-sum-exp
    are NaN for a target that is no item of the softmax.
    """
    call.check_values()
    call = call.rounded()
    hidden, target = call.hidden, call.target
    own = torch.full(target.shape, torch.nan, dtype=torch.float64, device=hidden.device)
    parts = []
    for start, chunk, scores in _chunks(call):
        inside = (target >= start) & (target < start + chunk.shape[-2])
        local = torch.where(inside, target - start, 0)
        own = torch.where(inside, scores.gather(-1, local[..., None]).squeeze(-1), own)
        parts.append(scores.logsumexp(dim=-1))
    # Without a score of the target, the log-sum-exp is NaN too.
    lse = torch.where(own.isnan(), own, torch.stack(parts).logsumexp(dim=0))
    return (own - lse).to(hidden.dtype), None if call.ties is None else _ranks(call), lse


def _ranks(call: LogprobCall) -> Tensor:
    first, found = int(call.skip_pad), [call.target.new_empty(0)]
    for _, part in call.parts():
        if part.ties is not None:
            found.append(target_rank(part.hidden, part.items[first:], part.target - first, ties=part.ties))
    return torch.cat(found)


def backward(call: LogprobBackwardCall) -> tuple[Tensor | None, Tensor | None]:
    """Return the gradients of ``hidden`` and ``items``, or ``None`` for a gradient that is not needed.

    The probabilities are computed again.
    """
    call = call.rounded()
    hidden, items, target = call.hidden, call.items, call.target
    narrow = hidden.dtype in (torch.float16, torch.bfloat16)
    d_hidden = hidden.new_zeros(hidden.shape, dtype=torch.float32 if narrow else None) if call.need_hidden else None
    d_items = torch.zeros_like(items) if call.need_items else None
    factor = -(call.grad.double() * call.scale)[..., None]
    # float16 has too few exponents for the product of a small gradient and a probability.
    precise = torch.float32 if hidden.dtype == torch.float16 else hidden.dtype
    for start, chunk, scores in _chunks(call):
        logprob = scores - call.lse[..., None]
        ids = torch.arange(start, start + chunk.shape[-2], device=target.device)
        weight = (torch.where(ids == target[..., None], logprob.expm1(), logprob.exp()) * factor).to(precise)
        if d_hidden is not None:
            d_hidden += weight @ chunk.to(precise)
        if d_items is not None:
            d_items[..., start : start + chunk.shape[-2], :] = weight.mT @ hidden.to(precise)
    return None if d_hidden is None else d_hidden.to(hidden.dtype), d_items


def _chunks(call: SoftmaxCall) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Yield (first item, items [..., n, D], scores [..., M, n] in fp64) of consecutive parts of the softmax's items.

    A part has about 4 million scores, but at least 1024 and at most 8192 items.
    """
    hidden, items = call.hidden, call.items
    # The gradient of hidden is an fp32 sum over a part, which loses digits in longer parts.
    size = min(8192, max(1024, _SCORES // max(1, call.target.numel())))
    for start in range(int(call.skip_pad), items.shape[-2], size):
        chunk = items[..., start : start + size, :]
        yield start, chunk, (hidden @ chunk.mT).double() * call.scale
