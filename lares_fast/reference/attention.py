"""Causal self-attention with dropout on the probabilities, as RecBole's layers compute it."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lares_fast._random import Draw

# The official mask adds this to a forbidden score; exp() of it is exactly 0 beside any allowed score.
FORBIDDEN = -10000.0


def attention_mask(item_seq: Tensor, dtype: torch.dtype) -> Tensor:
    """Additive mask [B, 1, L, L] of ``item_seq`` [B, L]: a query sees itself and earlier keys that are not PAD."""
    length = item_seq.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool, device=item_seq.device).tril()
    visible = causal & (item_seq != 0)[:, None, None, :]
    return torch.where(visible, 0.0, FORBIDDEN).to(dtype)


def attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor, *, draw: Draw | None, dropout: float, step: int, layer: int
) -> Tensor:
    """``softmax(query @ key^T / sqrt(D/H) + mask) @ value`` for [B, H, L, D/H] inputs.

    ``draw`` drops probabilities at address (``step``, ``layer``); ``None`` drops nothing.
    """
    scores = query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1]) + mask
    probabilities = scores.softmax(dim=-1)
    if draw is not None:
        probabilities = draw.attention(probabilities, dropout, step=step, layer=layer)
    return probabilities @ value
