"""Causal attention of packed sequences: one kernel for the forward, and two for the backward.

Queries, keys and values are [P, H, E]; sequence b is the rows OFFSETS[b]:OFFSETS[b + 1]. A program has a tile of S rows of one
head of one sequence, queries or keys, and loops over the tiles of the other side. One program writes each element. There are
no atomics, so results do not depend on the order of programs.

The host does not read OFFSETS. The results of a sequence that leaves the P rows, or is longer than ``longest``, are NaN.
"""

import math

import torch
import triton
import triton.language as tl
from lares_fast.kernels._launch import WARPS, cdiv, choice, launch, ready, rising
from lares_fast.kernels._tiles import dropout_factor, load_rows, store_rows, visible

LOG2E = tl.constexpr(1.4426950408889634)
# Lengths, sizes and addresses must not compile variants of their own.
_SIZES = ["P", "H", "tiles", "longest", "threshold", "step", "layer"]


@triton.jit
def _place(OFFSETS, P, H, tiles, longest, S: tl.constexpr):
    """Return (sequence, head, first row of this program's tile, first packed row, length, number of invalid rows).

    A sequence that is not valid gets the length 0. The program of its first tile stores NaN in the invalid rows, which begin at
    the first packed row. The valid sequences and the invalid rows together are all P rows, each of them once.
    """
    pid = tl.program_id(0)
    sequence, start = pid // (H * tiles), pid % tiles * S
    begin, end = tl.load(OFFSETS + sequence), tl.load(OFFSETS + sequence + 1)
    last = (tl.num_programs(0) - 1) // (H * tiles)
    first = tl.where(sequence == 0, 0, tl.minimum(tl.maximum(begin, 0), P))
    after = tl.where(sequence == last, P, tl.minimum(tl.maximum(end, 0), P))
    length = after - first
    valid = (first == begin) & (after == end) & (length <= longest)
    invalid = tl.where(valid | (start > 0), 0, length)
    return sequence, pid // tiles % H, start, first, tl.where(valid, length, 0).to(tl.int32), invalid


@triton.jit
def _store_nan(OUT, count, first, head, H, E: tl.constexpr, C: tl.constexpr, S: tl.constexpr):
    """Store NaN in ``count`` packed rows of a head, from ``first`` on."""
    row, column = tl.arange(0, S), tl.arange(0, C)
    for begin in range(0, count, S):
        nothing = tl.full((S, C), float("nan"), tl.float32)
        store_rows(OUT + ((first + begin) * H + head) * E, nothing, row, column, H * E, count - begin, E)


@triton.jit(do_not_specialize=_SIZES)
def attention_forward(
    Q, K, V, OFFSETS, ROWS, SEED, OUT, LSE, P, H, tiles, longest, scale, threshold, kept, step, layer,
    E: tl.constexpr, C: tl.constexpr, S: tl.constexpr, DROP: tl.constexpr,
):  # fmt: skip
    """Fill OUT [P, H, E] and the scores' logsumexp LSE [H, P] for one tile of queries."""
    sequence, head, start, first, length, invalid = _place(OFFSETS, P, H, tiles, longest, S)
    if start >= length:
        _store_nan(OUT, invalid, first, head, H, E, C, S)
        return
    at = (first * H + head) * E
    row, column = start + tl.arange(0, S), tl.arange(0, C)
    q = load_rows(Q + at, row, column, H * E, length, E)
    top = tl.full((S,), -float("inf"), tl.float32)
    total = tl.zeros((S,), tl.float32)
    out = tl.zeros((S, C), tl.float32)
    for begin in range(0, start + S, S):
        key = begin + tl.arange(0, S)
        k = load_rows(K + at, key, column, H * E, length, E)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        scores = tl.where(visible(row, key, length), scores, -float("inf"))
        # The maximum is finite from the first tile on, because every row sees key 0.
        higher = tl.maximum(top, tl.max(scores, 1))
        p = tl.exp2(scores - higher[:, None])
        shrink = tl.exp2(top - higher)
        total = total * shrink + tl.sum(p, 1)
        if DROP:
            p *= dropout_factor(kept, SEED, threshold, step, layer, ROWS + sequence, head, start, begin, S)
        v = load_rows(V + at, key, column, H * E, length, E)
        out = out * shrink[:, None] + tl.dot(p.to(v.dtype), v, input_precision="ieee")
        top = higher
    store_rows(OUT + at, out / total[:, None], row, column, H * E, length, E)
    lse = (top + tl.log2(total)) / LOG2E
    tl.store(LSE + head.to(tl.int64) * P + first + row, lse, mask=row < length)


