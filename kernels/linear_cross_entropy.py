"""Softmax over a whole catalog without the scores: log-sum-exp, log-probability and rank of the target, and both gradients.

HIDDEN is [J, M, D], ITEMS is [J, N, D] and TARGET is [J, M]: J independent catalogs. A program has a tile of S rows and loops
over a part of the items, or it has a tile of S items and loops over all rows. Other kernels merge the parts in a fixed order.
There are no atomics.

A score is a product times ``scale``. Exponentials are powers of two, so the kernels take ``base``, the fp32 number nearest to
scale / ln 2. They use ``scale / base`` for ln 2 when they return from powers of two to a logarithm.
"""

import functools
import math

import torch
import triton
import triton.language as tl
from lares_fast.kernels._catalog import (
    GRADIENTS,
    SIZES,
    SUMS,
    load_operand,
    merge_gradients,
    merge_sums,
    part_of_program,
    target_scores,
)
from lares_fast.kernels._catalog_backward import NUMBERS, prepare_backward, softmax_backward_hidden, softmax_backward_items
from lares_fast.kernels._launch import WARPS, cdiv, choice, launch, ready

# This many programs keep any GPU busy. The number of parts follows from this constant, so results do not depend on the GPU.
PROGRAMS = 1024
# The smallest number of tiles of items in a part. With fewer tiles, loading the rows would be a large share of the work.
SHORTEST_PART = 8
RANKS = {None: 0, "order": 1, "strict": 2}


@triton.jit
def _count(count, counts, raw, other, own, item, target, RANK: tl.constexpr):
    """Return ``count`` [S, S] plus 1 where one of the ``other`` items of a tile outranks the target, if ``counts`` is true."""
    if counts:
        better = raw > own[:, None]
        if RANK == 1:
            # A NaN score is the lowest.
            score = tl.where(raw == raw, raw, -float("inf"))
            better = better | ((score == own[:, None]) & (item[None, :] < target[:, None]))
        count += (better & other).to(tl.int32)
    return count


@triton.jit(do_not_specialize=SIZES)
def softmax_forward(
    HIDDEN, ITEMS, TARGET, OWN, SUM, COUNT, M, N, tiles, parts, first, part, ranked, base,
    D: tl.constexpr, C: tl.constexpr, S: tl.constexpr, BF16: tl.constexpr, RANK: tl.constexpr,
):  # fmt: skip
    """Store the sum of the powers over the items of a part without the target, and the number of items that outrank the target.

    SUM [J, parts, 2, M] holds the product that is the origin of the powers, and log2 of their sum. One number would lose digits
    for scores of thousands. COUNT [J, parts, M] holds the number for the first ``ranked`` of all rows. OWN [J, M] gets the
    target's product. It is NaN for a target that is not among the items ``first`` .. N - 1; then all items outrank it.
    """
    j, place, start, low, high = part_of_program(tiles, parts, first, part, N, S)
    row, column = start + tl.arange(0, S), tl.arange(0, C)
    items_at = ITEMS + j * N * D
    target = tl.load(TARGET + j * M + row, mask=row < M, other=-1)
    there = (target >= first) & (target < N)
    hidden = load_operand(HIDDEN + j * M * D, row, column, D, M, D, BF16)
    own = tl.where(there, target_scores(hidden, items_at, target, there, column, D, S), float("nan"))
    # The programs of all parts have the same numbers.
    if low == first:
        tl.store(OWN + j * M + row, own, mask=row < M)
    # With one load for both products, the compiler keeps the rows of fp32 in more registers than there are.
    hidden = load_operand(HIDDEN + j * M * D, row, column, D, M, D, BF16)
    own = tl.where(own == own, own, -float("inf"))
    # There are fewer than 2^31 items.
    target = tl.where(there, target, -1).to(tl.int32)
    counts = j * M + start < ranked
    origin = tl.zeros((S,), tl.float32)
    total = tl.zeros((S,), tl.float32)
    lost = tl.zeros((S,), tl.float32)
    top = tl.full((S,), -float("inf"), tl.float32)
    count = tl.zeros((S, S), tl.int32)
    items_at += low.to(tl.int64) * D
    for begin in range(low, high, S):
        item = begin + tl.arange(0, S)
        items = load_operand(items_at, tl.arange(0, S), column, D, high - begin, D, BF16)
        raw = tl.dot(hidden, tl.trans(items), input_precision="ieee")
        other = (item[None, :] < high) & (item[None, :] != target[:, None])
        if RANK:
            count = _count(count, counts, raw, other, own, item, target, RANK)
        scores = tl.where(other, raw, -float("inf"))
        top = tl.maximum(top, tl.max(scores, 1))
        # An infinite maximum cannot be the origin. With the origin 0, the sum becomes infinite or NaN as it should.
        moved = tl.where(tl.abs(top) == float("inf"), 0.0, top)
        # Products are subtracted before they are scaled: the difference is nearly exact, and a scaled large product is not.
        shrink = tl.where(total > 0, tl.exp2((origin - moved) * base), 0.0)
        total = total * shrink
        # The sum is compensated, because a plain fp32 sum over a large catalog drifts.
        added = tl.sum(tl.exp2((scores - moved[:, None]) * base), 1) - lost * shrink
        summed = total + added
        lost = tl.where(tl.abs(summed) < float("inf"), (summed - total) - added, 0.0)
        total = summed
        origin = moved
        items_at += S * D
    tl.store(SUM + 2 * place * M + row, origin, mask=row < M)
    tl.store(SUM + (2 * place + 1) * M + row, tl.log2(total), mask=row < M)
    if RANK:
        count = tl.where(there, tl.sum(count, 1), high - low)
        tl.store(COUNT + place * M + row, count, mask=row < M)


