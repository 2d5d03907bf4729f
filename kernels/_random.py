"""Keep-masks and h0 in Triton. docs/numerics.md states the layout and the test vectors.

The masks have the bits of lares_fast/_random.py. The numbers of h0 have the same random bits and differ by up to 1e-6.

``key`` is the folded key as one 64-bit integer, k0 + k1 * 2**32. One call of the generator gives the bits of 8 elements.
"""

import triton
import triton.language as tl

_SITE_ATTENTION = tl.constexpr(3)
_SITE_STATE = tl.constexpr(4)


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
def keep_hidden_row(key, threshold, site, step, layer, row, position, R: tl.constexpr, C: tl.constexpr):
    """Return the mask [R, C] of the first C columns, a multiple of 64; ``row`` and ``position`` are [R]."""
    c0 = (tl.arange(0, C // 8) | site << 16)[None, :]
    keep = _decisions(key, threshold, c0, position[:, None], row[:, None], step << 16 | layer)
    keep = tl.reshape(keep, (R, C // 64, 8, 2, 2, 2))
    return tl.reshape(tl.permute(keep, (0, 1, 5, 4, 2, 3)), (R, C))


@triton.jit
def state_normal(key, row, position, R: tl.constexpr, C: tl.constexpr):
    """Return the first C columns of h0 [R, C], a multiple of 4: standard normal numbers, truncated to [-3, 3], in fp32."""
    c0 = (tl.arange(0, C // 4) | _SITE_STATE << 16)[None, :].to(tl.uint32)
    c0, c1 = tl.broadcast(c0, position[:, None].to(tl.uint32))
    c0, c2 = tl.broadcast(c0, row[:, None].to(tl.uint32))
    w0, w1, w2, w3 = tl.philox(key, c0, c1, c2, tl.full(c0.shape, 0, tl.uint32))
    even, odd = tl.join(_normal(w0), _normal(w2)), tl.join(_normal(w1), _normal(w3))
    return tl.reshape(tl.join(even, odd), (R, C))


@triton.jit
def _normal(word):
    """Return the truncated normal number at the quantile (word + 1/2) / 2**32.

    The number is sqrt(2) erfinv(x) for x in [-E, E], E = erf(3 / sqrt(2)). It is x times a polynomial in -log(1 - x * x) - 2.5
    of degree 9, which was fitted at Chebyshev nodes: its largest error in exact arithmetic is 2.1e-8. The distance of x from
    the nearer end, 1 - abs(x), comes from the word, because in 1 - x * x the rounding of x would be an error of 3e-6 there.
    """
    centred = word.to(tl.int32, bitcast=True) ^ -2147483648
    to_end = centred ^ tl.where(centred >= 0, 2147483647, -2147483648)
    # E / 2**31 and 1 - E.
    x = (centred.to(tl.float32) + 0.5) * 4.644041e-10
    end = (to_end.to(tl.float32) + 0.5) * 4.644041e-10 + 0.0026997961
    t = -tl.log(end * (2.0 - end)) - 2.5
    y = -1.0921652e-08
    y = y * t + 3.2501859e-08
    y = y * t + 6.3957503e-07
    y = y * t - 4.8938191e-06
    y = y * t - 6.9347584e-06
    y = y * t + 3.0877770e-04
    y = y * t - 1.7717766e-03
    y = y * t - 5.9077120e-03
    y = y * t + 3.4880209e-01
    y = y * t + 2.1233134
    return tl.minimum(tl.maximum(x * y, -3.0), 3.0)


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
