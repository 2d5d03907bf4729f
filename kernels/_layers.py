"""Transformer layers on a tile of whole sequences, as device functions that the forward and the backward share.

A tile has R = 16 G rows in the shape [G, 16, ...]. A product is then G products of 16 rows, one for each warp. One product of
R rows would become WGMMA on Hopper and tcgen05 on Blackwell, which some versions of ptxas and Triton compile wrongly. Sequences
begin at tile rows that are multiples of 4, so that one call of the generator covers 4 queries of one sequence.

The weights of a layer are in the order of lares_fast/reference/weights.py. Each half has its matrices, biases and norm:

- the attention half: query, key, value and output [D, D] each, 4 D biases, and 2 D numbers of the norm;
- the feed-forward half: up [INNER, D] and down [D, INNER], INNER + D biases, and 2 D numbers of the norm.

W points at weights in the dtype of products, and V at the same weights as the caller gave them. Matrices are read from W, and
biases and norms from V. The two are one tensor unless the call has ``bf16``.
"""

import triton
import triton.language as tl
from lares_fast.kernels._random import keep_attention_pairs, keep_hidden

LOG2E = tl.constexpr(1.4426950408889634)
# The columns of a head or of the inner layer that are computed at a time. More columns would not fit into the registers.
PIECE = tl.constexpr(32)
SITE_ATTENTION_OUT = tl.constexpr(1)
SITE_FEED_FORWARD_OUT = tl.constexpr(2)


@triton.jit
def tile_rows(G: tl.constexpr):
    """Return the numbers [G, 16] of a tile's rows."""
    return tl.arange(0, G)[:, None] * 16 + tl.arange(0, 16)[None, :]


@triton.jit
def owners(row, BEGIN, low, high):
    """Return (sequence, its first row in the tile) for the tile rows ``row``.

    The sequences of the tile are ``low`` to ``high - 1``. Rows after the last sequence are counted as rows of it.
    """
    sequence, begin = row * 0 + low, row * 0
    for b in range(low + 1, high):
        first = tl.load(BEGIN + b)
        sequence = tl.where(row >= first, b, sequence)
        begin = tl.where(row >= first, first, begin)
    return sequence, begin


@triton.jit
def drop_places(BEGIN, ROWS, low, high, G: tl.constexpr):
    """Return the parts of dropout addresses: for hidden dropout the batch row and the position of each tile row, [16 G].

    For attention dropout they are the batch row of each quad of queries [4 G], the number of the quad within its sequence
    [4 G], and the number of each pair of keys within its sequence [8 G].
    """
    flat = tl.arange(0, 16 * G)
    sequence, begin = owners(flat, BEGIN, low, high)
    four = tl.arange(0, 4 * G) * 4
    of_four, begin_four = owners(four, BEGIN, low, high)
    two = tl.arange(0, 8 * G) * 2
    _, begin_two = owners(two, BEGIN, low, high)
    rows, quad_rows = tl.load(ROWS + sequence), tl.load(ROWS + of_four)
    return rows, flat - begin, quad_rows, (four - begin_four) // 4, (two - begin_two) // 2


@triton.jit
def rows_times(x, w, G: tl.constexpr):
    """Return x [G, 16, K] times one matrix w [K, N], [G, 16, N] fp32."""
    K: tl.constexpr = w.shape[0]
    N: tl.constexpr = w.shape[1]
    if w.dtype == tl.float32:
        # fp32 uses no tensor cores, so G products are not faster, and G copies of w would fill the shared memory.
        return tl.reshape(tl.dot(tl.reshape(x.to(w.dtype), (16 * G, K)), w, input_precision="ieee"), (G, 16, N))
    return tl.dot(x.to(w.dtype), tl.broadcast_to(w[None], (G, K, N)), input_precision="ieee")


@triton.jit
def matrix(base, rows: tl.constexpr, columns: tl.constexpr, stride):
    """Load the [rows, columns] matrix at ``base``."""
    return tl.load(base + tl.arange(0, rows)[:, None] * stride + tl.arange(0, columns)[None, :])


@triton.jit
def vector(base, size: tl.constexpr):
    """Load ``size`` numbers at ``base`` as fp32, in a shape that broadcasts over rows."""
    return tl.load(base + tl.arange(0, size)).to(tl.float32)[None, None, :]


@triton.jit
def load_tile(base, source, real, STRIDE: tl.constexpr, C: tl.constexpr = None):
    """Load the first C numbers of the rows ``source`` [G, 16] as [G, 16, C] fp32, with 0 for rows that are not ``real``.

    Rows are STRIDE numbers apart, and STRIDE is also the default of C.
    """
    COLUMNS: tl.constexpr = STRIDE if C is None else C
    at = source[:, :, None] * STRIDE + tl.arange(0, COLUMNS)[None, None, :]
    return tl.load(base + at, mask=real[:, :, None], other=0.0).to(tl.float32)


@triton.jit
def store_tile(base, tile, source, real, STRIDE: tl.constexpr):
    """Store ``tile`` where :func:`load_tile` loads it."""
    at = source[:, :, None] * STRIDE + tl.arange(0, tile.shape[2])[None, None, :]
    tl.store(base + at, tile.to(base.dtype.element_ty), mask=real[:, :, None])


@triton.jit
def standardise(x, eps, D: tl.constexpr):
    """Return x [G, 16, D] scaled to mean 0 and standard deviation 1, and the reciprocal [G, 16] of its standard deviation."""
    x -= (tl.sum(x, 2) / D)[:, :, None]
    inverse = 1 / tl.sqrt(tl.sum(x * x, 2) / D + eps)
    return x * inverse[:, :, None], inverse


