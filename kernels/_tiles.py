"""Device functions that kernels share: tiles of rows, the causal mask, dropout of a tile.

A tile is the part of a row-major matrix that starts at a scalar ``base`` pointer. Only the base has 64 bits: within one
sequence, 32 bits are enough for offsets.
"""

import triton
import triton.language as tl
from lares_fast.kernels._random import keep_attention


@triton.jit
def load_rows(base, row, column, stride, rows, columns):
    """Load the tile [row, column] of a matrix with ``rows`` rows of ``columns`` columns; zero outside it."""
    inside = (row[:, None] < rows) & (column[None, :] < columns)
    return tl.load(base + row[:, None] * stride + column[None, :], mask=inside, other=0.0)


@triton.jit
def store_rows(base, tile, row, column, stride, rows, columns):
    """Store what :func:`load_rows` loads; nothing is written outside the matrix."""
    inside = (row[:, None] < rows) & (column[None, :] < columns)
    tl.store(base + row[:, None] * stride + column[None, :], tile.to(base.dtype.element_ty), mask=inside)


@triton.jit
def visible(query, key, length):
    """Return the mask [query, key]: a query sees itself and earlier keys of its sequence."""
    return (key[None, :] <= query[:, None]) & (key[None, :] < length)


@triton.jit
def dropout_factor(scale, SEED, threshold, step, layer, ROW, head, query, key, S: tl.constexpr):
    """Return a tile [S, S] of attention dropout from query ``query`` and key ``key`` on: ``scale`` where kept, else 0."""
    keep = keep_attention(tl.load(SEED), threshold, step, layer, tl.load(ROW), head, query, key, S, S)
    return tl.where(keep, scale, 0.0)
