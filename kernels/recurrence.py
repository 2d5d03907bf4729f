"""T steps of transformer layers over packed sequences, in one launch.

A program has a tile of whole sequences and keeps their state on the chip through all steps and layers. It reads the weights
from the cache again for every use. Programs do not exchange data.
"""

import functools

import torch
import triton
import triton.language as tl
from lares_fast.kernels._launch import choice, launch
from lares_fast.kernels._layers import (
    LOG2E,
    SITE_ATTENTION_OUT,
    SITE_FEED_FORWARD_OUT,
    attend,
    drop_places,
    feed,
    hidden_factor,
    layer_norm,
    layer_size,
    load_tile,
    matrix,
    owners,
    rows_times,
    store_tile,
    tile_rows,
    vector,
)
from torch.nn import functional as F

# The most steps of a sequence: a dropout address has 16 bits for the step.
MOST_STEPS = 2**16 - 2
# A thread cannot have more registers than this. Without the limit, ptxas spills registers to make room for a third program.
MOST_REGISTERS = 255

_SIZES = ["P", "layers", "first_step", "threshold", "attention_threshold", "zero"]


@triton.jit
def join(x, PRE, ADAPTER, hold, source, real, KIND: tl.constexpr, D: tl.constexpr, G: tl.constexpr):
    """Return the adapter's output [G, 16, D] for the states x and ``pre``. KIND is the adapter."""
    pre = load_tile(PRE, source, real, D)
    if KIND == "add":
        x = (x + pre) * 0.5
    elif KIND == "linear":
        share = tl.sigmoid(tl.load(ADAPTER).to(tl.float32))
        x = share * x + (1 - share) * pre
    else:
        state = rows_times(x, tl.trans(matrix(ADAPTER + hold, D, D, 2 * D)), G)
        x = (
            state
            + rows_times(pre, tl.trans(matrix(ADAPTER + hold + D, D, D, 2 * D)), G)
            + vector(ADAPTER + hold + 2 * D * D, D)
        )
    return x


@triton.jit
def places(OFFSETS, ALIGNED, low, high, G: tl.constexpr):
    """Return the first packed row of the tile, and five numbers for each tile row [G, 16].

    The five numbers are the row's sequence, the tile row where the sequence begins, the packed row (counted from the tile's
    first packed row), the position in the sequence, and the length of the sequence.
    """
    row = tile_rows(G)
    sequence, begin = owners(row, ALIGNED, low, high)
    origin = tl.load(OFFSETS + low)
    place = tl.load(OFFSETS + sequence)
    length = (tl.load(OFFSETS + sequence + 1) - place).to(tl.int32)
    return origin, sequence, begin, (place - origin).to(tl.int32) + row - begin, row - begin, length


@triton.jit(do_not_specialize=_SIZES)
def recurrence_forward(
    STATE, PRE, OFFSETS, ALIGNED, FIRST, DEPTH, OUT_ROW, ROWS, SEED, ADAPTER, NORM, WEIGHTS, OUT, STATES,
    P, layers, first_step, eps, scale, threshold, kept, attention_threshold, attention_kept, zero,
    D: tl.constexpr, E: tl.constexpr, INNER: tl.constexpr, G: tl.constexpr,
    KIND: tl.constexpr, OUTPUT: tl.constexpr, SAVE: tl.constexpr, DROP: tl.constexpr,
):  # fmt: skip
    """Fill OUT with the states that OUTPUT names. For "halves" they are the inputs of the layers' halves, [2 layers, P, D].

    With SAVE also fill STATES [T, P, D] with the state before every step.
    """
    low, high = tl.load(FIRST + tl.program_id(0)), tl.load(FIRST + tl.program_id(0) + 1)
    if low == high:
        return
    origin, sequence, begin, source, position, length = places(OFFSETS, ALIGNED, low, high, G)
    depth = tl.load(DEPTH + sequence).to(tl.int32)
    # An invalid sequence may be longer than the tile. It takes no steps.
    real, last = (position < length) & (depth > 0), position == length - 1
    x = load_tile(STATE + origin * D, source, real, D)
    if DROP:
        flat_row, flat_position, quad_row, quad, pair = drop_places(ALIGNED, ROWS, low, high, G)
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
            x = layer_norm(join(x, PRE + origin * D, ADAPTER, hold, source, real, KIND, D, G), NORM, eps, D)
        for layer in range(0, layers):
            W = WEIGHTS + tl.multiple_of(layer * size + hold, 16)
            if OUTPUT == "halves":
                store_tile(OUT + (origin + 2 * layer * P.to(tl.int64)) * D, x, source, real, D)
            y = attend(
                x, W, begin, scale, SEED, attention_threshold, attention_kept, first_step + t, layer, quad_row, quad, pair,
                D, E, G, DROP,
            )  # fmt: skip
            if DROP:
                y = x + y * hidden_factor(
                    SEED, threshold, kept, SITE_ATTENTION_OUT, first_step + t, layer, flat_row, flat_position, D, G
                )
            x = layer_norm(y, W + attention_size - 2 * D, eps, D)
            if OUTPUT == "halves":
                store_tile(OUT + (origin + (2 * layer + 1) * P.to(tl.int64)) * D, x, source, real, D)
            W += attention_size
            y = feed(x, W, D, INNER, G, DROP)
            if DROP:
                y = x + y * hidden_factor(
                    SEED, threshold, kept, SITE_FEED_FORWARD_OUT, first_step + t, layer, flat_row, flat_position, D, G
                )
            x = layer_norm(y, W + 2 * INNER * D + INNER + D, eps, D)
        if OUTPUT == "last":
            store_tile(OUT, x, sequence, last & (t + 1 == depth), D)
        elif OUTPUT == "steps":
            store_tile(OUT, x, tl.load(OUT_ROW + sequence) + t, last & (t < depth), D)
        elif OUTPUT == "tokens":
            store_tile(OUT + origin * D, x, source, real & (t + 1 == depth), D)


