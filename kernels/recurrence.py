"""T steps of transformer layers over packed sequences, in one launch.

A program owns a tile of whole sequences and keeps their state on the chip through all steps and layers; weights are read from
the cache again for every use. Nothing is shared between programs.
"""

import functools
from dataclasses import dataclass

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
    load_tile,
    matrix,
    owners,
    rows_times,
    store_tile,
    tile_rows,
    vector,
)
from torch.nn import functional as F

# Where the reference's order of a layer's parameters has them in the order of _layers.py.
ORDER = (0, 2, 4, 6, 1, 3, 5, 7, 8, 9, 10, 12, 11, 13, 14, 15)
# Steps of a sequence: a dropout address has 16 bits for the step.
MOST_STEPS = 2**16 - 2
# All that a thread can have: left alone, ptxas spills some to fit a third program.
MOST_REGISTERS = 255

_SIZES = ["P", "layers", "first_step", "threshold", "attention_threshold", "zero"]


@triton.jit
def join(x, PRE, ADAPTER, hold, source, real, KIND: tl.constexpr, D: tl.constexpr, G: tl.constexpr):
    """The adapter of state and ``pre``, [G, 16, D]."""
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
    """(first packed row of the tile; of each tile row [G, 16]: sequence, tile row where that begins, packed row behind the
    first of the tile, position, length of the sequence)."""
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
    """OUT: the states that are asked for, or with OUTPUT "halves" what goes into every half of a layer, [2 layers, P, D].

    With SAVE also STATES [T, P, D], the state before every step.
    """
    low, high = tl.load(FIRST + tl.program_id(0)), tl.load(FIRST + tl.program_id(0) + 1)
    if low == high:
        return
    origin, sequence, begin, source, position, length = places(OFFSETS, ALIGNED, low, high, G)
    depth = tl.load(DEPTH + sequence).to(tl.int32)
    # A sequence that is not sound, and so may be longer than the tile, takes no steps.
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
        # Always 0, but the compiler does not know: what depends on it is not kept in registers from step to step.
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


@dataclass(frozen=True)
class Call:
    """A call as the kernels of both directions take it; all tensors but the weights are :func:`ready`.

    The host does not see ``offsets`` and ``depth``: where they are wrong, results are NaN.
    """

    h: torch.Tensor
    pre: torch.Tensor | None
    offsets: torch.Tensor
    depth: torch.Tensor
    weights: list[torch.Tensor]
    rows: torch.Tensor | None
    seed: torch.Tensor | None
    thresholds: tuple[int, int]
    n_heads: int
    adapter: str
    output: str
    eps: float
    longest: int

    @functools.cached_property
    def layers(self):
        """How many layers the weights have."""
        return len(self.weights) // len(ORDER)

    @property
    def inner(self):
        """The width between the products of a feed-forward."""
        return self.weights[-6].shape[0]

    @functools.cached_property
    def joining(self):
        """How many weights the adapter and its norm have."""
        return len(self.weights) % len(ORDER)

    @functools.cached_property
    def packed(self):
        """(adapter, its norm, layers): the weights as the kernels read them."""
        ahead, layers = self.weights[: self.joining], self.weights[self.joining :]
        parts = [layers[n * len(ORDER) + i].reshape(-1) for n in range(self.layers) for i in ORDER]
        adapter = torch.cat([x.reshape(-1) for x in ahead[:-2]]) if len(ahead) > 2 else None
        return adapter, torch.cat(ahead[-2:]) if ahead else None, torch.cat(parts)

    @functools.cached_property
    def choice(self):
        """How the kernels are launched."""
        D = self.h.shape[1]
        return choice("recurrence", self.h, width=D, heads=self.n_heads, inner=self.inner, longest=self.longest)

    @functools.cached_property
    def groups(self):
        """G of a tile."""
        return self.choice.rows // 16 if self.choice.rows else 4 if self.longest <= 64 else 8

    @functools.cached_property
    def sequences(self):
        """(offsets that rise from 0 to P, whatever they were; the steps of each sequence, 0 of one that is not sound [B])."""
        P = len(self.h)
        offsets = self.offsets.clamp(0, P).cummax(0).values
        offsets[:1] = 0
        offsets[-1:] = P
        lengths = offsets.diff()
        sound = (self.offsets == offsets).all() & (lengths >= 1) & (lengths <= self.longest)
        return offsets, torch.where(sound & (self.depth >= 1) & (self.depth <= MOST_STEPS), self.depth, 0)

    @functools.cached_property
    def tiles(self):
        """(first row of each sequence, counted in rows of tiles [B + 1]; first sequence of each tile and of none).

        A tile takes sequences as long as they fit. Only the device knows how many tiles that makes: some at the end are empty.
        """
        P, B, R = len(self.h), len(self.offsets) - 1, 16 * self.groups
        # What is longer than a tile has one of its own.
        sizes = ((self.sequences[0].diff() + 3) // 4 * 4).clamp(max=R)
        aligned = F.pad(sizes.cumsum(0), (1, 0))
        # Two neighbours are more than full.
        most = min(B, 2 * (P + 3 * B) // R + 1)
        ahead = torch.searchsorted(aligned, aligned + R, right=True) - 1
        first = aligned.new_zeros(1)
        while len(first) <= most:
            first, ahead = torch.cat((first, ahead[first])), ahead[ahead]
        return aligned, first[: most + 1].contiguous()

    def launch(self, kernel, programs, *arguments, **constants):
        """As :func:`launch`, with the sizes that ``kernel`` takes; a warp has 16 rows, in fp32 more warps hold less each."""
        D, half = self.h.shape[1], self.h.dtype != torch.float32
        sizes = {"D": D, "E": D // self.n_heads, "INNER": self.inner, "G": self.groups}
        taken = {name: value for name, value in sizes.items() if name in kernel.arg_names}
        warps = self.groups if half else 8
        options = {"warps": warps, "choice": self.choice, "maxnreg": MOST_REGISTERS}
        launch(kernel, programs, *arguments, **options, **taken, **constants)

    def numbers(self):
        """eps, the scores' scale, and thresholds and scales of dropout."""
        kept = [(threshold, 1 / (1 - threshold / 65536)) for threshold in self.thresholds]
        return (self.eps, LOG2E.value * (self.h.shape[1] // self.n_heads) ** -0.5, *kept[0], *kept[1])

    def run(self, state, depth, first_step, out, states, output):
        """The forward kernel, from ``state`` on."""
        aligned, first = self.tiles
        out_row = self.depth.cumsum(0) - self.depth if output == "steps" else None
        self.launch(
            recurrence_forward, len(first) - 1, state, self.pre, self.sequences[0], aligned, first, depth, out_row,
            self.rows, self.seed, *self.packed, out, states, len(state), self.layers, first_step, *self.numbers(), 0,
            KIND=self.adapter, OUTPUT=output, SAVE=states is not None, DROP=self.seed is not None,
        )  # fmt: skip


def forward(call, out_rows, steps):
    """(out [out_rows, D], the states before every step [steps, P, D] for the backward)."""
    # What no sound sequence writes.
    out = call.h.new_full((out_rows, call.h.shape[1]), torch.nan)
    states = call.h.new_empty(steps, *call.h.shape) if steps else None
    call.run(call.h, call.sequences[1], int(call.adapter != "none"), out, states, call.output)
    return out, states
