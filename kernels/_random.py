"""Keep-masks in Triton, with the bits of lares_fast/_random.py. docs/numerics.md states the layout and the test vectors.

``key`` is the folded key as one 64-bit integer, k0 + k1 * 2**32. One call of the generator gives the bits of 8 elements.
"""

import triton
import triton.language as tl

_SITE_ATTENTION = tl.constexpr(3)


@triton.jit
def _decisions(key, threshold, c0, c1, c2, c3):
    """Return masks [..., sub, half, word mod 2, word div 2] of calls at broadcast counters [..., 8]."""
    c0, c1 = tl.broadcast(c0.to(tl.uint32), c1.to(tl.uint32))
    c0, c2 = tl.broadcast(c0, c2.to(tl.uint32))
    c1 = tl.broadcast_to(c1, c0.shape)
    w0, w1, w2, w3 = tl.philox(key, c0, c1, c2, tl.full(c0.shape, c3, tl.uint32))
    low = tl.join(_halves(w0, threshold), _halves(w1, threshold))
    high = tl.join(_halves(w2, threshold), _halves(w3, threshold))
    return tl.join(low, high)


@triton.jit
def _halves(word, threshold):
    return tl.join((word & 0xFFFF) >= threshold, (word >> 16) >= threshold)


@triton.jit
def keep_hidden(key, threshold, site, step, layer, row, position, column, R: tl.constexpr):
    """Return the mask [R, 64] of the 64 columns from ``column``, a multiple of 64; ``row`` and ``position`` are [R]."""
    c0 = (tl.arange(0, 8) | (column // 64) << 3 | site << 16)[None, :]
    keep = _decisions(key, threshold, c0, position[:, None], row[:, None], step << 16 | layer)
    return tl.reshape(tl.permute(keep, (0, 4, 3, 1, 2)), (R, 64))


@triton.jit
def keep_attention(key, threshold, step, layer, row, head, query, column, Q: tl.constexpr, J: tl.constexpr):
    """Return the mask [Q, J] of batch row ``row``, from query ``query`` and key ``column`` on.

    Q and ``query`` are multiples of 4, J and ``column`` multiples of 16.
    """
    quad = query // 4 + tl.arange(0, Q // 4)
    tile = column // 16 + tl.arange(0, J // 16)
    c0 = (tl.arange(0, 8) | head << 3 | _SITE_ATTENTION << 16)[None, None, :]
    c1 = (quad[:, None] | tile[None, :] << 16)[:, :, None]
    c2 = tl.full((1, 1, 1), row, tl.uint32)
    keep = _decisions(key, threshold, c0, c1, c2, step << 16 | layer)
    return tl.reshape(tl.permute(keep, (0, 5, 4, 1, 2, 3)), (Q, J))


@triton.jit
def keep_attention_pairs(key, threshold, step, layer, row, head, quad, pair, Q: tl.constexpr, J: tl.constexpr):
    """Return the mask [Q, J] over several sequences.

    ``row`` and ``quad`` (query // 4) are [Q / 4], and ``pair`` (key // 2) is [J / 2].
    """
    c0 = (pair & 7 | head << 3 | _SITE_ATTENTION << 16)[None, :]
    c1 = quad[:, None] | (pair >> 3 << 16)[None, :]
    keep = _decisions(key, threshold, c0, c1, row[:, None], step << 16 | layer)
    return tl.reshape(tl.permute(keep, (0, 4, 3, 1, 2)), (Q, J))
