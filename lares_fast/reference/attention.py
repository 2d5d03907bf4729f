"""Causal self-attention with dropout on the probabilities, as RecBole's layers compute it."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lares_fast._random import Draw


def attention_mask(item_seq: Tensor, dtype: torch.dtype) -> Tensor:
    """Additive mask [B, 1, L, L] of ``item_seq`` [B, L]: 0 where a query sees a key, else -inf.

    A query sees itself and earlier keys that are not PAD. The official mask is -10000 instead of -inf, which is the same
    unless scores lie that far apart, and lets the future through there.
    """
    length = item_seq.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool, device=item_seq.device).tril()
    # PAD sees itself, so that no row of a softmax is empty; nothing reads what comes of it.
    oneself = torch.eye(length, dtype=torch.bool, device=item_seq.device)
    visible = causal & ((item_seq != 0)[:, None, None, :] | oneself)
    return torch.where(visible, 0.0, -torch.inf).to(dtype)


def attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor, *, draw: Draw | None, dropout: float, step: int, layer: int
) -> Tensor:
    """``softmax(query @ key^T / sqrt(D/H) + mask) @ value`` for [B, H, L, D/H] inputs.

    ``draw`` drops probabilities at address (``step``, ``layer``); ``None`` drops nothing.
    """
    probabilities = _scores(query, key, mask).softmax(dim=-1)
    if draw is not None:
        probabilities = draw.attention(probabilities, dropout, step=step, layer=layer)
    return probabilities.to(value.dtype) @ value


def _scores(query: Tensor, key: Tensor, mask: Tensor) -> Tensor:
    """Scaled and masked scores; those of half precision in fp32, because fp16 ends at 65,504."""
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
    """:func:`attention` of sequences without padding: ``query``, ``key``, ``value`` [P, H, D/H] hold sequence b in rows
    ``offsets[b]`` .. ``offsets[b + 1]``, at most ``longest`` of them."""
    real = _real(offsets, longest)
    q, k, v = (_pad(x, real) for x in (query, key, value))
    mask = attention_mask(real, query.dtype)
    return _unpad(attention(q, k, v, mask, draw=draw, dropout=dropout, step=step, layer=layer), real)


def packed_logsumexp(query: Tensor, key: Tensor, offsets: Tensor, longest: int) -> Tensor:
    """The logarithm [H, P] of each softmax's denominator in :func:`packed_attention`."""
    real = _real(offsets, longest)
    scores = _scores(_pad(query, real), _pad(key, real), attention_mask(real, query.dtype))
    return _unpad(scores.logsumexp(dim=-1), real).T.contiguous()


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
    """The gradients of ``query``, ``key`` and ``value``, written out: inside an op autograd does not record."""
    real = _real(offsets, longest)
    q, k, v, dout = (_pad(x, real) for x in (query, key, value, grad))
    p = _scores(q, k, attention_mask(real, query.dtype)).softmax(dim=-1)
    weights, dp = p, dout.to(p.dtype) @ v.to(p.dtype).transpose(-1, -2)
    if draw is not None:
        weights, dp = (draw.attention(x, dropout, step=step, layer=layer) for x in (p, dp))
    ds = torch.ops.aten._softmax_backward_data(dp, p, -1, p.dtype) / math.sqrt(query.shape[-1])
    ds, weights = ds.to(q.dtype), weights.to(q.dtype)
    gradients = ds @ k, ds.transpose(-1, -2) @ q, weights.transpose(-1, -2) @ dout
    dq, dk, dv = (_unpad(x, real) for x in gradients)
    return dq, dk, dv


def _real(offsets: Tensor, longest: int) -> Tensor:
    """Mask [B, L] of the places that hold a row."""
    return torch.arange(longest, device=offsets.device) < offsets.diff()[:, None]


def _pad(packed: Tensor, real: Tensor) -> Tensor:
    """[P, H, ...] -> [B, H, L, ...], zero where there is no row."""
    padded = packed.new_zeros(*real.shape, *packed.shape[1:])
    padded[real] = packed
    return padded.transpose(1, 2)


def _unpad(padded: Tensor, real: Tensor) -> Tensor:
    return padded.transpose(1, 2)[real]
