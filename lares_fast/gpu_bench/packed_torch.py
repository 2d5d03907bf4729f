"""The recurrence with the ``add`` adapter on packed tokens: the fastest baseline in eager PyTorch.

Linear layers, norms and GELU work on all tokens. One product gives query, key and value. Attention works on groups of sequences
with similar lengths.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F


class Group(NamedTuple):
    """Sequences with similar lengths, padded to [b, L].

    ``places`` [b, L] has the places of the tokens in the packed buffer. ``mask`` [b, 1, L, L] is added to scores. ``real`` [n]
    has the places in [b * L] that are no padding, and ``real_places`` [n] the places of the same tokens in the packed buffer.
    """

    places: Tensor
    mask: Tensor
    real: Tensor
    real_places: Tensor

    def to(self, device: torch.device | str, dtype: torch.dtype = torch.float32) -> Group:
        """Return a copy on ``device`` with a mask of ``dtype``."""
        return Group(*(x.to(device, dtype if x is self.mask else x.dtype) for x in self))


# The groups that attention works on, see :func:`buckets`.
Plan = Sequence[Group]


def buckets(lengths: Tensor, count: int = 7) -> list[Group]:
    """Group sequences by length, on the CPU."""
    starts = lengths.cumsum(0) - lengths
    result = []
    for group in lengths.argsort().tensor_split(count):
        longest = int(lengths[group].max())
        place = torch.arange(longest)
        places = starts[group][:, None] + place.minimum(lengths[group][:, None] - 1)
        real = place < lengths[group][:, None]
        visible = (place[:, None] >= place) & real[:, None, :]
        mask = torch.where(visible, 0.0, -torch.inf)[:, None]
        result.append(Group(places, mask, real.flatten().nonzero().flatten(), places[real]))
    return result


def recurrence(
    h: Tensor,
    pre: Tensor,
    lengths: Tensor,
    plan: Plan,
    weights: Sequence[Tensor],
    n_heads: int,
    depth: int,
    p: float,
    *,
    sdpa: bool,
) -> Tensor:
    """Return the state of each sequence's last token, [B, D]. ``weights`` are as in ``ops.recurrence``."""
    *_, last = states(h, pre, lengths, plan, weights, n_heads, depth, p, sdpa=sdpa)
    return last


def states(
    h: Tensor,
    pre: Tensor,
    lengths: Tensor,
    plan: Plan,
    weights: Sequence[Tensor],
    n_heads: int,
    depth: int,
    p: float,
    *,
    sdpa: bool,
) -> Iterator[Tensor]:
    """Yield the state of each sequence's last token, [B, D], after every step."""
    norm, last = weights[:2], lengths.cumsum(0) - 1
    run = block(weights[2:], plan, n_heads, p, sdpa=sdpa)
    for _ in range(depth):
        h = run(F.layer_norm((h + pre) / 2, (h.shape[1],), norm[0], norm[1], 1e-12))
        yield h[last]


def block(weights: Sequence[Tensor], plan: Plan, n_heads: int, p: float, *, sdpa: bool) -> Callable[[Tensor], Tensor]:
    """Return a function of packed tokens [P, D] that applies the layers. Each layer has 16 of the weights."""
    layers = [weights[i : i + 16] for i in range(0, len(weights), 16)]
    fused = [(torch.cat(list(layer[0:6:2])), torch.cat(list(layer[1:6:2]))) for layer in layers]
    places = torch.cat([group.real_places for group in plan])

    def attend(qkv: Tensor) -> Tensor:
        context = qkv.new_empty(len(qkv), qkv.shape[1] // 3)
        parts = []
        for group in plan:
            q, k, v = qkv[group.places].unflatten(-1, (3, n_heads, -1)).permute(2, 0, 3, 1, 4)
            if sdpa:
                y = F.scaled_dot_product_attention(q, k, v, attn_mask=group.mask, dropout_p=p)
            else:
                probabilities = (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1]) + group.mask).softmax(-1)
                y = F.dropout(probabilities, p) @ v
            parts.append(y.transpose(1, 2).reshape(-1, context.shape[1]).index_select(0, group.real))
        return context.index_copy(0, places, torch.cat(parts))

    def run(h: Tensor) -> Tensor:
        for layer, (weight, bias) in zip(layers, fused, strict=True):
            y = F.dropout(F.linear(attend(F.linear(h, weight, bias)), *layer[6:8]), p)
            h = F.layer_norm(y + h, h.shape[1:], layer[8], layer[9], 1e-12)
            y = F.dropout(F.linear(F.gelu(F.linear(h, *layer[10:12])), *layer[12:14]), p)
            h = F.layer_norm(y + h, h.shape[1:], layer[14], layer[15], 1e-12)
        return h

    return run
