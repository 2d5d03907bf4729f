"""Kernels of the gradients of the softmax over catalogs. The exponentials are computed again.

Probabilities are multiplied by 2^WIDER before they are rounded to the dtype of the products.
"""

import triton
import triton.language as tl
from lares_fast.kernels._catalog import SIZES, expm1, load_operand, part_of_program, target_scores
from lares_fast.kernels._tiles import store_rows

# Numbers of ROW for each row: the product next to its log-sum-exp, minus log2 of the factor that remains, its target's slope,
# and its gradient.
NEAR, REST, MISS, SLOPE, NUMBERS = map(tl.constexpr, range(5))
EXPONENT = tl.constexpr(0x7F800000)


@triton.jit(do_not_specialize=SIZES)
def prepare_backward(
    HIDDEN, ITEMS, TARGET, LSE, GRAD, ROW, M, N, tiles, first, step, scale, base,
    D: tl.constexpr, C: tl.constexpr, S: tl.constexpr, BF16: tl.constexpr, WIDER: tl.constexpr,
):  # fmt: skip
    """Store the numbers of each row in ROW [J, 4, M]; a row whose log-sum-exp is not finite gets NaN.

    GRAD [J, M] is the gradient of the log-probabilities; with ``step`` 0 it is one number for all rows. LSE [J, M, 2] comes
    from ``merge_sums``. The product next to the log-sum-exp makes powers near 1 of the largest probabilities.
    """
    j = (tl.program_id(0) // tiles).to(tl.int64)
    row, column = (tl.program_id(0) % tiles).to(tl.int64) * S + tl.arange(0, S), tl.arange(0, C)
    inside, scale = row < M, tl.cast(scale, tl.float64)
    hidden = load_operand(HIDDEN + j * M * D, row, column, D, M, D, BF16)
    target = tl.load(TARGET + j * M + row, mask=inside, other=-1)
    there = (target >= first) & (target < N)
    own = target_scores(hidden, ITEMS + j * N * D, target, there, column, D, S).to(tl.float64)
    origin = tl.load(LSE + 2 * (j * M + row), mask=inside, other=0.0)
    lse = tl.load(LSE + 2 * (j * M + row) + 1, mask=inside, other=0.0)
    grad = tl.load(GRAD + (j * M + row) * step, mask=inside, other=0.0).to(tl.float32)
    near = (origin + lse / scale).to(tl.float32)
    near = tl.where(tl.abs(near) < float("inf"), near, origin.to(tl.float32))
    unit = scale / tl.cast(base, tl.float64)
    power = (lse - (near.to(tl.float64) - origin) * scale) / unit - WIDER
    rest = power.to(tl.float32)
    # The rounding of `rest` would change all probabilities of the row in the same direction. The gradient takes it back.
    rounding = tl.exp((rest.to(tl.float64) - power) * unit)
    slope = tl.where(tl.abs(lse) < float("inf"), (grad * scale * rounding).to(tl.float32), float("nan"))
    # 1 - p at the target, with the sign of the slopes.
    miss = expm1((own - origin) * scale - lse) * 2.0**WIDER / rounding
    at = ROW + NUMBERS * j * M + row
    tl.store(at + NEAR * M, near, mask=inside)
    tl.store(at + REST * M, rest, mask=inside)
    tl.store(at + MISS * M, miss.to(tl.float32), mask=inside)
    tl.store(at + SLOPE * M, slope, mask=inside)


@triton.jit
def _slopes(hidden, items, item, target, near, rest, miss, base):
    """Return -2^WIDER times the derivatives of the log-probabilities by the scores of a tile.

    A derivative is 1 - p at the target, and -p elsewhere.
    """
    raw = tl.dot(hidden, tl.trans(items), input_precision="ieee")
    # Products are subtracted before they are scaled: the difference is nearly exact, and a scaled large product is not.
    p = tl.exp2(tl.fma(raw - near[:, None], base, -rest[:, None]))
    return tl.where(item[None, :] == target[:, None], miss[:, None], p)


@triton.jit(do_not_specialize=SIZES)
def softmax_backward_hidden(
    HIDDEN, ITEMS, TARGET, ROW, DHIDDEN, M, N, tiles, parts, first, part, base,
    D: tl.constexpr, C: tl.constexpr, S: tl.constexpr, BF16: tl.constexpr, WIDER: tl.constexpr,
):  # fmt: skip
    """Store the sums over the items of a part, times the gradients of the rows, in DHIDDEN [J, parts, M, D]."""
    j, place, start, low, high = part_of_program(tiles, parts, first, part, N, S)
    row, column = start + tl.arange(0, S), tl.arange(0, C)
    inside = row < M
    hidden = load_operand(HIDDEN + j * M * D, row, column, D, M, D, BF16)
    # A target that is not there has NaN in all its numbers.
    target = tl.load(TARGET + j * M + row, mask=inside, other=-1).to(tl.int32)
    at = ROW + NUMBERS * j * M + row
    near = tl.load(at + NEAR * M, mask=inside, other=0.0)
    rest = tl.load(at + REST * M, mask=inside, other=0.0)
    miss = tl.load(at + MISS * M, mask=inside, other=0.0)
    dhidden = tl.zeros((S, C), tl.float32)
    items_at = ITEMS + (j * N + low) * D
    for begin in range(low, high, S):
        item = begin + tl.arange(0, S)
        items = load_operand(items_at, tl.arange(0, S), column, D, high - begin, D, BF16)
        slopes = _slopes(hidden, items, item, target, near, rest, miss, base)
        # The power of a score outside of the catalog may be infinite.
        slopes = tl.where(item[None, :] < high, slopes, 0.0)
        dhidden += tl.dot(slopes.to(items.dtype), items, input_precision="ieee")
        items_at += S * D
    # The gradient is multiplied after the product: in half precision a small gradient times a probability would become 0.
    dhidden = (dhidden * -(2.0**-WIDER)) * tl.load(at + SLOPE * M, mask=inside, other=0.0)[:, None]
    store_rows(DHIDDEN + place * M * D, dhidden, row, column, D, M, D)


@triton.jit
def _unit(SLOPE_OF, M, B: tl.constexpr):
    """Return a power of two in 2^-100..2^100 above all sizes of the M gradients at SLOPE_OF, and its inverse.

    Infinities and NaN are ignored.
    """
    largest = tl.zeros((B,), tl.float32)
    for begin in range(0, M, B):
        row = begin + tl.arange(0, B)
        size = tl.abs(tl.load(SLOPE_OF + row, mask=row < M, other=0.0))
        largest = tl.maximum(largest, tl.where(size < float("inf"), size, 0.0))
    exponent = (tl.max(largest, 0) * 2.0).to(tl.int32, bitcast=True) & EXPONENT
    # 127 and 254 are the exponents of 1 and 2^127.
    exponent = tl.minimum(tl.maximum(exponent, (127 - 100) << 23), (127 + 100) << 23)
    return exponent.to(tl.float32, bitcast=True), ((254 << 23) - exponent).to(tl.float32, bitcast=True)


@triton.jit(do_not_specialize=SIZES)
def softmax_backward_items(
    HIDDEN, ITEMS, TARGET, ROW, DITEMS, M, N, tiles, first, base,
    D: tl.constexpr, C: tl.constexpr, S: tl.constexpr, BF16: tl.constexpr, WIDER: tl.constexpr,
):  # fmt: skip
    """Store DITEMS [J, N, D] of one tile of items, summed over all rows of its catalog; ``tiles`` programs share a catalog.

    Gradients are multiplied in units of a power of two, which half precision needs.
    """
    j, start = (tl.program_id(0) // tiles).to(tl.int64), tl.program_id(0) % tiles * S
    item, column = start + tl.arange(0, S), tl.arange(0, C)
    items = load_operand(ITEMS + j * N * D, item.to(tl.int64), column, D, N, D, BF16)
    unit, inverse = _unit(ROW + (NUMBERS * j + SLOPE) * M, M, 1024)
    ditems = tl.zeros((S, C), tl.float32)
    hidden_at = HIDDEN + j * M * D
    for begin in range(0, M, S):
        row = begin + tl.arange(0, S)
        inside = row < M
        hidden = load_operand(hidden_at, tl.arange(0, S), column, D, M - begin, D, BF16)
        target = tl.load(TARGET + j * M + row, mask=inside, other=-1).to(tl.int32)
        at = ROW + NUMBERS * j * M + row
        near = tl.load(at + NEAR * M, mask=inside, other=0.0)
        rest = tl.load(at + REST * M, mask=inside, other=0.0)
        miss = tl.load(at + MISS * M, mask=inside, other=0.0)
        slopes = _slopes(hidden, items, item, target, near, rest, miss, base)
        # Outside of the matrix the gradient is 0.
        slopes *= (tl.load(at + SLOPE * M, mask=inside, other=0.0) * inverse)[:, None]
        ditems += tl.dot(tl.trans(slopes.to(hidden.dtype)), hidden, input_precision="ieee")
        hidden_at += S * D
    # An item before the first item of the softmax gets the gradient 0, even if a row makes the other gradients NaN.
    ditems = tl.where((item >= first)[:, None], ditems * (unit * -(2.0**-WIDER)), 0.0)
    store_rows(DITEMS + j * N * D, ditems, item.to(tl.int64), column, D, N, D)
