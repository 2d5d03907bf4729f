"""The gradients of the recurrence, step by step from the last step to the first, with a kernel for each half of a layer.

Every step is computed again from its saved state. The gradient of a weight is a product of two matrices over all rows. The
kernel of a half stores these matrices. The rows are split into slots, and every slot has a sum of its own. One program computes
an element of a slot, always in the same order. There are no atomics.
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
    attention_size,
    drop_places,
    feed,
    hidden_factor,
    linear,
    load_tile,
    matrix,
    probabilities,
    rows_times,
    standardise,
    store_tile,
    tile_rows,
    vector,
)
from lares_fast.kernels.recurrence import Plan, join, places

# The smallest number of rows of a slot, and the largest number of slots.
SLOT_ROWS, SLOTS = 256, 32
# The place of the gradient of a bias if there is no bias.
NO_BIAS = -16
# The side of a tile of a weight's gradient.
SIDE = tl.constexpr(64)

_SIZES = ["P", "step", "layer", "t", "first", "threshold", "attention_threshold", "add", "size", "rows", "place", "bias"]


@triton.jit
def norm_backward(r, dy, base, PARTIAL, eps, D: tl.constexpr):
    """Return the gradient of r, the input of a layer norm with weight and bias at ``base``.

    ``dy`` is the gradient of the output. The gradients of weight and bias are added to PARTIAL [2, D].
    """
    x, inverse = standardise(r, eps, D)
    column = tl.arange(0, D)
    weight = tl.load(PARTIAL + column) + tl.sum(tl.sum(dy * x, 1), 0)
    # All threads must have loaded before one of them stores: here, and in the caller, which stores to the place of ``dy``.
    tl.debug_barrier()
    tl.store(PARTIAL + column, weight)
    bias = tl.load(PARTIAL + D + column) + tl.sum(tl.sum(dy, 1), 0)
    tl.debug_barrier()
    tl.store(PARTIAL + D + column, bias)
    dx = dy * vector(base, D)
    return inverse[:, :, None] * (dx - (tl.sum(dx, 2) / D)[:, :, None] - x * (tl.sum(dx * x, 2) / D)[:, :, None])


@triton.jit(do_not_specialize=_SIZES)
def attention_half_backward(
    X, GRAD, OFFSETS, ALIGNED, FIRST, DEPTH, ROWS, SEED, W, CONTEXT, DQKV, DSUM, PARTIAL,
    t, step, layer, eps, scale, threshold, kept, attention_threshold, attention_kept,
    D: tl.constexpr, E: tl.constexpr, G: tl.constexpr, DROP: tl.constexpr,
):  # fmt: skip
    """Run the attention half of a layer backwards, in the rows of step t.

    GRAD [P, D] is the gradient of the half's output and becomes the gradient of its residual sum. DSUM [P, D] becomes the
    gradient of the output projection's result, DQKV [P, 3 D] the gradient of queries, keys and values, and CONTEXT [P, D] the
    input of the output projection.
    """
    low, high = tl.load(FIRST + tl.program_id(0)), tl.load(FIRST + tl.program_id(0) + 1)
    if low == high:
        return
    origin, sequence, begin, source, position, length = places(OFFSETS, ALIGNED, low, high, G)
    real = (position < length) & (t < tl.load(DEPTH + sequence))
    if DROP:
        flat_row, flat_position, quad_row, quad, pair = drop_places(ALIGNED, ROWS, low, high, G)
    else:
        flat_row, flat_position, quad_row, quad, pair = 0, 0, 0, 0, 0
    DTYPE: tl.constexpr = W.dtype.element_ty
    C: tl.constexpr = min(E, PIECE)
    BIAS = W + 4 * D * D
    x = load_tile(X + origin * D, source, real, D)
    y = attend(
        x, W, begin, scale, SEED, attention_threshold, attention_kept, step, layer, quad_row, quad, pair, D, E, G, DROP,
    )  # fmt: skip
    if DROP:
        # This factor has a name of its own, because a Triton loop does not allow a variable to change its shape.
        kept_sums = hidden_factor(SEED, threshold, kept, SITE_ATTENTION_OUT, step, layer, flat_row, flat_position, D, G)
        y = x + y * kept_sums
    dy = load_tile(GRAD + origin * D, source, real, D)
    dsum = norm_backward(y, dy, BIAS + 4 * D, PARTIAL + tl.program_id(0) * 2 * D, eps, D)
    store_tile(GRAD + origin * D, dsum, source, real, D)
    if DROP:
        dsum *= kept_sums
    store_tile(DSUM + origin * D, dsum, source, real, D)
    dsum, x = dsum.to(DTYPE), x.to(DTYPE)
    for head in range(0, D // E):
        p = probabilities(x, W, head, begin, scale, D, E, G)
        dp = tl.zeros((G, 16, 16 * G), tl.float32)
        if DROP:
            factor = attention_factor(SEED, attention_threshold, attention_kept, step, layer, quad_row, head, quad, pair, G)
            weights = (p * factor).to(DTYPE)
        else:
            weights = p.to(DTYPE)
        turned = tl.reshape(tl.trans(tl.reshape(weights, (16 * G, 16 * G))), (G, 16, 16 * G))
        for c in range(head * E, head * E + E, C):
            v = tl.reshape(linear(x, W + (2 * D + c) * D, BIAS + 2 * D + c, D, C, G).to(DTYPE), (16 * G, C))
            store_tile(CONTEXT + origin * D + c, rows_times(weights, v, G), source, real, D)
            dcontext = rows_times(dsum, matrix(W + 3 * D * D + c, D, C, D), G).to(DTYPE)
            dp += rows_times(dcontext, tl.trans(v), G)
            dv = rows_times(turned, tl.reshape(dcontext, (16 * G, C)), G)
            store_tile(DQKV + 3 * origin * D + 2 * D + c, dv, source, real, 3 * D)
        if DROP:
            dp *= factor
        ds = p * (dp - tl.sum(dp * p, 2)[:, :, None]) * (scale * 0.6931471805599453)
        ds = ds.to(DTYPE)
        turned = tl.reshape(tl.trans(tl.reshape(ds, (16 * G, 16 * G))), (G, 16, 16 * G))
        for c in range(head * E, head * E + E, C):
            q = tl.reshape(linear(x, W + c * D, BIAS + c, D, C, G).to(DTYPE), (16 * G, C))
            k = tl.reshape(linear(x, W + (D + c) * D, BIAS + D + c, D, C, G).to(DTYPE), (16 * G, C))
            store_tile(DQKV + 3 * origin * D + c, rows_times(ds, k, G), source, real, 3 * D)
            store_tile(DQKV + 3 * origin * D + D + c, rows_times(turned, q, G), source, real, 3 * D)


@triton.jit(do_not_specialize=_SIZES)
def feed_half_backward(
    X, GRAD, OFFSETS, ALIGNED, FIRST, DEPTH, ROWS, SEED, W, GELU, DINNER, DSUM, PARTIAL,
    t, step, layer, eps, threshold, kept,
    D: tl.constexpr, INNER: tl.constexpr, G: tl.constexpr, DROP: tl.constexpr,
):  # fmt: skip
    """Run the feed-forward half of a layer backwards, like :func:`attention_half_backward`.

    GELU [P, INNER] becomes the input of the second product, and DINNER [P, INNER] the gradient of the first product's result.
    """
    low, high = tl.load(FIRST + tl.program_id(0)), tl.load(FIRST + tl.program_id(0) + 1)
    if low == high:
        return
    origin, sequence, _, source, position, length = places(OFFSETS, ALIGNED, low, high, G)
    real = (position < length) & (t < tl.load(DEPTH + sequence))
    DTYPE: tl.constexpr = W.dtype.element_ty
    BIAS = W + 2 * INNER * D
    x = load_tile(X + origin * D, source, real, D)
    y = feed(x, W, D, INNER, G, DROP)
    if DROP:
        flat_row, flat_position, _, _, _ = drop_places(ALIGNED, ROWS, low, high, G)
        factor = hidden_factor(SEED, threshold, kept, SITE_FEED_FORWARD_OUT, step, layer, flat_row, flat_position, D, G)
        y = x + y * factor
    dy = load_tile(GRAD + origin * D, source, real, D)
    dsum = norm_backward(y, dy, BIAS + INNER + D, PARTIAL + tl.program_id(0) * 2 * D, eps, D)
    store_tile(GRAD + origin * D, dsum, source, real, D)
    if DROP:
        dsum *= factor
    store_tile(DSUM + origin * D, dsum, source, real, D)
    dsum, x = dsum.to(DTYPE), x.to(DTYPE)
    for i in range(0, INNER, PIECE):
        u = linear(x, W + i * D, BIAS + i, D, PIECE, G)
        below = 0.5 * (1 + tl.erf(u * 0.7071067811865476))
        store_tile(GELU + origin * INNER + i, u * below, source, real, INNER)
        slope = below + u * 0.3989422804014327 * tl.exp(-0.5 * u * u)
        dg = rows_times(dsum, matrix(W + INNER * D + i, D, PIECE, INNER), G)
        store_tile(DINNER + origin * INNER + i, dg * slope, source, real, INNER)


@triton.jit
def _rows(P, ROW_DEPTH, t, G: tl.constexpr):
    """Return (first row of the program, its rows [G, 16] counted from there, whether each row takes step t)."""
    start = tl.program_id(0).to(tl.int64) * 16 * G
    row = tile_rows(G)
    inside = start + row < P
    return start, row, inside & (t < tl.load(ROW_DEPTH + start + row, mask=inside, other=0))


@triton.jit(do_not_specialize=_SIZES)
def input_gradient(A, W, GRAD, ROW_DEPTH, P, t, add, K: tl.constexpr, STRIDE: tl.constexpr, D: tl.constexpr, G: tl.constexpr):
    """Set GRAD [P, D] to ``add`` * GRAD + A [P, K] times the K rows at W, in the rows that take step t."""
    start, row, real = _rows(P, ROW_DEPTH, t, G)
    out = load_tile(GRAD + start * D, row, real, D) * add
    for k in range(0, K, PIECE):
        a = load_tile(A + start * K + k, row, real, K, PIECE)
        out += rows_times(a, matrix(W + k * STRIDE, PIECE, D, STRIDE), G)
    tl.debug_barrier()
    store_tile(GRAD + start * D, out, row, real, D)


@triton.jit(do_not_specialize=_SIZES)
def join_backward(
    STATE, PRE, GRAD, ADAPTER, NORM, ROW_DEPTH, DPRE, DJOIN, GATE, PARTIAL, P, t, eps,
    KIND: tl.constexpr, D: tl.constexpr, G: tl.constexpr,
):  # fmt: skip
    """Run norm and adapter backwards: GRAD becomes the gradient of the state, and the gradient of ``pre`` is added to DPRE.

    For ``concat`` it stores only DJOIN [P, D], the gradient of the adapter's output. Later products read it.
    """
    start, row, real = _rows(P, ROW_DEPTH, t, G)
    x = load_tile(STATE + start * D, row, real, D)
    joined = join(x, PRE + start * D, ADAPTER, 0, row, real, KIND, D, G)
    dy = load_tile(GRAD + start * D, row, real, D)
    d = norm_backward(joined, dy, NORM, PARTIAL + tl.program_id(0) * 2 * D, eps, D)
    if KIND == "concat":
        store_tile(DJOIN + start * D, d, row, real, D)
    else:
        share = 0.5
        if KIND == "linear":
            share = tl.sigmoid(tl.load(ADAPTER).to(tl.float32))
            gap = d * (x - load_tile(PRE + start * D, row, real, D))
            gate = tl.sum(tl.sum(tl.sum(gap, 2), 1), 0) * share * (1 - share)
            gate += tl.load(GATE + tl.program_id(0))
            tl.debug_barrier()
            tl.store(GATE + tl.program_id(0), gate)
        store_tile(GRAD + start * D, d * share, row, real, D)
        dpre = load_tile(DPRE + start * D, row, real, D)
        tl.debug_barrier()
        store_tile(DPRE + start * D, dpre + d * (1 - share), row, real, D)


@triton.jit(do_not_specialize=_SIZES)
def weight_gradient(
    A, B, ROW_DEPTH, SLOTS_GRAD, place, bias, P, t, size, rows,
    M: tl.constexpr, N: tl.constexpr, STRIDE: tl.constexpr,
):  # fmt: skip
    """Add A' B [M, N] of a slot's rows to the slot at ``place``, and the column sums [M] of A at ``bias``.

    A is [P, M], B is [P, N], and the rows of the sum are STRIDE numbers apart. A negative ``bias`` adds no column sums.
    """
    tiles: tl.constexpr = (M // SIDE) * (N // SIDE)
    slot, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    m, n = tile // (N // SIDE) * SIDE, tile % (N // SIDE) * SIDE
    start = slot.to(tl.int64) * rows
    row, side = tl.arange(0, 32), tl.arange(0, SIDE)
    total = tl.zeros((SIDE, SIDE), tl.float32)
    sums = tl.zeros((SIDE,), tl.float32)
    for r in range(0, tl.minimum(rows, P - start), 32):
        inside = start + r + row < P
        real = (inside & (t < tl.load(ROW_DEPTH + start + r + row, mask=inside, other=0)))[:, None]
        a = tl.load(A + (start + r) * M + m + row[:, None] * M + side[None, :], mask=real, other=0.0)
        b = tl.load(B + (start + r) * N + n + row[:, None] * N + side[None, :], mask=real, other=0.0)
        total += tl.dot(tl.trans(a), b, input_precision="ieee")
        sums += tl.sum(a.to(tl.float32), 0)
    SLOT = SLOTS_GRAD + slot.to(tl.int64) * size
    at = tl.multiple_of(place, 16) + (m + side)[:, None] * STRIDE + (n + side)[None, :]
    total += tl.load(SLOT + at)
    tl.debug_barrier()
    tl.store(SLOT + at, total)
    if (n == 0) & (bias >= 0):
        SUMS = SLOT + tl.multiple_of(bias, 16) + m + side
        sums += tl.load(SUMS)
        tl.debug_barrier()
        tl.store(SUMS, sums)


def backward(call, grad, states):
    """Return the gradients of ``h``, ``pre`` (empty without ``pre``) and the weights.

    ``grad`` is the gradient of the output, and ``states`` [T, P, D] are the states that the forward saved.
    """
    return _Backward(Plan(call), ready(grad), states).run()


class _Backward:
    """The buffers of one backward pass and the kernels on them, in the order of :meth:`run`."""

    def __init__(self, plan, grad, states):
        call = plan.call
        h, layers, D, inner = call.h, call.n_layers, call.width, call.inner_size
        self.plan, self.call, self.grad, self.states = plan, call, grad, states
        self.adapter, self.norm, self.weights = plan.weights
        P, size, (_, first) = len(h), self.weights.shape[1], plan.tiles
        tiles, row_tiles = len(first) - 1, triton.cdiv(P, 16 * plan.groups)
        slots = max(1, min(SLOTS, triton.cdiv(P, SLOT_ROWS)))
        self.slot_rows, self.row_tiles, self.slots = triton.cdiv(triton.cdiv(P, slots), 32) * 32, row_tiles, slots
        self.offsets, self.depth = plan.sequences
        self.row_depth = torch.repeat_interleave(self.depth, self.offsets.diff(), output_size=P)
        # The output of an invalid sequence is NaN, and a gradient is a sum over all sequences. So all gradients become NaN.
        self.nan_if_invalid = torch.where((self.depth > 0).all(), 0.0, torch.nan)
        self.halves, self.dqkv = h.new_empty(2 * layers, P, D), h.new_empty(P, 3 * D)
        self.multiplied, self.dsum = h.new_empty(P, D), h.new_empty(P, D)
        self.inner, self.dinner = h.new_empty(P, inner), h.new_empty(P, inner)

        def zeros(*shape):
            return torch.zeros(shape, dtype=torch.float32, device=h.device)

        self.dstate, self.dpre = zeros(P, D), zeros(P, D)
        self.dweights = zeros(layers, slots, size)
        self.dnorms, self.dnorm = zeros(layers, 2, tiles, 2, D), zeros(row_tiles, 2, D)
        self.dgate, self.dadapter = zeros(row_tiles), zeros(slots, 2 * D * D + D)

    def run(self):
        call = self.call
        for t in reversed(range(len(self.states))):
            self.add_output(t)
            step = t + call.first_step
            self.plan.run(self.states[t], (self.depth - t).clamp(0, 1), step, self.halves, None, "halves")
            for layer in reversed(range(call.n_layers)):
                self.feed_half(t, step, layer)
                self.attention_half(t, step, layer)
            if call.adapter != "none":
                self.join(t)
        return self.collect()

    def add_output(self, t):
        """Add the output's gradient for the states after step t."""
        call, grad = self.call, self.grad
        if call.output == "tokens":
            self.dstate = torch.where((self.row_depth == t + 1)[:, None], grad.float(), self.dstate)
            return
        if call.output == "last":
            here = self.depth == t + 1
        else:
            here = t < self.depth
            grad = grad[(call.depth.cumsum(0) - call.depth + t).clamp(max=len(grad) - 1)]
        self.dstate[(self.offsets[1:] - 1).clamp(min=0)] += torch.where(here[:, None], grad.float(), 0.0)

    def feed_half(self, t, step, layer):
        size, start = self.call.inner_size * self.call.width, attention_size(self.call.width)
        x, W, dW = self.halves[2 * layer + 1], self.weights[layer, start:], self.dweights[layer]
        eps, _, threshold, kept, *_ = self.plan.numbers()
        made = (self.inner, self.dinner, self.dsum, self.dnorms[layer, 1])
        self.half(feed_half_backward, x, W, *made, t, step, layer, eps, threshold, kept)
        self.product(self.dinner, x, dW, start, start + 2 * size, t)
        self.product(self.dsum, self.inner, dW, start + size, start + 2 * size + self.call.inner_size, t)
        self.back(self.dinner, W, self.dstate, t)

    def attention_half(self, t, step, layer):
        D = self.call.width
        x, W, dW = self.halves[2 * layer], self.weights[layer], self.dweights[layer]
        made = (self.multiplied, self.dqkv, self.dsum, self.dnorms[layer, 0])
        self.half(attention_half_backward, x, W, *made, t, step, layer, *self.plan.numbers())
        self.product(self.dqkv, x, dW, 0, 4 * D * D, t)
        self.product(self.dsum, self.multiplied, dW, 3 * D * D, 4 * D * D + 3 * D, t)
        self.back(self.dqkv, W, self.dstate, t)

    def half(self, kernel, x, *arguments):
        call = self.call
        aligned, first = self.plan.tiles
        shared = (x, self.dstate, self.offsets, aligned, first, self.depth, call.rows, call.seed)
        self.plan.launch(kernel, len(first) - 1, *shared, *arguments, DROP=call.seed is not None)

    def join(self, t):
        call, D, state = self.call, self.call.width, self.states[t]
        self.plan.launch(
            join_backward, self.row_tiles, state, call.pre, self.dstate, self.adapter, self.norm, self.row_depth,
            self.dpre, self.dsum, self.dgate, self.dnorm, len(state), t, call.eps, KIND=call.adapter,
        )  # fmt: skip
        if call.adapter == "concat":
            for column, bias, x, dx in ((0, 2 * D * D, state, self.dstate), (D, NO_BIAS, call.pre, self.dpre)):
                self.product(self.dsum, x, self.dadapter, column, bias, t, stride=2 * D)
                self.back(self.dsum, self.adapter[column:], dx, t, add=float(column > 0), stride=2 * D)

    def product(self, a, b, slots, place, bias, t, stride=None):
        """Add a' b to the gradient of a weight at ``place`` of every slot, and the column sums of a to its bias's gradient."""
        (P, M), N = a.shape, b.shape[1]
        programs = self.slots * (M // SIDE.value) * (N // SIDE.value)
        launch(
            weight_gradient, programs, a, b, self.row_depth, slots, place, bias, P, t, slots.stride(0), self.slot_rows,
            M=M, N=N, STRIDE=stride or N, warps=WARPS[a.dtype], choice=self.plan.choice,
        )  # fmt: skip

    def back(self, a, weight, grad, t, add=1.0, stride=None):
        P, D = grad.shape
        self.plan.launch(
            input_gradient, self.row_tiles, a, weight, grad, self.row_depth, P, t, add, K=a.shape[1], STRIDE=stride or D
        )

    def collect(self):
        """Return the gradients of ``h``, ``pre`` and the weights in the dtype of ``h``: sums over slots and tiles."""
        call, D = self.call, self.call.width
        layers = self.dweights.sum(1)
        for half, end in enumerate((attention_size(D), layers.shape[1])):
            layers[:, end - 2 * D : end] = self.dnorms[:, half].sum(1).flatten(1)
        parts = [layers.flatten()]
        if call.adapter != "none":
            parts.append(self.dnorm.sum(0).flatten())
        if call.adapter == "linear":
            parts.append(self.dgate.sum()[None])
        elif call.adapter == "concat":
            parts.append(self.dadapter.sum(0))
        pre = self.dpre if call.pre is not None else self.dpre.new_empty(0)
        sums = (self.dstate, pre, torch.cat(parts))
        h_grad, pre_grad, weights_grad = ((x + self.nan_if_invalid).to(call.h.dtype) for x in sums)
        return h_grad, pre_grad, weights_grad
