"""Device functions that kernels share: tiles of rows, the causal mask, and the dropout of a tile.

A tile is a part of a row-major matrix that starts at a scalar pointer ``base``. Only the base has 64 bits, because 32 bits are
enough for the offsets within one sequence.
"""

import triton
import triton.language as tl
from lares_fast.kernels._random import keep_attention


@triton.jit
def load_rows(base, row, column, stride, rows, columns):
    """Load the tile [row, column] of a matrix with ``rows`` rows of ``columns`` columns, with 0 outside of the matrix."""
    inside = (row[:, None] < rows) & (column[None, :] < columns)
    return tl.load(base + row[:, None] * stride + column[None, :], mask=inside, other=0.0)


@triton.jit
def store_rows(base, tile, row, column, stride, rows, columns):
    """Store a tile where :func:`load_rows` loads it. Nothing is written outside of the matrix."""
    inside = (row[:, None] < rows) & (column[None, :] < columns)
    tl.store(base + row[:, None] * stride + column[None, :], tile.to(base.dtype.element_ty), mask=inside)


@triton.jit
def visible(query, key, length):
    """Return the mask [query, key]: a query sees itself and earlier keys of its sequence."""
    return (key[None, :] <= query[:, None]) & (key[None, :] < length)


@triton.jit
def dropout_factor(scale, SEED, threshold, step, layer, ROW, head, query, key, S: tl.constexpr):
    """Return the factors [S, S] of attention dropout from ``query`` and ``key`` on: ``scale`` where kept, else 0."""
    keep = keep_attention(tl.load(SEED), threshold, step, layer, tl.load(ROW), head, query, key, S, S)
    return tl.where(keep, scale, 0.0)