class Plan:
    """The plan of a call for the kernels of both directions: the parts of the weights, tiles of sequences and launch settings.

    ``call`` is a ``lares_fast.ops._recurrence_call.RecurrenceCall`` with contiguous and aligned tensors and a tensor ``depth``.
    The host does not read ``offsets`` and ``depth``. If they are wrong, results are NaN.
    """

    def __init__(self, call):
        self.call = call
        self.choice = choice(
            "recurrence", call.h, width=call.width, heads=call.n_heads, inner=call.inner_size, longest=call.longest
        )
        # The number G of a tile.
        self.groups = self.choice.rows // 16 if self.choice.rows else 4 if call.longest <= 64 else 8

    @functools.cached_property
    def weights(self):
        """Return (adapter, norm, layers), the parts of the flat tensor as the kernels read them. The first two may be None."""
        call, D = self.call, self.call.width
        layers, norm = call.n_layers * layer_size(D, call.inner_size), 0 if call.adapter == "none" else 2 * D
        adapter = len(call.weights) - layers - norm
        parts = call.weights.split((layers, norm, adapter))
        return parts[2] if adapter else None, parts[1] if norm else None, parts[0].view(call.n_layers, -1)

    @functools.cached_property
    def sequences(self):
        """Return (offsets [B + 1], steps [B]) that are safe to use.

        The offsets rise from 0 to P, even if the given offsets do not. An invalid sequence has 0 steps.
        """
        P, given, depth = len(self.call.h), self.call.offsets, self.call.depth
        offsets = given.clamp(0, P).cummax(0).values
        offsets[:1] = 0
        offsets[-1:] = P
        lengths = offsets.diff()
        valid = (given == offsets).all() & (lengths >= 1) & (lengths <= self.call.longest)
        return offsets, torch.where(valid & (depth >= 1) & (depth <= MOST_STEPS), depth, 0)

    @functools.cached_property
    def tiles(self):
        """Return (aligned, first), which divide the sequences into tiles.

        ``aligned`` [B + 1] is the first row of each sequence if every sequence takes a multiple of 4 rows, at most a tile.
        ``first`` holds the first sequence of each tile, and then B. A tile takes sequences as long as they fit. Only the device
        knows the number of tiles, so there may be empty tiles at the end.
        """
        P, B, R = len(self.call.h), self.call.batch, 16 * self.groups
        # A sequence that is longer than a tile gets a tile of its own.
        sizes = ((self.sequences[0].diff() + 3) // 4 * 4).clamp(max=R)
        aligned = F.pad(sizes.cumsum(0), (1, 0))
        # Two neighbouring tiles together have more rows than one tile holds. This bounds the number of tiles.
        most = min(B, 2 * (P + 3 * B) // R + 1)
        ahead = torch.searchsorted(aligned, aligned + R, right=True) - 1
        first = aligned.new_zeros(1)
        while len(first) <= most:
            first, ahead = torch.cat((first, ahead[first])), ahead[ahead]
        return aligned, first[: most + 1].contiguous()

    def launch(self, kernel, programs, *arguments, **constants):
        """Launch ``kernel`` with the sizes that it takes.

        In half precision a warp has 16 rows. In fp32 there are 8 warps, so that each warp holds less.
        """
        D, half = self.call.width, self.call.h.dtype != torch.float32
        sizes = {"D": D, "E": D // self.call.n_heads, "INNER": self.call.inner_size, "G": self.groups}
        taken = {name: value for name, value in sizes.items() if name in kernel.arg_names}
        warps = self.groups if half else 8
        options = {"warps": warps, "choice": self.choice, "maxnreg": MOST_REGISTERS}
        launch(kernel, programs, *arguments, **options, **taken, **constants)

    def numbers(self):
        """Return eps, the scale of the scores, and the thresholds and factors of hidden and attention dropout."""
        call = self.call
        kept = [(threshold, 1 / (1 - threshold / 65536)) for threshold in call.thresholds]
        return (call.eps, LOG2E.value * (call.width // call.n_heads) ** -0.5, *kept[0], *kept[1])

    def run(self, state, depth, first_step, out, states, output):
        """Launch the forward kernel on the states ``state``. It fills ``out``, and ``states`` unless that is None."""
        call = self.call
        aligned, first = self.tiles
        out_row = call.depth.cumsum(0) - call.depth if output == "steps" else None
        self.launch(
            recurrence_forward, len(first) - 1, state, call.pre, self.sequences[0], aligned, first, depth, out_row,
            call.rows, call.seed, *self.weights, out, states, len(state), call.n_layers, first_step, *self.numbers(), 0,
            KIND=call.adapter, OUTPUT=output, SAVE=states is not None, DROP=call.seed is not None,
        )  # fmt: skip


def forward(call, out_rows, steps):
    """Return (out [out_rows, D], states [steps, P, D] before every step). With 0 ``steps`` there are no states, but None."""
    plan = Plan(call)
    # Rows that no valid sequence writes stay NaN.
    out = call.h.new_full((out_rows, call.width), torch.nan)
    states = call.h.new_empty(steps, *call.h.shape) if steps else None
    plan.run(call.h, plan.sequences[1], call.first_step, out, states, call.output)
    return out, states
