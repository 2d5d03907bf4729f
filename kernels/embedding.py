"""The sum of item and position, its layer norm and dropout, for packed rows: one kernel forward, two backward.

A program of the row kernels has a tile of R rows of all D columns, in C = 64, 128 or 256 columns of registers. It finds the
sequence of each row by a search in OFFSETS, so the host reads nothing. The backward computes the norm again from the tables.

A row is NaN, and so are the gradients that it reaches, if its item or its position is not in the tables, or if it belongs to
no sequence. There are no atomics, so results do not depend on the order of programs.
"""

import torch
import triton
import triton.language as tl
from lares_fast.kernels._launch import cdiv, launch, ready
from lares_fast.kernels._packed import halvings, sequence_of
from lares_fast.kernels._random import keep_hidden_row

_SITE_INPUT = tl.constexpr(0)
# The numbers of a tile of rows, and the programs of the backward, each of which stores partial sums of the norm's gradients.
TILE, MOST_PARTS = 2048, 512
# The columns of a program that sums over rows, and the rows that it loads at a time.
COLUMNS, SUMMED = 16, 512
_SIZES = ["P", "S", "N", "L", "steps", "threshold"]


@triton.jit
def _place(ITEMS, OFFSETS, row, P, S, N, L, steps):
    """Return (item, position, sequence, valid) of packed rows. Items and positions are in the tables, and 0 if not valid."""
    sequence, position, valid = sequence_of(row, OFFSETS, P, S, steps)
    item = tl.load(ITEMS + row, mask=row < P, other=0)
    valid = valid & (position < L) & (item > 0) & (item < N)
    return tl.where(valid, item, 0), tl.where(valid, position, 0), sequence, valid


@triton.jit
def _norm(TABLE, POSITIONS, item, position, inside, column, eps, D: tl.constexpr):
    """Return the normalised sums [R, C], with 0 outside, and the reciprocals [R, 1] of their standard deviations."""
    x = tl.load(TABLE + item[:, None] * D + column, mask=inside, other=0.0).to(tl.float32)
    x += tl.load(POSITIONS + position[:, None] * D + column, mask=inside, other=0.0).to(tl.float32)
    x -= (tl.sum(x, 1) / D)[:, None]
    x = tl.where(inside, x, 0.0)
    rstd = (1 / tl.sqrt(tl.sum(x * x, 1) / D + eps))[:, None]
    return x * rstd, rstd


@triton.jit
def _dropout_factor(SEED, ROWS, sequence, position, threshold, kept, R: tl.constexpr, C: tl.constexpr):
    """Return the factors [R, C] of the input dropout: ``kept`` or 0."""
    keep = keep_hidden_row(tl.load(SEED), threshold, _SITE_INPUT, 0, 0, tl.load(ROWS + sequence), position, R, C)
    return tl.where(keep, kept, 0.0)


