"""The plan of a recurrence: one kernel makes the table of a call from its offsets and depths, and the host waits for nothing.

The table is int32. Its first four numbers are FITS, VALID, TOTAL and DEEPEST. Then come, for B sequences and n tiles:

- steps [B]: the steps of each sequence, 0 if it is invalid;
- begin [B]: the row of its tile where each sequence begins, a multiple of 4;
- out_row [B + 1]: the first row of each sequence in the output "steps", and the number of rows;
- first [n + 1]: the first sequence of each tile, and then B. A tile without sequences has the number of the next tile.

A tile takes neighbouring sequences as long as they fit. Every SEGMENT-th sequence begins a new tile, so that the segments can
be divided at the same time. The tiles of a segment have numbers that no other segment can need.
"""

import triton
import triton.language as tl
from lares_fast.kernels._launch import cdiv, choice, launch
from lares_fast.kernels._layers import LOG2E

# The numbers at the beginning of the table. FITS: 1 if the offsets rise from 0 to P. VALID: 1 if all sequences are valid, too.
# TOTAL: the rows of the output "steps". DEEPEST: the most steps of a sequence.
FITS, VALID, TOTAL, DEEPEST = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)
HEAD = tl.constexpr(4)

# The sequences that one lane divides into tiles, the lanes that work at the same time, and the sequences of a block.
SEGMENT, LANES, BLOCK = tl.constexpr(128), tl.constexpr(256), tl.constexpr(1024)
WARPS = 8

# A thread cannot have more registers than this. Without the limit, ptxas spills registers to make room for a third program.
MOST_REGISTERS = 255


@triton.jit
def steps_of(TABLE, B):
    """Return where the table has the steps of each sequence."""
    return TABLE + HEAD


@triton.jit
def begins_of(TABLE, B):
    """Return where the table has the row of its tile where each sequence begins."""
    return TABLE + HEAD + B


@triton.jit
def out_rows_of(TABLE, B):
    """Return where the table has the first row of each sequence in the output "steps"."""
    return TABLE + HEAD + 2 * B


@triton.jit
def tile_bounds(TABLE, B, tile):
    """Return (low, high): the sequences of a tile are ``low`` to ``high - 1``."""
    first = TABLE + HEAD + 3 * B + 1 + tile
    return tl.load(first), tl.load(first + 1)


@triton.jit
def tile_size(place, after, fits, R: tl.constexpr):
    """Return the rows of a tile that a sequence from ``place`` to ``after`` takes: a multiple of 4, at least 4 and at most R.

    A sequence that is longer than a tile gets a tile of its own. If the offsets do not fit, every sequence takes 4 rows.
    """
    length = tl.where(fits, tl.minimum(tl.maximum(after - place, 1), R), 1).to(tl.int32)
    return (length + 3) // 4 * 4


@triton.jit(do_not_specialize=["P", "B", "steps", "longest", "most", "tiles"])
def plan(OFFSETS, DEPTH, TABLE, P, B, steps, longest, most, tiles, R: tl.constexpr):
    """Fill TABLE. Every sequence takes ``steps`` steps, or as many as DEPTH says if that is 0. ``most`` is the largest depth.

    One program does everything. All threads read what others stored only after a barrier.
    """
    STEPS, BEGIN, OUT_ROW = steps_of(TABLE, B), begins_of(TABLE, B), out_rows_of(TABLE, B)
    FIRST = OUT_ROW + B + 1
    lane = tl.arange(0, BLOCK)
    falling = tl.zeros((BLOCK,), tl.int32)
    for b in range(0, B, BLOCK):
        here = b + lane < B
        place = tl.load(OFFSETS + b + lane, mask=here, other=0)
        falling |= (tl.load(OFFSETS + b + lane + 1, mask=here, other=0) < place).to(tl.int32)
    fits = (tl.max(falling, 0) == 0) & (tl.load(OFFSETS) == 0) & (tl.load(OFFSETS + B) == P)

    total, deepest, invalid = tl.full((), 0, tl.int32), tl.full((), 0, tl.int32), tl.full((), 0, tl.int32)
    rows = tl.full((), 0, tl.int64)
    read = tl.where(steps == 0, B, 0)
    for b in range(0, B, BLOCK):
        here = b + lane < B
        place = tl.load(OFFSETS + b + lane, mask=here, other=0)
        after = tl.load(OFFSETS + b + lane + 1, mask=here, other=0)
        depth = tl.load(DEPTH + b + lane, mask=b + lane < read, other=0) + steps
        valid = fits & here & (after - place >= 1) & (after - place <= longest) & (depth >= 1) & (depth <= most)
        taken = tl.where(here, tl.minimum(tl.maximum(depth, 1), most), 0).to(tl.int32)
        own = tl.where(valid, taken, 0)
        tl.store(STEPS + b + lane, own, mask=here)
        tl.store(OUT_ROW + b + lane, total + tl.cumsum(taken, 0) - taken, mask=here)
        total += tl.sum(taken, 0)
        deepest = tl.maximum(deepest, tl.max(own, 0))
        invalid += tl.sum(tl.where(here & (own == 0), 1, 0), 0)
        # The number of the tile that a sequence begins if it is the first of its segment. Two tiles that follow each other in
        # a segment have more than R rows together, and a segment has no more tiles than sequences.
        size = tl.where(here, tile_size(place, after, fits, R), 0).to(tl.int64)
        number = 2 * (rows + tl.cumsum(size, 0) - size) // R + (b + lane) // SEGMENT
        tl.store(BEGIN + b + lane, tl.minimum(number, b + lane).to(tl.int32), mask=here)
        rows += tl.sum(size, 0)
    tl.store(OUT_ROW + B, total)
    tl.store(TABLE + FITS, tl.where(fits, 1, 0))
    tl.store(TABLE + VALID, tl.where(fits & (invalid == 0), 1, 0))
    tl.store(TABLE + TOTAL, total)
    tl.store(TABLE + DEEPEST, deepest)

    tl.debug_barrier()
    for s in range(0, tl.cdiv(B, SEGMENT), LANES):
        start = (s + tl.arange(0, LANES)) * SEGMENT
        end = tl.minimum(start + SEGMENT, B)
        there = start < B
        tile = tl.load(BEGIN + start, mask=there, other=0) - 1
        stop = tl.load(BEGIN + end, mask=there & (end < B), other=tiles)
        tl.debug_barrier()
        filled = tl.full((LANES,), R, tl.int32)
        place = tl.load(OFFSETS + start, mask=there, other=0)
        for i in range(0, tl.minimum(B, SEGMENT)):
            here = start + i < end
            after = tl.load(OFFSETS + start + i + 1, mask=here, other=0)
            size = tile_size(place, after, fits, R)
            opens = filled + size > R
            begin = tl.where(opens, 0, filled)
            tile += tl.where(opens & here, 1, 0)
            tl.store(FIRST + tile, tl.where(fits, start + i, 0), mask=opens & here)
            tl.store(BEGIN + start + i, begin, mask=here)
            filled = begin + size
            place = after
        left = tl.where(there, stop - tile - 1, 0)
        for i in range(1, tl.max(left, 0) + 1):
            tl.store(FIRST + tile + i, tl.where(fits, end, 0), mask=i <= left)
    tl.store(FIRST + tiles, tl.where(fits, B, 0))


