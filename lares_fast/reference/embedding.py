"""The input of the pre-block: item plus position, layer norm and dropout, for packed sequences."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from lares_fast._random import SITE_INPUT, Draw, drop_threshold, dropout_factor, keep_hidden_at
from lares_fast.reference.initial_state import token_places
from lares_fast.sequences import PAD

# A function with the arguments of :func:`lares_fast._random.keep_hidden_at`.
Mask = Callable[..., Tensor]


class Tables(NamedTuple):
    """The parameters: ``items`` [N, D], ``positions`` [L, D], and ``weight`` [D] and ``bias`` [D] of the layer norm."""

    items: Tensor
    positions: Tensor
    weight: Tensor
    bias: Tensor


class Tokens(NamedTuple):
    """P tokens: their ``items`` and ``positions`` [P] int64, and which numbers to keep, ``keep`` [P, D] bool or ``None``."""

    items: Tensor
    positions: Tensor
    keep: Tensor | None


def embedding(
    items: Tensor,
    offsets: Tensor,
    item_table: Tensor,
    position_table: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    draw: Draw | None = None,
    dropout: float = 0.0,
    eps: float = 1e-12,
) -> Tensor:
    """Return ``dropout(layer_norm(item_table[item] + position_table[position]))`` of packed sequences, [P, D].

    Sequence b is the ``items`` [P] with the numbers ``offsets[b]:offsets[b + 1]``. ``draw`` has one row for each sequence;
    ``None`` drops nothing. On a GPU a PAD gives a row of NaN.
    """
    tokens = tokens_of(items, offsets, draw, dropout, item_table.shape[1])
    return embed(tokens, Tables(item_table, position_table, weight, bias), dropout, eps)[0]


def tokens_of(
    items: Tensor, offsets: Tensor, draw: Draw | None, dropout: float, width: int, mask: Mask = keep_hidden_at
) -> Tokens:
    """Return the tokens of packed sequences, with the ``mask`` that ``draw`` addresses."""
    sequence, position = token_places(offsets, len(items))
    threshold = drop_threshold(dropout)
    if draw is None or not threshold:
        return Tokens(items, position, None)
    address = {"site": SITE_INPUT, "step": 0, "layer": 0, "width": width}
    return Tokens(items, position, mask(draw.key, threshold, **address, rows=draw.rows[sequence], positions=position))


class Saved(NamedTuple):
    """What the backward reads again: the ``sums`` [P, D] of item and position, and the factors of the dropout.

    ``factors`` are [P, D], or [0, D] without dropout.
    """

    sums: Tensor
    factors: Tensor


def embed(tokens: Tokens, tables: Tables, dropout: float, eps: float) -> tuple[Tensor, Saved]:
    """Return :func:`embedding` of ``tokens``, and what :func:`embed_backward` needs."""
    saved = saved_of(tokens, tables, dropout)
    x = F.layer_norm(saved.sums, tables.weight.shape, tables.weight, tables.bias, eps)
    return _dropped(tokens, x, saved), saved


def saved_of(tokens: Tokens, tables: Tables, dropout: float) -> Saved:
    """Return what :func:`embed_backward` needs."""
    sums = F.embedding(tokens.items, tables.items).add_(F.embedding(tokens.positions, tables.positions))
    keep = tokens.keep
    return Saved(
        sums, sums.new_empty(0, sums.shape[1]) if keep is None else dropout_factor(sums, keep, drop_threshold(dropout))
    )


def embed_backward(
    grad: Tensor, tokens: Tokens, tables: Tables, saved: Saved, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of the four ``tables`` for ``grad`` [P, D], the gradient of :func:`embed`.

    The formulas are written out, because autograd does not record the operations within an op.
    """
    x, shape = saved.sums, tables.weight.shape
    _, mean, rstd = torch.native_layer_norm(x, shape, tables.weight, tables.bias, eps)
    dx, d_weight, d_bias = torch.ops.aten.native_layer_norm_backward(
        _dropped(tokens, grad, saved), x, shape, mean, rstd, tables.weight, tables.bias, [True, True, True]
    )
    d_items, d_positions = (
        torch.ops.aten.embedding_dense_backward(dx, index, len(table), -1, False)
        for index, table in ((tokens.items, tables.items), (tokens.positions, tables.positions))
    )
    return d_items, d_positions, d_weight, d_bias


def _dropped(tokens: Tokens, x: Tensor, saved: Saved) -> Tensor:
    """Return ``x`` [P, D] after dropout. On a GPU, whose items the host does not read, the rows of a PAD are NaN."""
    x = x * saved.factors if len(saved.factors) else x
    return x if x.device.type == "cpu" else x.masked_fill((tokens.items == PAD)[:, None], torch.nan)
