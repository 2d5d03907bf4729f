"""The ``reference`` backend of ``linear_cross_entropy``: PyTorch on one part of the catalog at a time, any dtype and device.

Products have the dtype of the tensors. In a backward, products of float16 are float32, and products of float32 on a CPU are
float64, because that costs little there. A value that is computed from a
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
    """Return the log-probabilities, the ranks or ``None`` without ``call.ties``, and ``lse`` as in ``LogprobBackwardCall``.

    The log-probabilities have the shape of ``target``, and the ranks are [``call.counted()``]. The log-probability and the
    log-sum-exp are NaN for a target that is no item of the softmax.
    """
    call.check_values()
    call = call.rounded()
    own = torch.full(call.target.shape, torch.nan, dtype=torch.float64, device=call.hidden.device)
    tops, sums = [], []
    for _, _, products, is_target in _chunks(call):
        own = torch.where(is_target.any(-1), products.masked_fill(~is_target, -torch.inf).amax(-1), own)
        # The target's own term is left out of the sum, so that a log-probability near 0 keeps its digits.
        others = products.masked_fill(is_target, -torch.inf)
        tops.append(_finite(others.amax(-1)))
        sums.append(((others - tops[-1][..., None]) * call.scale).logsumexp(-1))
    # Products are subtracted before they are scaled: the difference is nearly exact, and a scaled large product is not.
    origin = _finite(torch.stack([torch.where(own.isnan(), -torch.inf, own), *tops]).amax(0))
    of_others = torch.stack([(top - origin) * call.scale + one for top, one in zip(tops, sums, strict=True)]).logsumexp(0)
    of_own = (own - origin) * call.scale
    log_sum = torch.logaddexp(of_others, of_own)
    logprob = torch.where(own.isfinite(), 0.0 - torch.logaddexp(of_others - of_own, torch.zeros_like(own)), of_own - log_sum)
    return logprob.to(call.hidden.dtype), None if call.ties is None else _ranks(call), torch.stack((origin, log_sum), -1)


def _finite(x: Tensor) -> Tensor:
    return torch.where(x.isfinite(), x, 0.0)


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
    hidden, items = call.hidden, call.items
    # float16 has too few exponents.
    precise = torch.float32 if hidden.dtype == torch.float16 else hidden.dtype
    if hidden.dtype == torch.float32 and hidden.device.type == "cpu":
        precise = torch.float64
    d_hidden = hidden.new_zeros(hidden.shape, dtype=torch.promote_types(precise, torch.float32)) if call.need_hidden else None
    d_items = torch.zeros_like(items) if call.need_items else None
    origin, log_sum = call.lse.unbind(-1)
    factor = torch.where(log_sum.isfinite(), -(call.grad.double() * call.scale), torch.nan)[..., None]
    # A small gradient times a probability may be no number of the dtype, so the largest gradient is the unit of all.
    sizes = torch.where(factor.isfinite(), factor.abs(), 0.0)
    unit = sizes.amax() if sizes.numel() else sizes.sum()
    unit = torch.where(unit > 0, unit, 1.0)
    for start, chunk, products, is_target in _chunks(call):
        logprob = (products - origin[..., None]) * call.scale - log_sum[..., None]
        weight = torch.where(is_target, logprob.expm1(), logprob.exp())
        if d_hidden is not None:
            d_hidden += weight.to(precise) @ chunk.to(precise)
        if d_items is not None:
            sums = (weight * (factor / unit)).to(precise).mT @ hidden.to(precise)
            d_items[..., start : start + chunk.shape[-2], :] = sums.double() * unit
    return None if d_hidden is None else (d_hidden.double() * factor).to(hidden.dtype), d_items


def _chunks(call: SoftmaxCall) -> Iterator[tuple[int, Tensor, Tensor, Tensor]]:
    """Yield (first item, items [..., n, D], products [..., M, n] in fp64, whether a product is its row's target) of the parts.

    A part has about 4 million products, but at least 1024 and at most 8192 items.
    """
    hidden, items = call.hidden, call.items
    # The gradient of hidden is an fp32 sum over a part, which loses digits in longer parts.
    size = min(8192, max(1024, _SCORES // max(1, call.target.numel())))
    for start in range(int(call.skip_pad), items.shape[-2], size):
        chunk = items[..., start : start + size, :]
        ids = torch.arange(start, start + chunk.shape[-2], device=hidden.device)
        yield start, chunk, (hidden @ chunk.mT).double(), ids == call.target[..., None]