class Plan:
    """The plan of a call for the kernels of both directions: sizes of the table and of tiles, and launch settings.

    ``call`` is a ``lares_fast.ops._recurrence_call.RecurrenceCall`` with contiguous and aligned tensors. ``products`` are its
    weights in the dtype of products. The host does not read ``offsets`` and ``depth``. If they are wrong, results are NaN.
    """

    def __init__(self, call, products):
        self.call, self.products = call, products
        sizes = {"width": call.width, "heads": call.n_heads, "inner": call.inner_size, "longest": call.longest}
        self.choice = choice("recurrence", products, **sizes)
        # The number G of a tile.
        self.groups = self.choice.rows // 16 if self.choice.rows else 4 if call.longest <= 64 else 8
        B, rows = call.batch, 16 * self.groups
        # The number of tiles. Two neighbours in a segment together have more rows than one tile holds, and a sequence takes at
        # most 4 rows more than it has. So there cannot be more tiles, but some of them may have no sequences.
        self.tiles = min(B, 2 * (len(call.h) + 4 * B) // rows + cdiv(B, SEGMENT.value))
        # The words of the table, a multiple of 4.
        self.words = cdiv(HEAD.value + 3 * B + 1 + self.tiles + 1, 4) * 4

    def fill(self, table, most):
        """Launch the kernel that fills ``table``. ``most`` is the largest depth that is valid."""
        call = self.call
        # One variant of the kernel is enough. It reads no depth if all depths are equal.
        depth, steps = (call.offsets, call.steps) if call.depth is None else (call.depth, 0)
        launch(
            plan, 1, call.offsets, depth, table, len(call.h), call.batch, steps, call.longest, most, self.tiles,
            warps=WARPS, R=16 * self.groups,
        )  # fmt: skip

    def launch(self, kernel, programs, *arguments, **constants):
        """Launch ``kernel`` with the constants that it takes.

        In half precision a warp has 16 rows. In fp32 there are 8 warps, so that each warp holds less.
        """
        call, D = self.call, self.call.width
        given = {"D": D, "E": D // call.n_heads, "INNER": call.inner_size, "G": self.groups}
        given |= {"KIND": call.adapter, "OUTPUT": call.output, "DROP": call.seed is not None}
        taken = {name: value for name, value in given.items() if name in kernel.arg_names}
        warps = self.groups if self.products.itemsize == 2 else 8
        options = {"warps": warps, "choice": self.choice, "maxnreg": MOST_REGISTERS}
        launch(kernel, programs, *arguments, **options, **taken, **constants)

    def numbers(self):
        """Return eps, the scale of the scores, and the thresholds and factors of hidden and attention dropout."""
        call = self.call
        kept = [(threshold, 1 / (1 - threshold / 65536)) for threshold in call.thresholds]
        return (call.eps, LOG2E.value * (call.width // call.n_heads) ** -0.5, *kept[0], *kept[1])
