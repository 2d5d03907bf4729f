"""Softmax over the whole catalog without the [M, N] scores: log-sum-exp, the target's rank and both gradients.

HIDDEN is [M, D], ITEMS [N, D]. A program owns a tile of S rows and walks a part of the items, or owns a tile of items and walks
all rows. Parts are merged by sums in a fixed order; there are no atomics.
"""

import functools

import torch
import triton
import triton.language as tl
from lares_fast.kernels._launch import WARPS, choice, launch, ready
from lares_fast.kernels._tiles import load_rows, store_rows
from torch.nn import functional as F

# Enough programs to keep any GPU busy: the number of parts follows from it and not from the GPU, nor do results.
PROGRAMS = 1024
# Tiles of items that a part has at least, so that loading its rows is a small share of its work.
SHORTEST_PART = 8
RANKS = {None: 0, "order": 1, "strict": 2}
# What probabilities are multiplied by before they are rounded: those below 2^-14 would lose digits in half precision.
WIDER = tl.constexpr(2.0**15)

_SIZES = ["M", "N", "tiles", "first", "part"]


@triton.jit(do_not_specialize=_SIZES)
def target_score(HIDDEN, ITEMS, TARGET, OWN, M, N, first, D: tl.constexpr, C: tl.constexpr, S: tl.constexpr):
    """OWN [M]: the target's score, from a product of the same shape as all others, so that equal rows of ITEMS tie.

    NaN where the target is not among the items ``first``.. of the softmax.
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
    """(number of the part, its first and last + 1 item, first row) of a program."""
    pid = tl.program_id(0)
    low = first + pid // tiles * part
    return (pid // tiles).to(tl.int64), low, tl.minimum(low + part, N), (pid % tiles).to(tl.int64) * S


@triton.jit(do_not_specialize=_SIZES)
def softmax_forward(
    HIDDEN, ITEMS, TARGET, OWN, LSE, COUNT, M, N, tiles, first, part, scale,
    D: tl.constexpr, C: tl.constexpr, S: tl.constexpr, RANK: tl.constexpr,
):  # fmt: skip
    """Log-sum-exp over the items of a part but the target, and COUNT [parts, M] of those that outrank it: all where it is none.

    LSE [parts, 2, M] holds the origin and the logarithm of the sum apart: added, scores of thousands would take its digits.
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
        # An infinite maximum is no origin: the sum then comes out infinite by itself, as it comes out NaN.
        moved = tl.where(tl.abs(top) == float("inf"), 0.0, top)
        shrink = tl.where(total > 0, tl.exp(origin - moved), 0.0)
        total = total * shrink
        # Compensated: a plain fp32 sum over a large catalog drifts.
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
    """WIDER times the derivatives of log-probabilities by the scores of a tile: MISS [M] = 1 - p at the target, -p elsewhere.

    LSE [2, M] is a sum of two numbers: rounded to one, it would bend every probability of its row the same way.
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
    """DHIDDEN [parts, M, D] fp32: what the items of a part add, times the gradient SLOPE [M] of a row."""
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
    # After the product: in half precision a small gradient times a probability would be nothing.
    dhidden *= (tl.load(SLOPE + row, mask=row < M, other=0.0) / WIDER)[:, None]
    store_rows(DHIDDEN + number * M * D, dhidden, row, column, D, M, D)


@triton.jit(do_not_specialize=_SIZES)
def softmax_backward_items(
    HIDDEN, ITEMS, TARGET, LSE, SLOPE, UNIT, MISS, DITEMS, M, N, first, scale,
    D: tl.constexpr, C: tl.constexpr, S: tl.constexpr,
):  # fmt: skip
    """DITEMS of one tile of items, over all rows, whose gradients are UNIT [1] times SLOPE [M], at most 1."""
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
    # An item in front of the softmax's gets nothing, even of a row that spoils the others.
    ditems = tl.where((item >= first)[:, None], ditems * (tl.load(UNIT) / WIDER), 0.0)
    store_rows(DITEMS, ditems, item, column, D, N, D)


def forward(hidden, items, target, scale, skip_pad, ties):
    """(log-probability [M], rank [M] or None, log-sum-exp [M] fp64).

    A target that is not among the softmax's items gives NaN, and a rank behind all of them.
    """
    hidden, items, target = map(ready, (hidden, items, target))
    M = len(hidden)
    run, tiles, parts, numbers = _plan(hidden, items, scale, skip_pad)
    raw = _target_scores(run, tiles, hidden, items, target, numbers)
    others = torch.empty(parts, 2, M, dtype=torch.float32, device=hidden.device)
    count = torch.empty(parts, M, dtype=torch.int32, device=hidden.device) if ties else None
    run(softmax_forward, tiles * parts, hidden, items, target, raw, others, count, *numbers, RANK=RANKS[ties])
    own, others = raw.double() * scale, others.double().sum(1).logsumexp(0)
    lse = torch.logaddexp(others, own)
    # The difference of the two would lose the digits of a log-probability near 0.
    logprob = torch.where(own.isfinite(), -torch.logaddexp(torch.zeros_like(own), others - own), own - lse)
    return logprob.to(hidden.dtype), None if count is None else count.sum(0), lse


def backward(grad, hidden, items, target, lse, scale, skip_pad, needs):
    """(gradient of hidden, of items), None for one that is not needed. A row whose log-sum-exp is not finite gives NaN."""
    hidden, items, target = map(ready, (hidden, items, target))
    run, tiles, parts, numbers = _plan(hidden, items, scale, skip_pad)
    M, N, _, first, *_ = numbers
    own = _target_scores(run, tiles, hidden, items, target, numbers).double() * scale
    slope = torch.where(lse.isfinite(), grad.double() * scale, torch.nan).float()
    two = torch.stack((lse.float(), (lse - lse.float()).float()))
    shared, miss = (hidden, items, target, two), -(own - lse).expm1().float()
    d_hidden = d_items = None
    if needs[0]:
        added = torch.empty(parts, *hidden.shape, dtype=torch.float32, device=hidden.device)
        run(softmax_backward_hidden, tiles * parts, *shared, slope, miss, added, *numbers)
        d_hidden = added.sum(0).to(hidden.dtype)
    if needs[1]:
        d_items, unit = torch.empty_like(items), _unit(slope)
        programs = triton.cdiv(N, run.keywords["S"])
        run(softmax_backward_items, programs, *shared, slope / unit, unit, miss, d_items, M, N, first, scale)
    return d_hidden, d_items


def _unit(slope):
    """[1], a power of two that none of ``slope`` [M] exceeds, infinities and NaN aside."""
    sizes = F.pad(slope.abs().nan_to_num(0.0, posinf=0.0), (0, 1))
    return torch.ldexp(slope.new_ones(1), sizes.amax(0, keepdim=True).frexp().exponent)


def _target_scores(run, tiles, hidden, items, target, numbers):
    """The targets' scores [M] fp32, with the same bits in both passes."""
    M, N, _, first, *_ = numbers
    own = torch.empty(M, dtype=torch.float32, device=hidden.device)
    run(target_score, tiles, hidden, items, target, own, M, N, first)
    return own


def _plan(hidden, items, scale, skip_pad):
    """(launch with the constants of these sizes, tiles of rows, parts of the catalog, the numbers that kernels take)."""
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
    """Rows of a tile: few enough that the registers hold all tiles."""
    return 64 if row_bytes <= 64 else 32 if row_bytes <= 256 else 16
