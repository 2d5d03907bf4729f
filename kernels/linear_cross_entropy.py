"""Softmax over the whole catalog without the [M, N] scores: log-sum-exp, the target's rank and both gradients.

HIDDEN is [M, D] and ITEMS is [N, D]. A program has a tile of S rows and loops over a part of the items, or it has a tile of S
items and loops over all rows. The parts are summed in a fixed order. There are no atomics.
"""

import functools

import torch
import triton
import triton.language as tl
from lares_fast.kernels._launch import WARPS, choice, launch, ready
from lares_fast.kernels._tiles import load_rows, store_rows
from torch.nn import functional as F

# This many programs keep any GPU busy. The number of parts follows from this constant, so results do not depend on the GPU.
PROGRAMS = 1024
# The smallest number of tiles of items in a part. With fewer tiles, loading the rows would be a large share of the work.
SHORTEST_PART = 8
RANKS = {None: 0, "order": 1, "strict": 2}
# Probabilities are multiplied by this factor before they are rounded, because half precision loses digits below 2^-14.
WIDER = tl.constexpr(2.0**15)

_SIZES = ["M", "N", "tiles", "first", "part"]


@triton.jit(do_not_specialize=_SIZES)
def target_score(HIDDEN, ITEMS, TARGET, OWN, M, N, first, D: tl.constexpr, C: tl.constexpr, S: tl.constexpr):
    """Store the target's score in OWN [M]. Its product has the shape of all other products, so equal items have equal scores.

    The score is NaN where the target is not among the items ``first`` .. N - 1 of the softmax.
    """
    start = tl.program_id(0).to(tl.int64) * S
    row, column = start + tl.arange(0, S), tl.arange(0, C)
    hidden = load_rows(HIDDEN, row, column, D, M, D)
    target = tl.load(TARGET + row, mask=row < M, other=-1)
    there = (target >= first) & (target < N)
    inside = there[:, None] & (column[None, :] < D)
    items = tl.load(ITEMS + target[:, None] * D + column[None, :], mask=inside, other=0.0)
    scores = tl.dot(hidden, tl.trans(items), input_precision="ieee")
    at = tl.arange(0, S)
    own = tl.sum(tl.where(at[:, None] == at[None, :], scores, 0.0), 1)
    tl.store(OWN + row, tl.where(there, own, float("nan")), mask=row < M)