@triton.jit(do_not_specialize=_SIZES)
def embedding_forward(
    ITEMS, OFFSETS, TABLE, POSITIONS, WEIGHT, BIAS, ROWS, SEED, OUT, P, S, N, L, steps, threshold, kept, eps,
    D: tl.constexpr, C: tl.constexpr, R: tl.constexpr, DROP: tl.constexpr,
):  # fmt: skip
    """Fill OUT [P, D]."""
    row = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    column = tl.arange(0, C)[None, :]
    inside = (row < P)[:, None] & (column < D)
    item, position, sequence, valid = _place(ITEMS, OFFSETS, row, P, S, N, L, steps)
    y, _ = _norm(TABLE, POSITIONS, item, position, inside, column, eps, D)
    y = y * tl.load(WEIGHT + column, mask=column < D, other=0.0).to(tl.float32)
    y += tl.load(BIAS + column, mask=column < D, other=0.0).to(tl.float32)
    if DROP:
        y *= _dropout_factor(SEED, ROWS, sequence, position, threshold, kept, R, C)
    y = tl.where(valid[:, None], y, float("nan"))
    tl.store(OUT + row[:, None] * D + column, y.to(OUT.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=[*_SIZES, "tiles"])
def embedding_backward_rows(
    ITEMS, OFFSETS, TABLE, POSITIONS, WEIGHT, ROWS, SEED, DOUT, DSUM, PLACES, PARTS, P, S, N, L, steps, threshold, kept, eps,
    tiles, D: tl.constexpr, C: tl.constexpr, R: tl.constexpr, DROP: tl.constexpr,
):  # fmt: skip
    """Fill DSUM [P, D], the gradient of the sums; PLACES [P], the rows of the item table to which they belong; and PARTS.

    PARTS [programs, 2, D] holds partial sums of the gradients of the norm's weight and bias. A program has ``tiles`` tiles.
    """
    column = tl.arange(0, C)[None, :]
    weight = tl.load(WEIGHT + column, mask=column < D, other=0.0).to(tl.float32)
    d_weight = tl.zeros((C,), tl.float32)
    d_bias = tl.zeros((C,), tl.float32)
    for tile in range(tiles):
        row = (tl.program_id(0).to(tl.int64) * tiles + tile) * R + tl.arange(0, R)
        inside = (row < P)[:, None] & (column < D)
        item, position, sequence, valid = _place(ITEMS, OFFSETS, row, P, S, N, L, steps)
        x, rstd = _norm(TABLE, POSITIONS, item, position, inside, column, eps, D)
        dout = tl.load(DOUT + row[:, None] * D + column, mask=inside, other=0.0).to(tl.float32)
        if DROP:
            dout *= _dropout_factor(SEED, ROWS, sequence, position, threshold, kept, R, C)
        dout = tl.where(inside & (valid == 0)[:, None], float("nan"), dout)
        d_weight += tl.sum(dout * x, 0)
        d_bias += tl.sum(dout, 0)
        dx = dout * weight
        dx -= (tl.sum(dx, 1) / D)[:, None] + x * (tl.sum(dx * x, 1) / D)[:, None]
        tl.store(DSUM + row[:, None] * D + column, (dx * rstd).to(DSUM.dtype.element_ty), mask=inside)
        tl.store(PLACES + row, item, mask=row < P)
    part = PARTS + tl.program_id(0).to(tl.int64) * 2 * D + tl.arange(0, C)
    tl.store(part, d_weight, mask=tl.arange(0, C) < D)
    tl.store(part + D, d_bias, mask=tl.arange(0, C) < D)


@triton.jit(do_not_specialize=["P", "S", "L", "parts"])
def embedding_backward_sums(
    OFFSETS, DSUM, PARTS, DPOSITIONS, DNORM, P, S, L, parts, D: tl.constexpr, C: tl.constexpr, R: tl.constexpr
):
    """Fill DPOSITIONS [L, D], the sums of DSUM over the rows of a position, and DNORM [2, D], the sums of PARTS.

    A program has C columns of one row of a result. Sequence by sequence it adds the row at its position.
    """
    blocks = (D + C - 1) // C
    which = (tl.program_id(0) // blocks).to(tl.int64)
    column = (tl.program_id(0) % blocks * C + tl.arange(0, C))[None, :]
    total = tl.zeros((R, C), tl.float32)
    if which < L:
        for first in range(0, S, R):
            sequence = first + tl.arange(0, R)
            begin = tl.load(OFFSETS + sequence, mask=sequence < S, other=0)
            row = begin + which
            here = (begin >= 0) & (row >= 0) & (row < tl.load(OFFSETS + sequence + 1, mask=sequence < S, other=0)) & (row < P)
            total += tl.load(DSUM + row[:, None] * D + column, mask=here[:, None] & (column < D), other=0.0).to(tl.float32)
        out = DPOSITIONS + which * D + column
        tl.store(out, tl.sum(total, 0)[None, :].to(DPOSITIONS.dtype.element_ty), mask=column < D)
    else:
        for first in range(0, parts, R):
            part = first + tl.arange(0, R)
            at = (part[:, None] * 2 + which - L) * D + column
            total += tl.load(PARTS + at, mask=(part < parts)[:, None] & (column < D), other=0.0)
        out = DNORM + (which - L) * D + column
        tl.store(out, tl.sum(total, 0)[None, :].to(DNORM.dtype.element_ty), mask=column < D)


def forward(call):
    """Return the rows [P, D] of an ``EmbeddingCall``, whose ``rows`` and ``seed`` are None without dropout."""
    tensors, numbers, constants = _plan(call)
    P, D = len(call.items), constants["D"]
    out = torch.empty(P, D, dtype=call.item_table.dtype, device=call.item_table.device)
    bias = ready(call.bias.detach())
    programs = cdiv(P, constants["R"])
    launch(embedding_forward, programs, *tensors[:5], bias, *tensors[5:], out, *numbers, warps=4, **constants)
    return out


def backward(call, grad):
    """Return the gradients of the item table, the position table, the weight and the bias for ``grad`` [P, D]."""
    tensors, numbers, constants = _plan(call)
    P, S, N, L, *_ = numbers
    D, table = constants["D"], tensors[2]
    # The tiles are shared out evenly.
    tiles = cdiv(P, constants["R"])
    each = cdiv(tiles, MOST_PARTS)
    parts = cdiv(tiles, each) if tiles else 0
    d_sum, places = torch.empty(P, D, dtype=table.dtype, device=table.device), torch.empty_like(tensors[0])
    partial = torch.empty(parts, 2, D, dtype=torch.float32, device=table.device)
    d_positions, d_norm = torch.empty_like(tensors[3]), torch.empty(2, D, dtype=table.dtype, device=table.device)
    launch(embedding_backward_rows, parts, *tensors, ready(grad), d_sum, places, partial, *numbers, each, warps=4, **constants)
    launch(
        embedding_backward_sums, (L + 2) * cdiv(D, COLUMNS), tensors[1], d_sum, partial, d_positions, d_norm, P, S, L,
        parts, warps=8, D=D, C=COLUMNS, R=SUMMED,
    )  # fmt: skip
    # This operation sorts the rows by their place and adds them in this order. It uses no atomics.
    d_items = torch.ops.aten.embedding_dense_backward(d_sum, places, N, -1, False) if P else torch.zeros_like(table)
    return d_items, d_positions, d_norm[0], d_norm[1]


def _plan(call):
    """Return (the tensors that the row kernels read, the numbers they take, their constants); the bias is left out."""
    tables = [ready(x.detach()) for x in (call.item_table, call.position_table, call.weight)]
    drawn = [None if x is None else ready(x) for x in (call.rows, call.seed)]
    tensors = (ready(call.items), ready(call.offsets), *tables, *drawn)
    (N, D), L, S = tables[0].shape, len(tables[1]), len(call.offsets) - 1
    kept = 1 / (1 - call.threshold / 65536)
    numbers = (len(call.items), S, N, L, halvings(S), call.threshold, kept, call.eps)
    C = max(64, triton.next_power_of_2(D))
    return tensors, numbers, {"D": D, "C": C, "R": TILE // C, "DROP": call.seed is not None}
