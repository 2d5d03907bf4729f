"""The gradients of the recurrence, step by step from the last step to the first, with two launches a step.

``step_backward`` computes a step again from its saved state and runs it backwards through all layers and the adapter. The
gradient of a weight is a product of two matrices over all rows. The kernel stores these matrices, and ``weight_gradients``
multiplies them. ``collect_gradients`` adds the parts of the weights' gradients after the last launch of these two.

The rows are split into slots, and every slot has a sum of its own. Norms and the gate of ``linear`` have sums of their own for
each tile. One program computes an element of such a sum, always in the same order. There are no atomics.
"""

import torch
import triton
import triton.language as tl
from lares_fast.kernels._launch import WARPS, launch, ready
from lares_fast.kernels._layers import (
    PIECE,
    SITE_ATTENTION_OUT,
    SITE_FEED_FORWARD_OUT,
    attend,
    attention_factor,
    drop_places,
    feed,
    hidden_factor,
    layer_norm,
    linear,
    load_tile,
    matrix,
    probabilities,
    rows_times,
    standardise,
    store_tile,
    vector,
)
from lares_fast.kernels._recurrence_plan import (
    DEEPEST,
    VALID,
    Plan,
    begins_of,
    out_rows_of,
    steps_of,
    tile_bounds,
)
from lares_fast.kernels.recurrence import Tape, fill_rows, join, places

# The smallest number of rows of a slot, and the number of programs from which on there are no more slots.
SLOT_ROWS, MOST_PROGRAMS = 128, 1024
# The side of a tile of a weight's gradient, and the columns of a program of ``collect_gradients`` and its rows at a time.
SIDE, COLUMNS, ROWS = tl.constexpr(64), tl.constexpr(32), tl.constexpr(64)

_SIZES = ["P", "B", "t", "first_step", "deepest", "layers", "threshold", "attention_threshold"]
_SIZES += ["rows", "slots", "tiles", "size", "total"]

# The factors of the weights' gradients that a row of a layer stores, in this order: the gradients of queries, keys and values
# (3 D), of the output projection (D), of the first product of the feed-forward half (INNER) and of the second one (D); then
# what was multiplied: the input of the layer (D), the context (D), the input of the feed-forward half (D), and GELU (INNER).
# For ``concat`` there are 3 D numbers more after those of all layers: the gradient of its product, the state, and ``pre``.


def factors_width(D, INNER):
    """Return the number of factors that a row of a layer stores."""
    return 8 * D + 2 * INNER


def partial_width(D, layers):
    """Return the numbers of a tile's sums: two norms of each layer, then the norm after the adapter, then the gate, padded."""
    return (4 * layers + 2) * D + 64


@triton.jit
def norm_backward(r, dy, base, PARTIAL, eps, D: tl.constexpr):
    """Return the gradient of r, the input of a layer norm with weight and bias at ``base``.

    ``dy`` is the gradient of the output. The gradients of weight and bias are added to PARTIAL [2, D].
    """
    x, inverse = standardise(r, eps, D)
    column = tl.arange(0, D)
    weight = tl.load(PARTIAL + column) + tl.sum(tl.sum(dy * x, 1), 0)
    # All threads must have loaded before one of them stores.
    tl.debug_barrier()
    tl.store(PARTIAL + column, weight)
    bias = tl.load(PARTIAL + D + column) + tl.sum(tl.sum(dy, 1), 0)
    tl.debug_barrier()
    tl.store(PARTIAL + D + column, bias)
    dx = dy * vector(base, D)
    return inverse[:, :, None] * (dx - (tl.sum(dx, 2) / D)[:, :, None] - x * (tl.sum(dx * x, 2) / D)[:, :, None])