def forward(call):
    """Return the log-probability, the rank or None, and the log-sum-exp as in ``LogprobBackwardCall``.

    ``call`` is a ``LogprobCall`` with ``hidden`` [M, D] and ``items`` [N, D], or with [J, M, D] and [J, N, D]. The
    log-probability has the shape of ``target``, and the rank has ``call.counted()`` entries. A target that is not an item of
    the softmax gets the log-probability NaN and a rank behind all items.
    """
    hidden, items, target = map(ready, (call.hidden, call.items, call.target))
    J, M, N, tiles, parts, first, part, base, run = _plan(call, hidden, items)
    ranked = call.counted()
    new, ranks = target.new_empty, RANKS[call.ties] if ranked else 0
    own, sums = new((J, M), dtype=torch.float32), new((J, parts, 2, M), dtype=torch.float32)
    count, rank = (new((J, parts, M), dtype=torch.int32), new(ranked)) if ranked else (None, None)
    sizes = (M, N, tiles, parts, first, part, ranked, base)
    run(softmax_forward, J * tiles * parts, hidden, items, target, own, sums, count, *sizes, RANK=ranks)
    logprob, lse = hidden.new_empty(target.shape), new((*target.shape, 2), dtype=torch.float64)
    tiles = cdiv(M, SUMS["R"])
    sizes = (M, tiles, parts, ranked, call.scale, base)
    launch(merge_sums, J * tiles, own, sums, count, logprob, lse, rank, *sizes, warps=4, **SUMS, RANK=ranks > 0)
    return logprob, new(0) if rank is None and call.ties else rank, lse


def backward(call):
    """Return the gradients of ``hidden`` and ``items``, or None for a gradient that is not needed.

    ``call`` is a ``LogprobBackwardCall``. A row whose log-sum-exp is not finite makes gradients NaN.
    """
    hidden, items, target, lse = map(ready, (call.hidden, call.items, call.target, call.lse))
    J, M, N, tiles, parts, first, part, base, run = _plan(call, hidden, items)
    # The gradient of a sum is one number for all rows.
    step = int(any(call.grad.stride()))
    grad = ready(call.grad if step else call.grad.as_strided((min(1, J * M),), (1,)))
    # Half precision loses digits of probabilities below 2^-14.
    run = functools.partial(run, WIDER=0 if hidden.dtype == torch.float32 and not call.bf16 else 15)
    new = functools.partial(target.new_empty, dtype=torch.float32)
    row, sizes = new((J, NUMBERS.value, M)), (M, N, tiles, first, step, call.scale, base)
    run(prepare_backward, J * tiles, hidden, items, target, lse, grad, row, *sizes)
    d_hidden = d_items = None
    if call.need_hidden:
        d_hidden = torch.empty_like(hidden)
        added = new((J, parts, M, hidden.shape[-1])) if parts > 1 else d_hidden
        sizes = (M, N, tiles, parts, first, part, base)
        run(softmax_backward_hidden, J * tiles * parts, hidden, items, target, row, added, *sizes)
        if parts > 1:
            D = hidden.shape[-1]
            blocks = cdiv(M * D, GRADIENTS["E"])
            launch(merge_gradients, J * blocks, added, d_hidden, M, blocks, parts, warps=4, D=D, **GRADIENTS)
    if call.need_items:
        d_items, tiles = torch.empty_like(items), cdiv(N, run.keywords["S"])
        run(softmax_backward_items, J * tiles, hidden, items, target, row, d_items, M, N, tiles, first, base)
    return d_hidden, d_items


def _plan(call, hidden, items):
    """Return (J, M, N, tiles of rows, parts, first item, items of a part, base, a function that launches a kernel)."""
    (M, D), N, J, first = hidden.shape[-2:], items.shape[-2], len(items) if items.dim() == 3 else 1, int(call.skip_pad)
    # With ``bf16``, tiles in fp32 are rounded when they are loaded.
    products = hidden.new_empty(0, dtype=torch.bfloat16) if call.bf16 else hidden
    chosen = choice("linear_cross_entropy", products, width=D)
    S = chosen.rows or tile_size(D * products.element_size())
    tiles, item_tiles = cdiv(M, S), cdiv(N - first, S)
    parts = max(1, min(item_tiles // SHORTEST_PART, PROGRAMS // max(1, J * tiles)))
    part = cdiv(item_tiles, parts) * S
    constants = {"D": D, "C": max(16, triton.next_power_of_2(D)), "S": S, "BF16": call.bf16}
    run = functools.partial(launch, warps=WARPS[products.dtype], choice=chosen, **constants)
    return J, M, N, tiles, cdiv(N - first, part), first, part, call.scale * math.log2(math.e), run


def tile_size(row_bytes):
    """Return the rows of a tile: few enough that the registers hold all tiles."""
    return 64 if row_bytes <= 64 else 32 if row_bytes <= 256 else 16
