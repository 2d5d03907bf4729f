"""Device functions of the softmax over catalogs, and the kernels that merge the parts of a catalog.

HIDDEN is [J, M, D], ITEMS is [J, N, D] and TARGET is [J, M], for J catalogs. The items of a catalog are cut into parts.
"""

import triton
import triton.language as tl
from lares_fast.kernels._tiles import load_rows

# The blocks that the kernels which merge parts load: P parts of R rows, or P parts of E numbers.
SUMS, GRADIENTS = {"P": 64, "R": 16}, {"P": 16, "E": 256}
# A kernel is compiled once for all values of these numbers.
SIZES = ["M", "N", "tiles", "parts", "first", "part", "ranked", "step"]


@triton.jit
def load_operand(base, row, column, stride, rows, columns, BF16: tl.constexpr):
    """Load a tile as :func:`load_rows` does, rounded to bf16 if BF16 is set."""
    tile = load_rows(base, row, column, stride, rows, columns)
    return tile.to(tl.bfloat16) if BF16 else tile


@triton.jit
def target_scores(hidden, ITEMS, target, there, column, D: tl.constexpr, S: tl.constexpr):
    """Return the targets' products, 0 where ``there`` is false. They come from a product of the shape of all others.

    So equal items have equal scores.
    """
    inside = there[:, None] & (column[None, :] < D)
    items = tl.load(ITEMS + target[:, None] * D + column[None, :], mask=inside, other=0.0).to(hidden.dtype)
    scores = tl.dot(hidden, tl.trans(items), input_precision="ieee")
    at = tl.arange(0, S)
    return tl.sum(tl.where(at[:, None] == at[None, :], scores, 0.0), 1)


@triton.jit
def part_of_program(tiles, parts, first, part, N, S: tl.constexpr):
    """Return this program's catalog, the number of its part among all parts of all catalogs, its first row, its first item and
    the item after its last one.
    """
    place, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    low = first + place % parts * part
    high = tl.minimum(low + part, N)
    return (place // parts).to(tl.int64), place.to(tl.int64), tile.to(tl.int64) * S, low, high


@triton.jit
def _log1p(x):
    """Return log(1 + x) for x in 0..1, fp64, with all digits of a small x."""
    one = 1.0 + x
    # The logarithm of the rounded 1 + x is off by a factor that x / (one - 1) corrects.
    return tl.where(one == 1.0, x, tl.log(one) * (x / tl.where(one == 1.0, 1.0, one - 1.0)))


@triton.jit
def expm1(x):
    """Return exp(x) - 1, fp64, with all digits of a small x."""
    power = tl.exp(x)
    corrected = (power - 1.0) * (x / tl.where(power == 1.0, 1.0, tl.log(power)))
    return tl.where(power == 1.0, x, tl.where(power - 1.0 == -1.0, -1.0, corrected))


@triton.jit
def _log_of_sum(a, b):
    """Return log(exp(a) + exp(b)), fp64."""
    gap = tl.where(a == b, 0.0, -tl.abs(a - b))
    return tl.maximum(a, b) + _log1p(tl.exp(gap))


@triton.jit(do_not_specialize=SIZES)
def merge_sums(
    OWN, SUM, COUNT, LOGPROB, LSE, RANKED, M, tiles, parts, ranked, scale, base,
    P: tl.constexpr, R: tl.constexpr, RANK: tl.constexpr,
):  # fmt: skip
    """Merge the parts of R rows: store LOGPROB [J, M], LSE [J, M, 2] fp64, and the rank of the first rows in RANKED [ranked].

    LSE holds a product r of the row and log(sum(exp(scale * (products - r)))). A row of a program belongs to one catalog, and
    ``tiles`` programs share a catalog.
    """
    j = (tl.program_id(0) // tiles).to(tl.int64)
    row = (tl.program_id(0) % tiles).to(tl.int64) * R + tl.arange(0, R)
    scale, base = tl.cast(scale, tl.float64), tl.cast(base, tl.float64)
    own_at = tl.where(row < M, j * M + row, -1)
    own = tl.load(OWN + own_at, mask=row < M, other=0.0).to(tl.float64)
    top = tl.where(tl.abs(own) < float("inf"), own, -float("inf"))
    origin = tl.zeros((R,), tl.float64)
    total = tl.zeros((R,), tl.float64)
    count = tl.zeros((R,), tl.int64)
    for begin in range(0, parts, P):
        number = begin + tl.arange(0, P)
        inside = (number[:, None] < parts) & (row[None, :] < M)
        place = j * parts + number[:, None]
        at = SUM + 2 * place * M + row[None, :]
        found = tl.load(at, mask=inside, other=0.0).to(tl.float64)
        power = tl.load(at + M, mask=inside, other=-float("inf")).to(tl.float64) * (scale / base)
        # A part without a finite product has no origin.
        top = tl.maximum(top, tl.max(tl.where(power == -float("inf"), -float("inf"), found), 0))
        moved = tl.where(tl.abs(top) == float("inf"), 0.0, top)
        shrink = tl.where(total > 0, tl.exp((origin - moved) * scale), 0.0)
        total = total * shrink + tl.sum(tl.exp((found - moved[None, :]) * scale + power), 0)
        origin = moved
        if RANK:
            inside = inside & (j * M + row[None, :] < ranked)
            count += tl.sum(tl.load(COUNT + place * M + row[None, :], mask=inside, other=0).to(tl.int64), 0)
    # Logarithms of the sums, relative to the origin.
    others = tl.log(total)
    mine = (own - origin) * scale
    lse = _log_of_sum(others, mine)
    # The difference mine - lse would lose the digits of a log-probability near 0.
    logprob = tl.where(tl.abs(own) < float("inf"), 0.0 - _log_of_sum(tl.zeros((R,), tl.float64), others - mine), mine - lse)
    row = own_at
    tl.store(LSE + 2 * row, origin, mask=row >= 0)
    tl.store(LSE + 2 * row + 1, lse, mask=row >= 0)
    tl.store(LOGPROB + row, logprob.to(tl.float32).to(LOGPROB.dtype.element_ty), mask=row >= 0)
    if RANK:
        tl.store(RANKED + row, count, mask=(row >= 0) & (row < ranked))


@triton.jit(do_not_specialize=SIZES)
def merge_gradients(PART, OUT, M, tiles, parts, D: tl.constexpr, P: tl.constexpr, E: tl.constexpr):
    """Store the sums over the parts of PART [J, parts, M, D] in OUT [J, M, D]; ``tiles`` programs share a catalog."""
    j, start = (tl.program_id(0) // tiles).to(tl.int64), (tl.program_id(0) % tiles).to(tl.int64) * E
    at = start + tl.arange(0, E)
    total = tl.zeros((E,), tl.float32)
    for begin in range(0, parts, P):
        number = begin + tl.arange(0, P)
        inside = (number[:, None] < parts) & (at[None, :] < tl.cast(M, tl.int64) * D)
        total += tl.sum(tl.load(PART + (j * parts + number[:, None]) * M * D + at[None, :], mask=inside, other=0.0), 0)
    tl.store(OUT + j * M * D + at, total.to(OUT.dtype.element_ty), mask=at < tl.cast(M, tl.int64) * D)
