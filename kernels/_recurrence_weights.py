"""The gradients of the recurrence's weights: products of factors that ``step_backward`` stores, summed over rows and steps.

The rows are split into slots, and every slot has a sum of its own. Norms and the gate of ``linear`` have sums of their own for
each tile. One program computes an element of such a sum, always in the same order. There are no atomics.
"""

import torch
import triton
import triton.language as tl
from lares_fast.kernels._launch import WARPS, cdiv, launch
from lares_fast.kernels._recurrence_plan import DEEPEST, VALID

# The smallest number of rows of a slot, and the number of programs from which on there are no more slots.
SLOT_ROWS, MOST_PROGRAMS = 128, 1024
# The side of a tile of a weight's gradient, and the elements of a program of ``collect_gradients`` and its rows at a time.
SIDE, ELEMENTS, ROWS = tl.constexpr(64), tl.constexpr(512), tl.constexpr(8)

_SIZES = ["P", "t", "deepest", "layers", "rows", "slots", "tiles", "size", "total"]

# The factors of the weights' gradients that a row of a layer stores, in this order: the gradients of queries, keys and values
# (3 D), of the output projection (D), of the first product of the feed-forward half (INNER) and of the second one (D); then
# what was multiplied: the input of the layer (D), the context (D), the input of the feed-forward half (D), and GELU (INNER).
# For ``concat`` there are 3 D numbers more after those of all layers: the gradient of its product, the state, and ``pre``.
# A tile has the sums of the two norms of each layer, then of the norm after the adapter, and then of the gate, padded to 64.


