"""T steps of transformer layers over packed sequences, in one launch after the launch of the plan.

A program has a tile of whole sequences and keeps their state on the chip through all steps and layers. It reads the weights
from the cache again for every use. Programs do not exchange data.
"""

import torch
import triton
import triton.language as tl
from lares_fast.kernels._launch import cdiv
from lares_fast.kernels._layers import (
    SITE_ATTENTION_OUT,
    SITE_FEED_FORWARD_OUT,
    attend,
    drop_places,
    feed,
    hidden_factor,
    layer_norm,
    load_tile,
    matrix,
    owners,
    rows_times,
    store_tile,
    tile_rows,
    vector,
)
from lares_fast.kernels._recurrence_plan import (
    FITS,
    TOTAL,
    Plan,
    begins_of,
    out_rows_of,
    steps_of,
    tile_bounds,
)

_SIZES = ["P", "B", "out_rows", "layers", "first_step", "threshold", "attention_threshold", "zero"]


@triton.jit
def join(x, PRE, W, V, source, real, KIND: tl.constexpr, D: tl.constexpr, G: tl.constexpr):
    """Return the output [G, 16, D] of the adapter KIND for the states x and ``pre``. Its weights are at W and V."""
    pre = load_tile(PRE, source, real, D)
    if KIND == "add":
        x = (x + pre) * 0.5
    elif KIND == "linear":
        share = tl.sigmoid(tl.load(V).to(tl.float32))
        x = share * x + (1 - share) * pre
    else:
        state = rows_times(x, tl.trans(matrix(W, D, D, 2 * D)), G)
        x = state + rows_times(pre, tl.trans(matrix(W + D, D, D, 2 * D)), G) + vector(V + 2 * D * D, D)
    return x


@triton.jit
def places(OFFSETS, BEGIN, low, high, G: tl.constexpr):
    """Return the first packed row of the tile, and five numbers for each tile row [G, 16].

    The five numbers are the row's sequence, the tile row where the sequence begins, the packed row (counted from the tile's
    first packed row), the position in the sequence, and the length of the sequence.
    """
    row = tile_rows(G)
    sequence, begin = owners(row, BEGIN, low, high)
    origin = tl.load(OFFSETS + low)
    place = tl.load(OFFSETS + sequence)
    length = (tl.load(OFFSETS + sequence + 1) - place).to(tl.int32)
    return origin, sequence, begin, (place - origin).to(tl.int32) + row - begin, row - begin, length


@triton.jit
def fill_rows(OUT, value, first, rows, D: tl.constexpr):
    """Store ``value`` in the rows ``first`` to ``rows - 1`` of OUT [rows, D]. The programs share the work."""
    column = tl.arange(0, D)
    start = (first + tl.program_id(0)).to(tl.int64)
    for row in range(start, rows, tl.num_programs(0)):
        tl.store(OUT + row * D + column, tl.full((D,), value, OUT.dtype.element_ty))


@triton.jit
def fill_invalid(
    OUT, OUT_ROW, origin, sequence, source, position, length, depth, D: tl.constexpr, G: tl.constexpr, OUTPUT: tl.constexpr
):
    """Store NaN in all rows of OUT that belong to sequences of the tile without a valid depth."""
    nan = tl.full((G, 16, D), float("nan"), tl.float32)
    if OUTPUT == "tokens":
        # A sequence that is longer than a tile has the tile alone.
        rows = tl.where(depth == 0, length, 0)
        for r in range(0, tl.max(tl.max(rows, 1), 0), 16 * G):
            store_tile(OUT + (origin + r) * D, nan, source, position + r < rows, D)
    else:
        first = tl.load(OUT_ROW + sequence)
        rows = tl.where((depth == 0) & (position == 0), 1, 0)
        if OUTPUT == "steps":
            rows *= tl.load(OUT_ROW + sequence + 1) - first
        else:
            first = sequence
        for r in range(0, tl.max(tl.max(rows, 1), 0)):
            store_tile(OUT, nan, first.to(tl.int64) + r, r < rows, D)