@triton.jit(do_not_specialize=_SIZES)
def attention_backward_query(
    Q, K, V, OFFSETS, ROWS, SEED, OUT, LSE, DOUT, DQ, DELTA, P, H, tiles, longest, scale, threshold, kept, step, layer,
    E: tl.constexpr, C: tl.constexpr, S: tl.constexpr, DROP: tl.constexpr,
):  # fmt: skip
    """Fill DQ for one tile of queries, and DELTA [H, P] = sum(OUT * DOUT) for the other pass."""
    sequence, head, start, first, length, invalid = _place(OFFSETS, P, H, tiles, longest, S)
    if start >= length:
        _store_nan(DQ, invalid, first, head, H, E, C, S)
        return
    at = (first * H + head) * E
    row, column = start + tl.arange(0, S), tl.arange(0, C)
    q = load_rows(Q + at, row, column, H * E, length, E)
    dout = load_rows(DOUT + at, row, column, H * E, length, E)
    out = load_rows(OUT + at, row, column, H * E, length, E)
    delta = tl.sum(out.to(tl.float32) * dout.to(tl.float32), 1)
    flat = head.to(tl.int64) * P + first + row
    tl.store(DELTA + flat, delta, mask=row < length)
    lse = tl.load(LSE + flat, mask=row < length, other=0.0) * LOG2E
    dq = tl.zeros((S, C), tl.float32)
    for begin in range(0, start + S, S):
        key = begin + tl.arange(0, S)
        k = load_rows(K + at, key, column, H * E, length, E)
        v = load_rows(V + at, key, column, H * E, length, E)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        p = tl.where(visible(row, key, length), tl.exp2(scores - lse[:, None]), 0.0)
        dp = tl.dot(dout, tl.trans(v), input_precision="ieee")
        if DROP:
            dp *= dropout_factor(kept, SEED, threshold, step, layer, ROWS + sequence, head, start, begin, S)
        ds = p * (dp - delta[:, None])
        dq += tl.dot(ds.to(k.dtype), k, input_precision="ieee")
    store_rows(DQ + at, dq * (scale / LOG2E), row, column, H * E, length, E)