@triton.jit
def weight_tile(tile, layers, P, D: tl.constexpr, INNER: tl.constexpr):
    """Return the factors of tile ``tile`` of the weights' gradients, and where the tile is stored.

    The numbers are: the places of the first row's two factors, the distance of rows, the place of the sum, the place of the
    bias's sum or -1, and whether the bias is a bias of keys.
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
    width = tl.where(concat, 3 * D, WIDTH)
    base = layer * P.to(tl.int64) * WIDTH
    at = layer * size
    keys = attention & (concat == 0) & (m >= D) & (m < 2 * D)
    return base + a, base + b, width, at + start + k * SIDE * SIDE, tl.where(n == 0, at + bias, -1), keys


@triton.jit(do_not_specialize=_SIZES)
def weight_gradients(
    FACTORS, TABLE, ROW_STEPS, SLOTS, P, t, deepest, layers, rows, tiles, size,
    D: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    """Add the gradients of all weights in step t to the slots, or set the slots if t is the first step that is run.

    A program multiplies the factors of a tile [SIDE, SIDE] in the ``rows`` rows of a slot. Biases have column sums. SLOTS is
    [slots, size], in the order of the weights. Within a matrix the elements of a tile follow each other.
    """
    slot, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    if (t >= tl.load(TABLE + DEEPEST)) & (t + 1 < deepest):
        return
    a_place, b_place, width, place, bias, keys = weight_tile(tile, layers, P, D, INNER)
    width = tl.multiple_of(width, 16)
    start = slot.to(tl.int64) * rows
    row, side = tl.arange(0, 32), tl.arange(0, SIDE)
    A = FACTORS + tl.multiple_of(a_place, 16) + start * width + row[:, None] * width + side[None, :]
    B = FACTORS + tl.multiple_of(b_place, 16) + start * width + row[:, None] * width + side[None, :]
    total = tl.zeros((SIDE, SIDE), tl.float32)
    # All columns are equal. A product is faster than a sum over rows.
    sums = tl.zeros((SIDE, 16), tl.float32)
    ones = tl.full((32, 16), 1.0, FACTORS.dtype.element_ty)
    for r in range(0, tl.minimum(rows, P - start).to(tl.int32), 32):
        inside = start + r + row < P
        real = (inside & (t < tl.load(ROW_STEPS + start + r + row, mask=inside, other=0)))[:, None]
        a = tl.load(A, mask=real, other=0.0)
        b = tl.load(B, mask=real, other=0.0)
        A += 32 * width
        B += 32 * width
        total += tl.dot(tl.trans(a), b, input_precision="ieee")
        sums += tl.dot(tl.trans(a), ones, input_precision="ieee")
    SLOT = SLOTS + slot.to(tl.int64) * (size // 16 * 16)
    at = place // 16 * 16 + side[:, None] * SIDE + side[None, :]
    if t + 1 < deepest:
        total += tl.load(SLOT + at)
    tl.debug_barrier()
    tl.store(SLOT + at, total)
    if bias >= 0:
        # A bias of keys adds one number to all scores of a query, which changes nothing. So its gradient is 0.
        column = tl.where(keys, 0.0, tl.max(sums, 1))
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
    """Set OUT [total], the gradients of the weights, to the sums over the slots, or over the tiles for norms and gate.

    A program sums ELEMENTS elements.
    """
    attention_size: tl.constexpr = 4 * D * D + 6 * D
    of_layer: tl.constexpr = attention_size + 2 * INNER * D + INNER + 3 * D
    feed: tl.constexpr = attention_size + INNER * D
    element = tl.program_id(0) * ELEMENTS + tl.arange(0, ELEMENTS)
    layer = tl.minimum(element // of_layer, layers)
    inside = element - layer * of_layer
    joins, attention, down = layer == layers, inside < attention_size, inside >= feed
    # The place in PARTIAL, or -1.
    of_tiles = (inside < 2 * D) | (KIND == "linear")
    place = tl.where(inside >= of_layer - 2 * D, inside - of_layer + 4 * D, -1)
    place = tl.where(attention, tl.maximum(inside - attention_size + 2 * D, -1), place)
    place = tl.where(joins, tl.where(of_tiles, inside, -1), place)
    place += tl.where(place >= 0, layer * 4 * D, 0)
    # The matrix in this part has ``columns`` columns, and ``start`` and ``end`` are its first place and the place after it.
    start = tl.where(joins, 2 * D, tl.where(attention, 0, tl.where(down, feed, attention_size)))
    end = tl.where(joins, 2 * D + 2 * D * D, tl.where(attention, 4 * D * D, feed + INNER * D))
    columns = tl.where(joins, 2 * D, tl.where(down, INNER, D))
    m, n = (inside - start) // columns, (inside - start) % columns
    tiled = start + (m // SIDE * (columns // SIDE) + n // SIDE) * SIDE * SIDE + m % SIDE * SIDE + n % SIDE
    inside = tl.where(inside < end, tiled, inside)
    row, here, from_tiles = tl.arange(0, ROWS), element < total, place >= 0
    sums = tl.zeros((ROWS, ELEMENTS), tl.float32)
    SLOT, of_slots = SLOTS + layer * of_layer + inside, here & (from_tiles == 0)
    for r in range(0, slots, ROWS):
        at = (r + row).to(tl.int64)[:, None] * size
        sums += tl.load(SLOT[None, :] + at, mask=(r + row < slots)[:, None] & of_slots[None, :], other=0.0)
    # Most programs have no such element.
    rows = tl.where(tl.max(from_tiles.to(tl.int32), 0) > 0, tiles, 0)
    TILE = PARTIAL + place
    for r in range(0, rows, ROWS):
        at = (r + row).to(tl.int64)[:, None] * ((4 * layers + 2) * D + 64)
        sums += tl.load(TILE[None, :] + at, mask=(r + row < tiles)[:, None] & (here & from_tiles)[None, :], other=0.0)
    found = tl.where(tl.load(TABLE + VALID) == 0, float("nan"), tl.sum(sums, 0))
    tl.store(OUT + element, found.to(OUT.dtype.element_ty), mask=here)


class WeightGradients:
    """The buffers of the weights' gradients of a call, and their kernels.

    ``factors`` and ``partial`` are the buffers FACTORS and PARTIAL of ``step_backward``.
    """

    def __init__(self, plan, tape):
        call = plan.call
        self.plan, self.tape, self.deepest = plan, tape, len(tape.states)
        self.D, self.inner, self.layers, P = call.width, call.inner_size, call.n_layers, len(call.h)
        joins = call.adapter == "concat"
        # The tiles of all weights that are matrices.
        elements = self.layers * (4 * self.D + 2 * self.inner) * self.D + joins * 2 * self.D**2
        self.tiles = elements // SIDE.value**2
        self.slots = max(1, min(cdiv(P, SLOT_ROWS), cdiv(MOST_PROGRAMS, self.tiles)))
        self.rows = cdiv(cdiv(P, self.slots), 32) * 32

        def buffer(*shape, dtype=torch.float32):
            return torch.empty(shape, dtype=dtype, device=call.h.device)

        self.sums = buffer(self.slots, cdiv(len(call.weights), 16) * 16)
        self.factors = buffer(P * (self.layers * (8 * self.D + 2 * self.inner) + joins * 3 * self.D), dtype=plan.products.dtype)
        self.partial = buffer(plan.tiles, (4 * self.layers + 2) * self.D + 64)

    def add(self, t):
        """Add the gradients of step t, whose factors are stored."""
        launch(
            weight_gradients, self.slots * self.tiles, self.factors, self.tape.table, self.tape.row_steps, self.sums,
            len(self.tape.row_steps), t, self.deepest, self.layers, self.rows, self.tiles, self.sums.shape[1],
            D=self.D, INNER=self.inner, warps=WARPS[self.factors.dtype], choice=self.plan.choice,
        )  # fmt: skip

    def collect(self, out):
        """Store the gradients of all weights in the flat tensor ``out``."""
        launch(
            collect_gradients, cdiv(len(out), ELEMENTS.value), self.sums, self.partial, self.tape.table, out,
            self.layers, self.slots, len(self.partial), self.sums.shape[1], len(out),
            D=self.D, INNER=self.inner, KIND=self.plan.call.adapter, warps=4,
        )  # fmt: skip
