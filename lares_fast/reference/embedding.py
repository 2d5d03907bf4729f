"""The input of the pre-block: item plus position, layer norm and dropout, for packed sequences."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from lares_fast._random import SITE_INPUT, Draw, apply_dropout, drop_threshold, keep_hidden_at
from lares_fast.reference.initial_state import token_places
from lares_fast.sequences import PAD


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
    return embed(tokens, Tables(item_table, position_table, weight, bias), dropout, eps)


def tokens_of(items: Tensor, offsets: Tensor, draw: Draw | None, dropout: float, width: int) -> Tokens:
    """Return the tokens of packed sequences, with the mask that ``draw`` addresses."""
    sequence, position = token_places(offsets, len(items))
    threshold = drop_threshold(dropout)
    if draw is None or not threshold:
        return Tokens(items, position, None)
    address = {"site": SITE_INPUT, "step": 0, "layer": 0, "width": width}
    return Tokens(items, position, keep_hidden_at(draw.key, threshold, **address, rows=draw.rows[sequence], positions=position))


def embed(tokens: Tokens, tables: Tables, dropout: float, eps: float) -> Tensor:
    """Return :func:`embedding` of ``tokens``."""
    x = F.layer_norm(_sum(tokens, tables), tables.weight.shape, tables.weight, tables.bias, eps)
    return _nan_for_pad(tokens, _dropped(tokens, x, dropout))


def embed_backward(
    grad: Tensor, tokens: Tokens, tables: Tables, dropout: float, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of the four ``tables`` for ``grad`` [P, D], the gradient of :func:`embed`.

    The formulas are written out, because autograd does not record the operations within an op.
    """
    x, shape = _sum(tokens, tables), tables.weight.shape
    _, mean, rstd = torch.native_layer_norm(x, shape, tables.weight, tables.bias, eps)
    grad = _nan_for_pad(tokens, _dropped(tokens, grad, dropout))
    dx, d_weight, d_bias = torch.ops.aten.native_layer_norm_backward(
        grad, x, shape, mean, rstd, tables.weight, tables.bias, [True, True, True]
    )
    d_items, d_positions = (
        torch.ops.aten.embedding_dense_backward(dx, index, len(table), -1, False)
        for index, table in ((tokens.items, tables.items), (tokens.positions, tables.positions))
    )
    return d_items, d_positions, d_weight, d_bias


def _sum(tokens: Tokens, tables: Tables) -> Tensor:
    return F.embedding(tokens.items, tables.items) + F.embedding(tokens.positions, tables.positions)


def _dropped(tokens: Tokens, x: Tensor, dropout: float) -> Tensor:
    return x if tokens.keep is None else apply_dropout(x, tokens.keep, drop_threshold(dropout))


def _nan_for_pad(tokens: Tokens, x: Tensor) -> Tensor:
    """Return ``x`` [P, D] with NaN in the rows of a PAD on a GPU, whose items the host does not read."""
    return x if x.device.type == "cpu" else x.masked_fill((tokens.items == PAD)[:, None], torch.nan)