@triton.jit
def attention_backward(
    x, dsum, W, V, FACTORS, CONTEXT, begin, scale, SEED, threshold, kept, step, layer, source, real, quad_row, quad, pair,
    D: tl.constexpr, E: tl.constexpr, G: tl.constexpr, WIDTH: tl.constexpr, DROP: tl.constexpr,
):  # fmt: skip
    """Store the context, and the gradients of queries, keys and values at FACTORS.

    ``dsum`` is the gradient of the output projection.
    """
    DTYPE: tl.constexpr = W.dtype.element_ty
    C: tl.constexpr = min(E, PIECE)
    BIAS = V + 4 * D * D
    for head in range(0, D // E):
        p = probabilities(x, W, BIAS, head, begin, scale, D, E, G)
        dp = tl.zeros((G, 16, 16 * G), tl.float32)
        if DROP:
            factor = attention_factor(SEED, threshold, kept, step, layer, quad_row, head, quad, pair, G)
            weights = (p * factor).to(DTYPE)
        else:
            weights = p.to(DTYPE)
        turned = tl.reshape(tl.trans(tl.reshape(weights, (16 * G, 16 * G))), (G, 16, 16 * G))
        for c in range(head * E, head * E + E, C):
            v = tl.reshape(linear(x, W + (2 * D + c) * D, BIAS + 2 * D + c, D, C, G).to(DTYPE), (16 * G, C))
            store_tile(CONTEXT + c, rows_times(weights, v, G), source, real, WIDTH)
            dcontext = rows_times(dsum, matrix(W + 3 * D * D + c, D, C, D), G).to(DTYPE)
            dp += rows_times(dcontext, tl.trans(v), G)
            dv = rows_times(turned, tl.reshape(dcontext, (16 * G, C)), G)
            store_tile(FACTORS + 2 * D + c, dv, source, real, WIDTH)
        if DROP:
            dp *= factor
        dp -= tl.sum(dp * p, 2)[:, :, None]
        # The mean of the differences is 0. Subtracting it removes the rounding error of the mean before.
        ds = p * (dp - tl.sum(dp * p, 2)[:, :, None]) * (scale * 0.6931471805599453)
        ds = ds.to(DTYPE)
        turned = tl.reshape(tl.trans(tl.reshape(ds, (16 * G, 16 * G))), (G, 16, 16 * G))
        for c in range(head * E, head * E + E, C):
            q = tl.reshape(linear(x, W + c * D, BIAS + c, D, C, G).to(DTYPE), (16 * G, C))
            k = tl.reshape(linear(x, W + (D + c) * D, BIAS + D + c, D, C, G).to(DTYPE), (16 * G, C))
            store_tile(FACTORS + c, rows_times(ds, k, G), source, real, WIDTH)
            store_tile(FACTORS + D + c, rows_times(turned, q, G), source, real, WIDTH)


@triton.jit
def feed_backward(
    x, dsum, W, V, FACTORS, source, real,
    D: tl.constexpr, INNER: tl.constexpr, G: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Return the gradient of the half's input through its products, and store their factors.

    ``dsum`` is the gradient of the second product. W and V point at the weights of the half.
    """
    BIAS = V + 2 * INNER * D
    dx = tl.zeros((G, 16, D), tl.float32)
    for i in range(0, INNER, PIECE):
        up = matrix(W + i * D, PIECE, D, D)
        u = rows_times(x, tl.trans(up), G) + vector(BIAS + i, PIECE)
        below = 0.5 * (1 + tl.erf(u * 0.7071067811865476))
        store_tile(FACTORS + WIDTH - INNER + i, u * below, source, real, WIDTH)
        slope = below + u * 0.3989422804014327 * tl.exp(-0.5 * u * u)
        du = rows_times(dsum, matrix(W + INNER * D + i, D, PIECE, INNER), G) * slope
        du = du.to(W.dtype.element_ty)
        store_tile(FACTORS + 4 * D + i, du, source, real, WIDTH)
        dx += rows_times(du, up, G)
    return dx


@triton.jit(do_not_specialize=_SIZES)
def step_backward(
    STATE, PRE, OFFSETS, TABLE, ROWS, SEED, WEIGHTS, VECTORS, OUT_GRAD, GRAD, DPRE, H_GRAD, PRE_GRAD, SUMS, FACTORS, PARTIAL,
    P, B, t, first_step, deepest, layers, eps, scale, threshold, kept, attention_threshold, attention_kept,
    D: tl.constexpr, E: tl.constexpr, INNER: tl.constexpr, G: tl.constexpr,
    KIND: tl.constexpr, OUTPUT: tl.constexpr, DROP: tl.constexpr,
):  # fmt: skip
    """Run step t backwards. STATE [P, D] is the state before it, and t counts from 0.

    GRAD [P, D] is the gradient of the state after the step without the gradient OUT_GRAD of the output, and becomes the
    gradient of the state before it. The gradient of ``pre`` is added to DPRE [P, D]. The launch for t = 0 stores both in H_GRAD
    and PRE_GRAD instead. SUMS [2 layers + 1, P, D] becomes the inputs of the norms. FACTORS becomes the factors of the weights'
    gradients. The gradients of norms and gate are added to the tile's sums in PARTIAL, which the launch for the step
    ``deepest - 1`` sets to 0 first.
    """
    WIDTH: tl.constexpr = 8 * D + 2 * INNER
    attention_size: tl.constexpr = 4 * D * D + 6 * D
    size: tl.constexpr = attention_size + 2 * INNER * D + INNER + 3 * D
    PARTIAL += tl.program_id(0).to(tl.int64) * ((4 * layers + 2) * D + 64)
    if t + 1 == deepest:
        for c in range(0, (4 * layers + 2) * D + 64, 64):
            tl.store(PARTIAL + c + tl.arange(0, 64), tl.zeros((64,), tl.float32))
    if tl.load(TABLE + VALID) == 0:
        # The output of an invalid sequence is NaN, and a gradient is a sum over all sequences. So all gradients become NaN.
        if t == 0:
            fill_rows(H_GRAD, float("nan"), 0, P, D)
            if KIND != "none":
                fill_rows(PRE_GRAD, float("nan"), 0, P, D)
        return
    low, high = tile_bounds(TABLE, B, tl.program_id(0))
    if low == high:
        return
    BEGIN = begins_of(TABLE, B)
    origin, sequence, begin, source, position, length = places(OFFSETS, BEGIN, low, high, G)
    depth = tl.load(steps_of(TABLE, B) + sequence)
    if tl.max(tl.max(depth, 1), 0) <= t:
        return
    real = (position < length) & (t < depth)
    if DROP:
        flat_row, flat_position, quad_row, quad, pair = drop_places(BEGIN, ROWS, low, high, G)
    else:
        flat_row, flat_position, quad_row, quad, pair = 0, 0, 0, 0, 0
    DTYPE: tl.constexpr = WEIGHTS.dtype.element_ty
    NORM = layers * size
    JOIN = FACTORS + layers * P.to(tl.int64) * WIDTH + origin * 3 * D
    JOIN_SUM = SUMS + (2 * layers * P.to(tl.int64) + origin) * D

    x = load_tile(STATE + origin * D, source, real, D)
    if KIND != "none":
        at = tl.multiple_of(NORM, 16)
        joined = join(x, PRE + origin * D, WEIGHTS + at + 2 * D, VECTORS + at + 2 * D, source, real, KIND, D, G)
        store_tile(JOIN_SUM, joined, source, real, D)
        if KIND == "concat":
            store_tile(JOIN + D, x, source, real, 3 * D)
            store_tile(JOIN + 2 * D, load_tile(PRE + origin * D, source, real, D), source, real, 3 * D)
        x = layer_norm(joined, VECTORS + at, eps, D)
    for layer in range(0, layers):
        at = tl.multiple_of(layer * size, 16)
        W, V = WEIGHTS + at, VECTORS + at
        row = layer * P.to(tl.int64) + origin
        store_tile(FACTORS + row * WIDTH + 5 * D + INNER, x, source, real, WIDTH)
        y = attend(
            x, W, V, begin, scale, SEED, attention_threshold, attention_kept, first_step + t, layer, quad_row, quad, pair,
            D, E, G, DROP,
        )  # fmt: skip
        if DROP:
            y = x + y * hidden_factor(
                SEED, threshold, kept, SITE_ATTENTION_OUT, first_step + t, layer, flat_row, flat_position, D, G
            )
        store_tile(SUMS + (row + layer * P.to(tl.int64)) * D, y, source, real, D)
        x = layer_norm(y, V + attention_size - 2 * D, eps, D)
        store_tile(FACTORS + row * WIDTH + 7 * D + INNER, x, source, real, WIDTH)
        W += attention_size
        V += attention_size
        y = feed(x, W, V, D, INNER, G, DROP)
        if DROP:
            y = x + y * hidden_factor(
                SEED, threshold, kept, SITE_FEED_FORWARD_OUT, first_step + t, layer, flat_row, flat_position, D, G
            )
        store_tile(SUMS + (row + (layer + 1) * P.to(tl.int64)) * D, y, source, real, D)
        x = layer_norm(y, V + 2 * INNER * D + INNER + D, eps, D)

    grad = load_tile(GRAD + origin * D, source, real & (t + 1 < depth), D)
    if OUTPUT == "tokens":
        grad += load_tile(OUT_GRAD + origin * D, source, real & (t + 1 == depth), D)
    elif OUTPUT == "last":
        grad += load_tile(OUT_GRAD, sequence.to(tl.int64), (position == length - 1) & (t + 1 == depth), D)
    else:
        out_row = tl.load(out_rows_of(TABLE, B) + sequence).to(tl.int64) + t
        grad += load_tile(OUT_GRAD, out_row, (position == length - 1) & (t < depth), D)

    tl.debug_barrier()
    for back in range(0, layers):
        layer = layers - 1 - back
        at = tl.multiple_of(layer * size, 16)
        W, V = WEIGHTS + at, VECTORS + at
        row = layer * P.to(tl.int64) + origin
        F = FACTORS + row * WIDTH
        NORMS = PARTIAL + layer * 4 * D

        y = load_tile(SUMS + (row + (layer + 1) * P.to(tl.int64)) * D, source, real, D)
        grad = norm_backward(y, grad, V + size - 2 * D, NORMS + 2 * D, eps, D)
        dsum = grad
        if DROP:
            dsum *= hidden_factor(
                SEED, threshold, kept, SITE_FEED_FORWARD_OUT, first_step + t, layer, flat_row, flat_position, D, G
            )
        store_tile(F + 4 * D + INNER, dsum, source, real, WIDTH)
        operand = load_tile(F + 7 * D + INNER, source, real, WIDTH, D).to(DTYPE)
        grad += feed_backward(
            operand, dsum.to(DTYPE), W + attention_size, V + attention_size, F, source, real, D, INNER, G, WIDTH
        )

        y = load_tile(SUMS + (row + layer * P.to(tl.int64)) * D, source, real, D)
        grad = norm_backward(y, grad, V + attention_size - 2 * D, NORMS, eps, D)
        # GRAD holds the gradient of the residual sum while the registers are needed for the attention.
        store_tile(GRAD + origin * D, grad, source, real, D)
        dsum = grad
        if DROP:
            dsum *= hidden_factor(
                SEED, threshold, kept, SITE_ATTENTION_OUT, first_step + t, layer, flat_row, flat_position, D, G
            )
        store_tile(F + 3 * D, dsum, source, real, WIDTH)
        operand = load_tile(F + 5 * D + INNER, source, real, WIDTH, D).to(DTYPE)
        attention_backward(
            operand, dsum.to(DTYPE), W, V, F, F + 6 * D + INNER, begin, scale, SEED, attention_threshold, attention_kept,
            first_step + t, layer, source, real, quad_row, quad, pair, D, E, G, WIDTH, DROP,
        )  # fmt: skip
        tl.debug_barrier()
        grad = load_tile(GRAD + origin * D, source, real, D)
        for k in range(0, 3 * D, PIECE):
            grad += rows_times(load_tile(F + k, source, real, WIDTH, PIECE), matrix(W + k * D, PIECE, D, D), G)

    if KIND != "none":
        at = tl.multiple_of(NORM, 16)
        d = norm_backward(load_tile(JOIN_SUM, source, real, D), grad, VECTORS + at, PARTIAL + layers * 4 * D, eps, D)
        if KIND == "concat":
            store_tile(JOIN, d, source, real, 3 * D)
            A = WEIGHTS + at + 2 * D
            grad = rows_times(d, matrix(A, D, D, 2 * D), G)
            dpre = rows_times(d, matrix(A + D, D, D, 2 * D), G)
        elif KIND == "linear":
            share = tl.sigmoid(tl.load(VECTORS + at + 2 * D).to(tl.float32))
            gap = load_tile(STATE + origin * D, source, real, D) - load_tile(PRE + origin * D, source, real, D)
            gate = tl.sum(tl.sum(tl.sum(d * gap, 2), 1), 0) * share * (1 - share)
            GATE = PARTIAL + (4 * layers + 2) * D
            gate += tl.load(GATE)
            tl.debug_barrier()
            tl.store(GATE, gate)
            grad, dpre = d * share, d * (1 - share)
        else:
            grad, dpre = d * 0.5, d * 0.5
        dpre += load_tile(DPRE + origin * D, source, real & (t + 1 < depth), D)
        tl.debug_barrier()
        if t == 0:
            store_tile(PRE_GRAD + origin * D, dpre, source, real, D)
        else:
            store_tile(DPRE + origin * D, dpre, source, real, D)
    tl.debug_barrier()
    if t == 0:
        store_tile(H_GRAD + origin * D, grad, source, real, D)
    else:
        store_tile(GRAD + origin * D, grad, source, real, D)


@triton.jit
def weight_tile(tile, layers, P, D: tl.constexpr, INNER: tl.constexpr):
    """Return the factors of tile ``tile`` of the weights' gradients, and where the tile is stored.

    The numbers are: the place of the first row's two factors, the distance of rows, the place of the sum, its distance of rows,
    and the place of the bias's sum, or -1.
    """
    N: tl.constexpr = D // SIDE
    inner: tl.constexpr = INNER // SIDE
    WIDTH: tl.constexpr = 8 * D + 2 * INNER
    attention_size: tl.constexpr = 4 * D * D + 6 * D
    size: tl.constexpr = attention_size + 2 * INNER * D + INNER + 3 * D
    of_layer: tl.constexpr = 4 * N * N + 2 * inner * N
    layer, k = tile // of_layer, tile % of_layer
    down = k - 4 * N * N - inner * N
    # The columns of a matrix that are counted in tiles, and the matrix: attention, up, down, or the product of ``concat``.
    concat, attention, last = layer == layers, k < 4 * N * N, down >= 0
    columns = tl.where(concat, 2 * N, tl.where(last & (attention == 0), inner, N))
    k = tl.where(concat | attention, k, tl.where(last, down, k - 4 * N * N))
    m, n = k // columns * SIDE, k % columns * SIDE
    a = tl.where(attention | concat, m, 4 * D + m + tl.where(last, INNER, 0))
    b = tl.where(attention, n + tl.where(m >= 3 * D, D, 0), n + tl.where(last, 3 * D, 2 * D))
    b = tl.where(concat, D + n, 5 * D + INNER + b)
    start = tl.where(attention, 0, attention_size + tl.where(last, INNER * D, 0))
    bias = tl.where(attention, 4 * D * D + m, attention_size + 2 * INNER * D + tl.where(last, INNER, 0) + m)
    start, bias = tl.where(concat, 2 * D, start), tl.where(concat, 2 * D + 2 * D * D + m, bias)
    stride, width = columns * SIDE, tl.where(concat, 3 * D, WIDTH)
    place = start + m * stride + n
    base = layer * P.to(tl.int64) * WIDTH
    at = layer * size
    return base + a, base + b, width, at + place, stride, tl.where(n == 0, at + bias, -1)


@triton.jit(do_not_specialize=_SIZES)
def weight_gradients(
    FACTORS, TABLE, ROW_STEPS, SLOTS, P, t, deepest, layers, rows, tiles, size,
    D: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    """Add the gradients of all weights in step t to the slots, or set the slots if t is the first step that is run.

    A program multiplies the factors of a tile [SIDE, SIDE] in the ``rows`` rows of a slot. Biases have column sums. SLOTS is
    [slots, size], in the order of the weights.
    """
    slot, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    if (t >= tl.load(TABLE + DEEPEST)) & (t + 1 < deepest):
        return
    a_place, b_place, width, place, stride, bias = weight_tile(tile, layers, P, D, INNER)
    width = tl.multiple_of(width, 16)
    start = slot.to(tl.int64) * rows
    row, side = tl.arange(0, 32), tl.arange(0, SIDE)
    A = FACTORS + tl.multiple_of(a_place, 16) + start * width + row[:, None] * width + side[None, :]
    B = FACTORS + tl.multiple_of(b_place, 16) + start * width + row[:, None] * width + side[None, :]
    total = tl.zeros((SIDE, SIDE), tl.float32)
    sums = tl.zeros((32, SIDE), tl.float32)
    for r in range(0, tl.minimum(rows, P - start).to(tl.int32), 32):
        inside = start + r + row < P
        real = (inside & (t < tl.load(ROW_STEPS + start + r + row, mask=inside, other=0)))[:, None]
        a = tl.load(A, mask=real, other=0.0)
        b = tl.load(B, mask=real, other=0.0)
        A += 32 * width
        B += 32 * width
        total += tl.dot(tl.trans(a), b, input_precision="ieee")
        sums += a.to(tl.float32)
    SLOT = SLOTS + slot.to(tl.int64) * tl.multiple_of(size, 16)
    at = tl.multiple_of(place, 16) + side[:, None] * tl.multiple_of(stride, 16) + side[None, :]
    if t + 1 < deepest:
        total += tl.load(SLOT + at)
    tl.debug_barrier()
    tl.store(SLOT + at, total)
    if bias >= 0:
        column = tl.sum(sums, 0)
        OF_BIAS = SLOT + tl.multiple_of(bias, 16) + side
        if t + 1 < deepest:
            column += tl.load(OF_BIAS)
        tl.debug_barrier()
        tl.store(OF_BIAS, column)


@triton.jit(do_not_specialize=_SIZES)
def collect_gradients(
    SLOTS, PARTIAL, TABLE, OUT, layers, slots, tiles, size, total,
    D: tl.constexpr, INNER: tl.constexpr, KIND: tl.constexpr,
):  # fmt: skip
    """Set OUT [total], the gradients of the weights, to the sums over the slots, or over the tiles for norms and gate."""
    attention_size: tl.constexpr = 4 * D * D + 6 * D
    of_layer: tl.constexpr = attention_size + 2 * INNER * D + INNER + 3 * D
    first = tl.program_id(0) * COLUMNS
    layer = first // of_layer
    inside = first % of_layer
    # The place among the sums of tiles, or -1.
    place = tl.full((), -1, tl.int32)
    if layer >= layers:
        inside = first - layers * of_layer
        if (inside < 2 * D) | (KIND == "linear"):
            place = 4 * layers * D + inside
    elif inside >= of_layer - 2 * D:
        place = layer * 4 * D + 2 * D + inside - (of_layer - 2 * D)
    elif (inside >= attention_size - 2 * D) & (inside < attention_size):
        place = layer * 4 * D + inside - (attention_size - 2 * D)
    SOURCE, parts, width = SLOTS + first, slots, size
    if place >= 0:
        SOURCE, parts, width = PARTIAL + place, tiles, (4 * layers + 2) * D + 64
    row, column = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    here = first + column < total
    sums = tl.zeros((ROWS, COLUMNS), tl.float32)
    for r in range(0, parts, ROWS):
        at = (r + row).to(tl.int64)[:, None] * width + column[None, :]
        sums += tl.load(SOURCE + at, mask=(r + row < parts)[:, None] & here[None, :], other=0.0)
    found = tl.where(tl.load(TABLE + VALID) == 0, float("nan"), tl.sum(sums, 0))
    tl.store(OUT + first + column, found.to(OUT.dtype.element_ty), mask=here)


def backward(call, products, grad, words):
    """Return the gradients of ``h``, ``pre`` (empty without ``pre``) and the weights.

    ``products`` are the weights in the dtype of products, ``grad`` is the gradient of the output, and ``words`` is the tape of
    the forward.
    """
    plan, grad = Plan(call, products), ready(grad)
    tape = Tape(plan, words)
    deepest = len(tape.states)
    h, layers, D, inner = call.h, call.n_layers, call.width, call.inner_size
    P, size = len(h), triton.cdiv(len(call.weights), 16) * 16
    # The tiles of all weights of matrices.
    squares = layers * (4 * D * D + 2 * inner * D) + (2 * D * D if call.adapter == "concat" else 0)
    weight_tiles = squares // SIDE.value**2
    slots = max(1, min(triton.cdiv(P, SLOT_ROWS), triton.cdiv(MOST_PROGRAMS, weight_tiles)))
    slot_rows = triton.cdiv(triton.cdiv(P, slots), 32) * 32

    def buffer(*shape, dtype=torch.float32):
        return torch.empty(shape, dtype=dtype, device=h.device)

    factors = buffer(P * (layers * factors_width(D, inner) + 3 * D * (call.adapter == "concat")), dtype=products.dtype)
    sums, state_grad, slot_sums = buffer(2 * layers + 1, P, D), buffer(P, D), buffer(slots, size)
    pre_sum = buffer(P, D) if call.pre is not None else None
    partial = buffer(plan.tiles, partial_width(D, layers))
    h_grad, pre_grad, weights_grad = call.empty_gradients()
    given = (call.pre, call.offsets, tape.table, call.rows, call.seed, products, call.weights, grad, state_grad, pre_sum)
    made = (h_grad, pre_grad if call.pre is not None else None, sums, factors, partial)
    for t in reversed(range(deepest)):
        plan.launch(
            step_backward, plan.tiles, tape.states[t], *given, *made, P, call.batch, t, call.first_step, deepest, layers,
            *plan.numbers(),
        )  # fmt: skip
        launch(
            weight_gradients, slots * weight_tiles, factors, tape.table, tape.row_steps, slot_sums, P, t, deepest, layers,
            slot_rows, weight_tiles, size, D=D, INNER=inner, warps=WARPS[products.dtype], choice=plan.choice,
        )  # fmt: skip
    launch(
        collect_gradients, triton.cdiv(len(call.weights), COLUMNS.value), slot_sums, partial, tape.table, weights_grad, layers,
        slots, plan.tiles, size, len(call.weights), D=D, INNER=inner, KIND=call.adapter, warps=4, choice=plan.choice,
    )  # fmt: skip
    return h_grad, pre_grad, weights_grad
