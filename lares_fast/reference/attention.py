"""Causal self-attention with dropout on the probabilities, as RecBole's layers compute it."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lares_fast._random import Draw
from lares_fast.sequences import pad, unpad


def attention_mask(item_seq: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the additive mask [B, 1, L, L] of ``item_seq`` [B, L]: 0 where a query sees a key, else -inf.

    A query sees itself and earlier keys that are not PAD. The official code uses -10000 instead of -inf. Both give the same
    result, except for scores that differ by 10000 or more: then -10000 lets a query see later keys.
    """
    length = item_seq.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool, device=item_seq.device).tril()
    # PAD sees itself, so that no row of a softmax is empty. The result of such a row is never read.
    oneself = torch.eye(length, dtype=torch.bool, device=item_seq.device)
    visible = causal & ((item_seq != 0)[:, None, None, :] | oneself)
    return torch.where(visible, 0.0, -torch.inf).to(dtype)


def attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor, *, draw: Draw | None, dropout: float, step: int, layer: int
) -> Tensor:
    """Return ``softmax(query @ key^T / sqrt(D/H) + mask) @ value`` for [B, H, L, D/H] inputs.

    ``mask`` broadcasts to [B, H, L, L]. ``draw`` drops probabilities at the address (``step``, ``layer``); ``None`` drops
    nothing.
    """
    probabilities = _scores(query, key, mask).softmax(dim=-1)
    if draw is not None:
        probabilities = draw.attention(probabilities, dropout, step=step, layer=layer)
    return probabilities.to(value.dtype) @ value


def _scores(query: Tensor, key: Tensor, mask: Tensor) -> Tensor:
    """Return scaled and masked scores. For half precision they are fp32, because the largest number of fp16 is 65,504."""
    precise = torch.promote_types(query.dtype, torch.float32)
    return query.to(precise) @ key.to(precise).transpose(-1, -2) / math.sqrt(query.shape[-1]) + mask


def packed_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    offsets: Tensor,
    longest: int,
    *,
    draw: Draw | None,
    dropout: float,
    step: int,
    layer: int,
) -> Tensor:
    """Return :func:`attention` of packed sequences, [P, H, D/H].

    ``query``, ``key`` and ``value`` [P, H, D/H] hold sequence b in the rows ``offsets[b]:offsets[b + 1]``, at most ``longest``
    rows.
    """
    padded = _Padded(offsets, longest)
    q, k, v = (padded.heads(x) for x in (query, key, value))
    return padded.rows(attention(q, k, v, padded.mask(query.dtype), draw=draw, dropout=dropout, step=step, layer=layer))


def packed_logsumexp(query: Tensor, key: Tensor, offsets: Tensor, longest: int) -> Tensor:
    """Return the logarithm [H, P] of the denominator of each softmax in :func:`packed_attention`."""
    padded = _Padded(offsets, longest)
    scores = _scores(padded.heads(query), padded.heads(key), padded.mask(query.dtype))
    return padded.rows(scores.logsumexp(dim=-1)).T.contiguous()


def packed_attention_backward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    offsets: Tensor,
    longest: int,
    grad: Tensor,
    *,
    draw: Draw | None,
    dropout: float,
    step: int,
    layer: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of ``query``, ``key`` and ``value`` for ``grad``, the gradient of :func:`packed_attention`.

    The formulas are written out, because autograd does not record the operations within an op.
    """
    padded = _Padded(offsets, longest)
    q, k, v, dout = (padded.heads(x) for x in (query, key, value, grad))
    p = _scores(q, k, padded.mask(query.dtype)).softmax(dim=-1)
    weights, dp = p, dout.to(p.dtype) @ v.to(p.dtype).transpose(-1, -2)
    if draw is not None:
        weights, dp = (draw.attention(x, dropout, step=step, layer=layer) for x in (p, dp))
    ds = torch.ops.aten._softmax_backward_data(dp, p, -1, p.dtype) / math.sqrt(query.shape[-1])
    ds, weights = ds.to(q.dtype), weights.to(q.dtype)
    gradients = ds @ k, ds.transpose(-1, -2) @ q, weights.transpose(-1, -2) @ dout
    dq, dk, dv = (padded.rows(x) for x in gradients)
    return dq, dk, dv


class _Padded:
    """Convert packed rows to padded tensors [B, ``longest``, ...], and back."""

    def __init__(self, offsets: Tensor, longest: int) -> None:
        self.offsets = offsets
        self.longest = longest

    def mask(self, dtype: torch.dtype) -> Tensor:
        """Return the :func:`attention_mask` of the padded sequences."""
        real = torch.arange(self.longest, device=self.offsets.device) < self.offsets.diff()[:, None]
        return attention_mask(real, dtype)

    def heads(self, packed: Tensor) -> Tensor:
        """Return ``packed`` [P, H, ...] as [B, H, L, ...], with 0 as padding."""
        return pad(packed, self.offsets, self.longest).transpose(1, 2)

    def rows(self, padded: Tensor) -> Tensor:
        """Return the rows [P, H, ...] of ``padded`` [B, H, L, ...]."""
        return unpad(padded.transpose(1, 2), self.offsets)