@triton.jit
def layer_norm(x, base, eps, D: tl.constexpr):
    """Return the layer norm of x [G, 16, D] with weight and bias at ``base``."""
    return standardise(x, eps, D)[0] * vector(base, D) + vector(base + D, D)


@triton.jit
def hidden_factor(SEED, threshold, kept, site, step, layer, row, position, D: tl.constexpr, G: tl.constexpr):
    """Return [G, 16, D]: ``kept`` where a hidden activation stays, else 0. ``row`` and ``position`` are [16 G]."""
    seed = tl.load(SEED)
    keep = keep_hidden(seed, threshold, site, step, layer, row, position, 0, 16 * G)
    if D == 128:
        other = keep_hidden(seed, threshold, site, step, layer, row, position, 64, 16 * G)
        keep = tl.reshape(tl.permute(tl.join(keep, other), (0, 2, 1)), (16 * G, 128))
    return tl.where(tl.reshape(keep, (G, 16, D)), kept, 0.0)


@triton.jit
def attention_factor(SEED, threshold, kept, step, layer, row, head, quad, pair, G: tl.constexpr):
    """Return [G, 16, 16 G]: ``kept`` where an attention probability stays, else 0."""
    keep = keep_attention_pairs(tl.load(SEED), threshold, step, layer, row, head, quad, pair, 16 * G, 16 * G)
    return tl.where(tl.reshape(keep, (G, 16, 16 * G)), kept, 0.0)


@triton.jit
def normal_below(u):
    """Return the normal distribution function at u, accurate to 1e-8: the GELU of u is u times it.

    It is half of 2^(a P(a)) for u = -a, with the polynomial P of csrc/recurrence/gelu.h. Beyond 8 the tail is 0.
    """
    a = tl.minimum(tl.abs(u), 8.0)
    p = -2.84171074e-6 * a + 3.94601884e-5
    p = p * a - 1.86578094e-4
    p = p * a - 1.35957991e-4
    p = p * a + 7.06211245e-3
    p = p * a - 5.24952449e-2
    p = p * a - 0.459208518
    p = p * a - 1.15110517
    half = tl.exp2(p * a - 1)
    return tl.where(u < 0, half, 1 - half)


@triton.jit
def linear(x, W, BIAS, D: tl.constexpr, C: tl.constexpr, G: tl.constexpr):
    """Return C outputs [G, 16, C] fp32 of a linear map of x [G, 16, D] whose weights are the C rows at ``W``."""
    return rows_times(x, tl.trans(matrix(W, C, D, D)), G) + vector(BIAS, C)


@triton.jit
def probabilities(x, W, BIAS, head, begin, scale, D: tl.constexpr, E: tl.constexpr, G: tl.constexpr):
    """Return the causal softmax [G, 16, 16 G] of a head's scores: a row sees the rows of its sequence up to itself."""
    C: tl.constexpr = min(E, PIECE)
    scores = tl.zeros((G, 16, 16 * G), tl.float32)
    for c in range(head * E, head * E + E, C):
        q = linear(x, W + c * D, BIAS + c, D, C, G)
        k = linear(x, W + (D + c) * D, BIAS + D + c, D, C, G)
        scores += rows_times(q * scale, tl.trans(tl.reshape(k.to(x.dtype), (16 * G, C))), G)
    column = tl.arange(0, 16 * G)[None, None, :]
    seen = (column >= begin[:, :, None]) & (column <= tile_rows(G)[:, :, None])
    scores = tl.where(seen, scores, -float("inf"))
    p = tl.exp2(scores - tl.max(scores, 2)[:, :, None])
    return p / tl.sum(p, 2)[:, :, None]


@triton.jit
def attend(
    x, W, V, begin, scale, SEED, threshold, kept, step, layer, quad_row, quad, pair,
    D: tl.constexpr, E: tl.constexpr, G: tl.constexpr, DROP: tl.constexpr,
):  # fmt: skip
    """Return the attention's output projection [G, 16, D].

    Without dropout the result includes x, so that the registers hold one sum instead of two.
    """
    out = tl.zeros((G, 16, D), tl.float32) if DROP else x
    x = x.to(W.dtype.element_ty)
    C: tl.constexpr = min(E, PIECE)
    PROJECT = W + 3 * D * D
    BIAS = V + 4 * D * D
    for head in range(0, D // E):
        p = probabilities(x, W, BIAS, head, begin, scale, D, E, G)
        if DROP:
            p *= attention_factor(SEED, threshold, kept, step, layer, quad_row, head, quad, pair, G)
        for c in range(head * E, head * E + E, C):
            v = linear(x, W + (2 * D + c) * D, BIAS + 2 * D + c, D, C, G)
            o = rows_times(p.to(x.dtype), tl.reshape(v.to(x.dtype), (16 * G, C)), G)
            out += rows_times(o, tl.trans(matrix(PROJECT + c, D, C, D)), G)
    return out + vector(BIAS + 3 * D, D)


@triton.jit
def feed(x, W, V, D: tl.constexpr, INNER: tl.constexpr, G: tl.constexpr, DROP: tl.constexpr):
    """Return the second product [G, 16, D] of the feed-forward half, whose weights are at W and V.

    Without dropout the result includes x, as in :func:`attend`.
    """
    DTYPE: tl.constexpr = W.dtype.element_ty
    out = tl.zeros((G, 16, D), tl.float32) if DROP else x
    x = x.to(DTYPE)
    DOWN = W + INNER * D
    BIAS = V + 2 * INNER * D
    for i in range(0, INNER, PIECE):
        u = linear(x, W + i * D, BIAS + i, D, PIECE, G)
        out += rows_times(u * normal_below(u), tl.trans(matrix(DOWN + i, D, PIECE, INNER)), G)
    return out + vector(BIAS + INNER, D)
