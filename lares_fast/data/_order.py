"""Sort positions by several keys."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

_MOST = np.int64(2**63 - 1)


def stable_order(*keys: NDArray[Any]) -> NDArray[np.int64]:
    """Return the positions [E] sorted by the last key, then by the key before it, and so on, as ``np.lexsort`` does.

    The keys [E] are integers of at most 64 bits, or float64 without NaN. The bits of the keys and the position share one
    integer where they fit, because NumPy sorts integers several times as fast as it sorts positions.
    """
    size = len(keys[0])
    low = size.bit_length()
    order: NDArray[np.int64] | None = None
    for packed in _parts(keys, 63 - low):
        packed = packed if order is None else packed[order]
        packed <<= np.uint64(low)
        packed |= np.arange(size, dtype=np.uint64)
        packed.sort()
        packed &= np.uint64((1 << low) - 1)
        step = packed.view(np.int64)
        order = step if order is None else order[step]
    return np.arange(size) if order is None else order


def _parts(keys: tuple[NDArray[Any], ...], most: int) -> Iterator[NDArray[np.uint64]]:
    """Yield the bits of ``keys`` in arrays of ``most`` bits, the lowest bits first. The caller may change the arrays."""
    part: NDArray[np.uint64] | None = None
    filled, begun = 0, False
    for key in keys:
        if not begun and (key[1:] >= key[:-1]).all():
            # The positions have the order of this key.
            continue
        begun = True
        rest = _above_least(key)
        bits = int(rest.max()).bit_length()
        while bits:
            taken = min(bits, most - filled)
            piece = rest & np.uint64((1 << taken) - 1)
            rest >>= np.uint64(taken)
            piece <<= np.uint64(filled)
            part = piece if part is None else np.bitwise_or(part, piece, out=part)
            del piece
            bits, filled = bits - taken, filled + taken
            if filled == most:
                yield part
                part, filled = None, 0
        del rest
    if part is not None:
        yield part


def _above_least(key: NDArray[Any]) -> NDArray[np.uint64]:
    """Return integers from 0 on that sort like ``key``."""
    if key.dtype.kind == "f":
        # The two zeros become one. The bits of a negative float count backwards.
        bits = (key + 0.0).view(np.int64)
        key = np.where(bits < 0, bits ^ _MOST, bits)
    # The difference of two int64 fits uint64.
    above = key.astype(np.int64)
    above -= key.min()
    return above.view(np.uint64)