@triton.jit(do_not_specialize=_SIZES)
def recurrence_forward(
    STATE, PRE, OFFSETS, TABLE, ROWS, SEED, WEIGHTS, VECTORS, OUT, STATES, ROW_STEPS,
    P, B, out_rows, layers, first_step, eps, scale, threshold, kept, attention_threshold, attention_kept, zero,
    D: tl.constexpr, E: tl.constexpr, INNER: tl.constexpr, G: tl.constexpr,
    KIND: tl.constexpr, OUTPUT: tl.constexpr, SAVE: tl.constexpr, DROP: tl.constexpr,
):  # fmt: skip
    """Fill OUT [out_rows, D] with the states that OUTPUT names, and with NaN for invalid sequences.

    Rows of "steps" after the last sequence become 0. With SAVE also fill STATES [T, P, D] with the state before every step, and
    ROW_STEPS [P] with the steps of each row's sequence.
    """
    if tl.load(TABLE + FITS) == 0:
        fill_rows(OUT, float("nan"), 0, out_rows, D)
        return
    if OUTPUT == "steps":
        fill_rows(OUT, 0.0, tl.load(TABLE + TOTAL), out_rows, D)
    low, high = tile_bounds(TABLE, B, tl.program_id(0))
    if low == high:
        return
    BEGIN, OUT_ROW = begins_of(TABLE, B), out_rows_of(TABLE, B)
    origin, sequence, begin, source, position, length = places(OFFSETS, BEGIN, low, high, G)
    depth = tl.load(steps_of(TABLE, B) + sequence)
    fill_invalid(OUT, OUT_ROW, origin, sequence, source, position, length, depth, D, G, OUTPUT)
    # An invalid sequence may be longer than the tile. It takes no steps.
    real, last = (position < length) & (depth > 0), position == length - 1
    x = load_tile(STATE + origin * D, source, real, D)
    if SAVE:
        tl.store(ROW_STEPS + origin + source, depth, mask=real)
    if DROP:
        flat_row, flat_position, quad_row, quad, pair = drop_places(BEGIN, ROWS, low, high, G)
    else:
        flat_row, flat_position, quad_row, quad, pair = 0, 0, 0, 0, 0
    attention_size: tl.constexpr = 4 * D * D + 6 * D
    size: tl.constexpr = attention_size + 2 * INNER * D + INNER + 3 * D
    for t in range(0, tl.max(tl.max(depth, 1), 0)):
        if SAVE:
            store_tile(STATES + (origin + t * P.to(tl.int64)) * D, x, source, real, D)
        # ``hold`` is always 0, but the compiler does not know this. So it does not keep the weights in registers between steps.
        hold = t * zero
        if KIND != "none":
            norm = tl.multiple_of(layers * size + hold, 16)
            adapter = norm + 2 * D
            x = join(x, PRE + origin * D, WEIGHTS + adapter, VECTORS + adapter, source, real, KIND, D, G)
            x = layer_norm(x, VECTORS + norm, eps, D)
        for layer in range(0, layers):
            at = tl.multiple_of(layer * size + hold, 16)
            W, V = WEIGHTS + at, VECTORS + at
            y = attend(
                x, W, V, begin, scale, SEED, attention_threshold, attention_kept, first_step + t, layer, quad_row, quad, pair,
                D, E, G, DROP,
            )  # fmt: skip
            if DROP:
                y = x + y * hidden_factor(
                    SEED, threshold, kept, SITE_ATTENTION_OUT, first_step + t, layer, flat_row, flat_position, D, G
                )
            x = layer_norm(y, V + attention_size - 2 * D, eps, D)
            W += attention_size
            V += attention_size
            y = feed(x, W, V, D, INNER, G, DROP)
            if DROP:
                y = x + y * hidden_factor(
                    SEED, threshold, kept, SITE_FEED_FORWARD_OUT, first_step + t, layer, flat_row, flat_position, D, G
                )
            x = layer_norm(y, V + 2 * INNER * D + INNER + D, eps, D)
        if OUTPUT == "last":
            store_tile(OUT, x, sequence.to(tl.int64), last & (t + 1 == depth), D)
        elif OUTPUT == "steps":
            store_tile(OUT, x, tl.load(OUT_ROW + sequence).to(tl.int64) + t, last & (t < depth), D)
        else:
            store_tile(OUT + origin * D, x, source, real & (t + 1 == depth), D)


class Tape:
    """The tensors that the forward leaves to the backward, as parts of one flat int32 tensor.

    They are the table of the plan, the steps of each row [P], and the states [T, P, D] before every step in the dtype of ``h``.
    """

    def __init__(self, plan, words):
        h = plan.call.h
        row_words = cdiv(len(h), 4) * 4
        self.words = words
        self.table, row_steps, states = words.split((plan.words, row_words, len(words) - plan.words - row_words))
        self.row_steps = row_steps[: len(h)]
        self.states = states.view(h.dtype).view(len(states) * 4 // h.itemsize // max(1, h.numel()), *h.shape)

    @classmethod
    def new(cls, plan, steps):
        """Return a tape for ``steps`` steps. Its numbers are not set."""
        h = plan.call.h
        words = plan.words + cdiv(len(h), 4) * 4 + steps * h.numel() * h.itemsize // 4
        return cls(plan, h.new_empty(words, dtype=torch.int32))


def forward(call, products, out_rows, most, steps):
    """Return (out [out_rows, D], tape). The tape, flat int32, has states of ``steps`` steps; with 0 steps it is None.

    ``products`` are the weights in the dtype of products, and ``most`` is the largest valid depth.
    """
    plan = Plan(call, products)
    tape = Tape.new(plan, steps)
    out = call.h.new_empty(out_rows, call.width)
    if not plan.tiles:
        return out, None
    plan.fill(tape.table, most)
    saved = (tape.states, tape.row_steps) if steps else (None, None)
    plan.launch(
        recurrence_forward, plan.tiles, call.h, call.pre, call.offsets, tape.table, call.rows, call.seed, products,
        call.weights, out, *saved, len(call.h), call.batch, out_rows, call.n_layers, call.first_step, *plan.numbers(), 0,
        SAVE=steps > 0,
    )  # fmt: skip
    return out, tape.words if steps else None
