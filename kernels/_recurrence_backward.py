"""The gradients of the recurrence, step by step from the last step to the first, with two launches a step.

``step_backward`` computes a step again from its saved state and runs it backwards through all layers and the adapter. The
gradient of a weight is a product of two matrices over all rows. The kernel stores these matrices, and the kernels of
``_recurrence_weights.py`` multiply them. There are no atomics.
"""

import torch
import triton
import triton.language as tl
from lares_fast.kernels._launch import ready
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
    normal_below,
    probabilities,
    rows_times,
    standardise,
    store_tile,
    vector,
)
from lares_fast.kernels._recurrence_plan import (
    VALID,
    Plan,
    begins_of,
    out_rows_of,
    steps_of,
    tile_bounds,
)
from lares_fast.kernels._recurrence_weights import WeightGradients
from lares_fast.kernels.recurrence import Tape, fill_rows, join, places

_SIZES = ["P", "B", "t", "first_step", "deepest", "layers", "threshold", "attention_threshold"]


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
    if W.dtype.element_ty == tl.float32:
        # Triton 3.6 cannot compile products in fp32 if the addresses in these loops are equal to addresses behind them.
        source = tl.where(real, source, 0)
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
        below = normal_below(u)
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


def backward(call, products, grad, words):
    """Return the gradients of ``h``, ``pre`` (empty without ``pre``) and the weights.

    ``products`` are the weights in the dtype of products, ``grad`` is the gradient of the output, and ``words`` is the tape of
    the forward.
    """
    plan, grad = Plan(call, products), ready(grad)
    tape = Tape(plan, words)
    deepest, P, layers = len(tape.states), len(call.h), call.n_layers
    weights = WeightGradients(plan, tape)
    state_grad, pre_sum = (torch.empty_like(call.h, dtype=torch.float32) for _ in range(2))
    sums = state_grad.new_empty(2 * layers + 1, P, call.width)
    h_grad, pre_grad, weights_grad = call.empty_gradients()
    given = (call.pre, call.offsets, tape.table, call.rows, call.seed, products, call.weights, grad, state_grad, pre_sum)
    made = (h_grad, pre_grad, sums, weights.factors, weights.partial)
    for t in reversed(range(deepest)):
        plan.launch(
            step_backward, plan.tiles, tape.states[t], *given, *made, P, call.batch, t, call.first_step, deepest, layers,
            *plan.numbers(),
        )  # fmt: skip
        weights.add(t)
    weights.collect(weights_grad)
    return h_grad, pre_grad, weights_grad