@triton.jit
def _part(tiles, N, first, part, S: tl.constexpr):
    """Return the number of this program's part, the part's first item, the item after its last one, and the first row."""
    pid = tl.program_id(0)
    low = first + pid // tiles * part
    return (pid // tiles).to(tl.int64), low, tl.minimum(low + part, N), (pid % tiles).to(tl.int64) * S


@triton.jit(do_not_specialize=_SIZES)
def softmax_forward(
    HIDDEN, ITEMS, TARGET, OWN, LSE, COUNT, M, N, tiles, first, part, scale,
    D: tl.constexpr, C: tl.constexpr, S: tl.constexpr, RANK: tl.constexpr,
):  # fmt: skip
    """Store the log-sum-exp over the items of a part without the target, and the number of items that outrank the target.

    COUNT [parts, M] holds the number. If the target is not an item of the softmax, all items outrank it. LSE [parts, 2, M]
    holds the origin and the logarithm of the sum as two numbers, because their sum would lose digits for scores of thousands.
    """
    number, low, high, start = _part(tiles, N, first, part, S)
    row, column = start + tl.arange(0, S), tl.arange(0, C)
    hidden = load_rows(HIDDEN, row, column, D, M, D)
    own = tl.load(OWN + row, mask=row < M, other=0.0)
    own = tl.where(own == own, own, -float("inf"))
    target = tl.load(TARGET + row, mask=row < M, other=0)
    origin = tl.zeros((S,), tl.float32)
    total = tl.zeros((S,), tl.float32)
    lost = tl.zeros((S,), tl.float32)
    top = tl.full((S,), -float("inf"), tl.float32)
    count = tl.zeros((S,), tl.int32)
    items_at = ITEMS + low.to(tl.int64) * D
    for begin in range(low, high, S):
        item = begin + tl.arange(0, S)
        items = load_rows(items_at, tl.arange(0, S), column, D, high - begin, D)
        raw = tl.dot(hidden, tl.trans(items), input_precision="ieee")
        other = (item[None, :] < high) & (item[None, :] != target[:, None])
        if RANK:
            better = raw > own[:, None]
            if RANK == 1:
                # A NaN score is the lowest.
                score = tl.where(raw == raw, raw, -float("inf"))
                better = better | ((score == own[:, None]) & (item[None, :] < target[:, None]))
            count += tl.sum((better & other).to(tl.int32), 1)
        scores = tl.where(other, raw * scale, -float("inf"))
        top = tl.maximum(top, tl.max(scores, 1))
        # An infinite maximum cannot be the origin. With the origin 0, the sum becomes infinite or NaN as it should.
        moved = tl.where(tl.abs(top) == float("inf"), 0.0, top)
        shrink = tl.where(total > 0, tl.exp(origin - moved), 0.0)
        total = total * shrink
        # The sum is compensated, because a plain fp32 sum over a large catalog drifts.
        added = tl.sum(tl.exp(scores - moved[:, None]), 1) - lost * shrink
        summed = total + added
        lost = tl.where(tl.abs(summed) < float("inf"), (summed - total) - added, 0.0)
        total = summed
        origin = moved
        items_at += S * D
    tl.store(LSE + 2 * number * M + row, origin, mask=row < M)
    tl.store(LSE + (2 * number + 1) * M + row, tl.log(total), mask=row < M)
    if RANK:
        count = tl.where((target >= first) & (target < N), count, high - low)
        tl.store(COUNT + number * M + row, count, mask=row < M)


@triton.jit
def _slopes(hidden, items, row, item, low, high, TARGET, LSE, MISS, M, scale):
    """Return WIDER times the derivatives of the log-probabilities by the scores of a tile.

    A derivative is MISS [M] = 1 - p at the target, and -p elsewhere. LSE [2, M] is a sum of two numbers: rounded to one
    number, it would change all probabilities of its row in the same direction.
    """
    raw = tl.dot(hidden, tl.trans(items), input_precision="ieee")
    inside = row < M
    lse = tl.load(LSE + row, mask=inside, other=0.0)
    rest = tl.load(LSE + M + row, mask=inside, other=0.0)
    target = tl.load(TARGET + row, mask=inside, other=-1)
    miss = tl.load(MISS + row, mask=inside, other=0.0)
    p = tl.exp(raw * scale - lse[:, None] - rest[:, None])
    slopes = tl.where(item[None, :] == target[:, None], miss[:, None], -p)
    real = inside[:, None] & (item[None, :] >= low) & (item[None, :] < high)
    return tl.where(real, slopes * WIDER, 0.0)


@triton.jit(do_not_specialize=_SIZES)
def softmax_backward_hidden(
    HIDDEN, ITEMS, TARGET, LSE, SLOPE, MISS, DHIDDEN, M, N, tiles, first, part, scale,
    D: tl.constexpr, C: tl.constexpr, S: tl.constexpr,
):  # fmt: skip
    """Store the sums over the items of a part, times the gradients SLOPE [M] of the rows, in DHIDDEN [parts, M, D] fp32."""
    number, low, high, start = _part(tiles, N, first, part, S)
    row, column = start + tl.arange(0, S), tl.arange(0, C)
    hidden = load_rows(HIDDEN, row, column, D, M, D)
    dhidden = tl.zeros((S, C), tl.float32)
    items_at = ITEMS + low.to(tl.int64) * D
    for begin in range(low, high, S):
        item = begin + tl.arange(0, S)
        items = load_rows(items_at, tl.arange(0, S), column, D, high - begin, D)
        slopes = _slopes(hidden, items, row, item, low, high, TARGET, LSE, MISS, M, scale)
        dhidden += tl.dot(slopes.to(items.dtype), items, input_precision="ieee")
        items_at += S * D
    # The gradient is multiplied after the product: in half precision a small gradient times a probability would become 0.
    dhidden *= (tl.load(SLOPE + row, mask=row < M, other=0.0) / WIDER)[:, None]
    store_rows(DHIDDEN + number * M * D, dhidden, row, column, D, M, D)


@triton.jit(do_not_specialize=_SIZES)
def softmax_backward_items(
    HIDDEN, ITEMS, TARGET, LSE, SLOPE, UNIT, MISS, DITEMS, M, N, first, scale,
    D: tl.constexpr, C: tl.constexpr, S: tl.constexpr,
):  # fmt: skip
    """Store DITEMS of one tile of items, summed over all rows. The gradient of a row is UNIT [1] times SLOPE [M].

    SLOPE is at most 1.
    """
    start = tl.program_id(0).to(tl.int64) * S
    item, column = start + tl.arange(0, S), tl.arange(0, C)
    items = load_rows(ITEMS, item, column, D, N, D)
    ditems = tl.zeros((S, C), tl.float32)
    hidden_at = HIDDEN
    for begin in range(0, M, S):
        row = begin + tl.arange(0, S)
        hidden = load_rows(hidden_at, tl.arange(0, S), column, D, M - begin, D)
        slopes = _slopes(hidden, items, row, item, first, N, TARGET, LSE, MISS, M, scale)
        slopes *= tl.load(SLOPE + row, mask=row < M, other=0.0)[:, None]
        ditems += tl.dot(tl.trans(slopes.to(hidden.dtype)), hidden, input_precision="ieee")
        hidden_at += S * D
    # An item before the first item of the softmax gets the gradient 0, even if a row makes the other gradients NaN.
    ditems = tl.where((item >= first)[:, None], ditems * (tl.load(UNIT) / WIDER), 0.0)
    store_rows(DITEMS, ditems, item, column, D, N, D)


def forward(call):
    """Return the log-probability [M], the rank [M] or None, and the log-sum-exp [M] in fp64.

    ``call`` is a ``LogprobCall`` with ``hidden`` [M, D] and ``target`` [M]. A target that is not an item of the softmax gets
    the log-probability NaN and a rank behind all items.
    """
    hidden, items, target = map(ready, (call.hidden, call.items, call.target))
    M, scale, ties = len(hidden), call.scale, call.ties
    run, tiles, parts, numbers = _plan(hidden, items, scale, call.skip_pad)
    raw = _target_scores(run, tiles, hidden, items, target, numbers)
    others = torch.empty(parts, 2, M, dtype=torch.float32, device=hidden.device)
    count = torch.empty(parts, M, dtype=torch.int32, device=hidden.device) if ties else None
    run(softmax_forward, tiles * parts, hidden, items, target, raw, others, count, *numbers, RANK=RANKS[ties])
    own, others = raw.double() * scale, others.double().sum(1).logsumexp(0)
    lse = torch.logaddexp(others, own)
    # The difference own - lse would lose the digits of a log-probability near 0.
    logprob = torch.where(own.isfinite(), -torch.logaddexp(torch.zeros_like(own), others - own), own - lse)
    return logprob.to(hidden.dtype), None if count is None else count.sum(0), lse


def backward(call):
    """Return the gradients of ``hidden`` and ``items``, or None for a gradient that is not needed.

    ``call`` is a ``LogprobBackwardCall``. A row whose log-sum-exp is not finite makes gradients NaN.
    """
    hidden, items, target = map(ready, (call.hidden, call.items, call.target))
    lse, scale = call.lse, call.scale
    run, tiles, parts, numbers = _plan(hidden, items, scale, call.skip_pad)
    M, N, _, first, *_ = numbers
    own = _target_scores(run, tiles, hidden, items, target, numbers).double() * scale
    slope = torch.where(lse.isfinite(), call.grad.double() * scale, torch.nan).float()
    two = torch.stack((lse.float(), (lse - lse.float()).float()))
    shared, miss = (hidden, items, target, two), -(own - lse).expm1().float()
    d_hidden = d_items = None
    if call.need_hidden:
        added = torch.empty(parts, *hidden.shape, dtype=torch.float32, device=hidden.device)
        run(softmax_backward_hidden, tiles * parts, *shared, slope, miss, added, *numbers)
        d_hidden = added.sum(0).to(hidden.dtype)
    if call.need_items:
        d_items, unit = torch.empty_like(items), _unit(slope)
        programs = triton.cdiv(N, run.keywords["S"])
        run(softmax_backward_items, programs, *shared, slope / unit, unit, miss, d_items, M, N, first, scale)
    return d_hidden, d_items


def _unit(slope):
    """Return a power of two, [1], that no absolute value of ``slope`` [M] exceeds. Infinities and NaN are ignored."""
    sizes = F.pad(slope.abs().nan_to_num(0.0, posinf=0.0), (0, 1))
    return torch.ldexp(slope.new_ones(1), sizes.amax(0, keepdim=True).frexp().exponent)


def _target_scores(run, tiles, hidden, items, target, numbers):
    """Return the scores of the targets, [M] fp32, with equal bits in the forward and the backward."""
    M, N, _, first, *_ = numbers
    own = torch.empty(M, dtype=torch.float32, device=hidden.device)
    run(target_score, tiles, hidden, items, target, own, M, N, first)
    return own


def _plan(hidden, items, scale, skip_pad):
    """Return (a function that launches a kernel with these sizes, the number of tiles of rows, the number of parts, numbers).

    The numbers are the arguments (M, N, tiles, first, part, scale) of the kernels.
    """
    (M, D), N, first = hidden.shape, len(items), int(skip_pad)
    chosen = choice("linear_cross_entropy", hidden, width=D)
    S = chosen.rows or tile_size(D * hidden.element_size())
    tiles, item_tiles = triton.cdiv(M, S), triton.cdiv(N - first, S)
    parts = max(1, min(item_tiles // SHORTEST_PART, PROGRAMS // max(1, tiles)))
    part = triton.cdiv(item_tiles, parts) * S
    constants = {"D": D, "C": max(16, triton.next_power_of_2(D)), "S": S}
    run = functools.partial(launch, warps=WARPS[hidden.dtype], choice=chosen, **constants)
    return run, tiles, triton.cdiv(N - first, part), (M, N, tiles, first, part, scale)


def tile_size(row_bytes):
    """Return the rows of a tile: few enough that the registers hold all tiles."""
    return 64 if row_bytes <= 64 else 32 if row_bytes <= 256 else 16