@triton.jit(do_not_specialize=_SIZES)
def attention_backward_key_value(
    Q, K, V, OFFSETS, ROWS, SEED, LSE, DOUT, DELTA, DK, DV, P, H, tiles, longest, scale, threshold, kept, step, layer,
    E: tl.constexpr, C: tl.constexpr, S: tl.constexpr, DROP: tl.constexpr,
):  # fmt: skip
    """Fill DK and DV for one tile of keys."""
    sequence, head, start, first, length, invalid = _place(OFFSETS, P, H, tiles, longest, S)
    if start >= length:
        _store_nan(DK, invalid, first, head, H, E, C, S)
        _store_nan(DV, invalid, first, head, H, E, C, S)
        return
    at = (first * H + head) * E
    key, column = start + tl.arange(0, S), tl.arange(0, C)
    k = load_rows(K + at, key, column, H * E, length, E)
    v = load_rows(V + at, key, column, H * E, length, E)
    dk = tl.zeros((S, C), tl.float32)
    dv = tl.zeros((S, C), tl.float32)
    for begin in range(start, length, S):
        row = begin + tl.arange(0, S)
        flat = head.to(tl.int64) * P + first + row
        lse = tl.load(LSE + flat, mask=row < length, other=0.0) * LOG2E
        delta = tl.load(DELTA + flat, mask=row < length, other=0.0)
        q = load_rows(Q + at, row, column, H * E, length, E)
        dout = load_rows(DOUT + at, row, column, H * E, length, E)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        p = tl.where(visible(row, key, length), tl.exp2(scores - lse[:, None]), 0.0)
        dp = tl.dot(dout, tl.trans(v), input_precision="ieee")
        weight = p
        if DROP:
            factor = dropout_factor(kept, SEED, threshold, step, layer, ROWS + sequence, head, begin, start, S)
            dp *= factor
            weight = p * factor
        dv += tl.dot(tl.trans(weight.to(dout.dtype)), dout, input_precision="ieee")
        ds = p * (dp - delta[:, None])
        dk += tl.dot(tl.trans(ds.to(q.dtype)), q, input_precision="ieee")
    store_rows(DK + at, dk * (scale / LOG2E), key, column, H * E, length, E)
    store_rows(DV + at, dv, key, column, H * E, length, E)


def forward(call):
    """Return (out [P, H, E], lse [H, P] fp32) of an ``AttentionCall``, whose ``rows`` and ``seed`` are None without dropout."""
    launch_tiles, inputs, numbers = _plan(call)
    P, H, _ = call.query.shape
    out = torch.empty_like(inputs[0])
    lse = torch.empty(H, P, dtype=torch.float32, device=out.device)
    launch_tiles(attention_forward, *inputs, out, lse, *numbers)
    return out, lse


def backward(call, out, lse, grad):
    """Return the gradients of query, key and value, for the results of :func:`forward` and the gradient of ``out``."""
    launch_tiles, inputs, numbers = _plan(call)
    grad = ready(grad)
    dq, dk, dv = (torch.empty_like(x) for x in inputs[:3])
    delta = torch.empty_like(lse)
    launch_tiles(attention_backward_query, *inputs, out, lse, grad, dq, delta, *numbers)
    launch_tiles(attention_backward_key_value, *inputs, lse, grad, delta, dk, dv, *numbers)
    return dq, dk, dv


def _optional(tensor):
    return None if tensor is None else ready(tensor)


def _plan(call):
    """Return (a function that launches a kernel with these sizes, the tensors that all kernels read, the numbers they take)."""
    P, H, E = call.query.shape
    chosen = choice("attention", call.query, width=E, longest=call.longest)
    S = chosen.rows or tile_size(call.longest, E * call.query.element_size())
    tiles = cdiv(call.longest, S)
    if P and len(call.offsets) == 1:
        raise ValueError(f"offsets must rise from 0 to {P}, the rows of query, but there is only one offset.")
    programs = (len(call.offsets) - 1) * H * tiles if P else 0
    kept = 1 / (1 - call.threshold / 65536)
    inputs = (*map(ready, (call.query, call.key, call.value, rising(call.offsets))), _optional(call.rows), _optional(call.seed))
    numbers = (P, H, tiles, call.longest, LOG2E.value / math.sqrt(E), call.threshold, kept, call.step, call.layer)
    constants = {"E": E, "C": max(16, triton.next_power_of_2(E)), "S": S, "DROP": call.seed is not None}

    def launch_tiles(kernel, *arguments):
        launch(kernel, programs, *arguments, warps=WARPS[call.query.dtype], choice=chosen, **constants)

    return launch_tiles, inputs, numbers


def tile_size(longest, row_bytes):
    """Return the rows of a tile: few enough that the registers hold all tiles, and no more than the longest sequence needs."""
    return min(32 if row_bytes <= 128 else 16, max(16, triton.next_power_of_2(longest)))
