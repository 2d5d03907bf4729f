"""Find the sequence of a packed row on the device. OFFSETS may hold any values; no address leaves the tensors."""

import triton
import triton.language as tl


def halvings(sequences):
    """Return how often :func:`sequence_of` must halve ``sequences`` sequences."""
    return max(0, sequences - 1).bit_length()


@triton.jit
def sequence_of(row, OFFSETS, P, S, steps):
    """Return (sequence, position, valid) of packed rows, int64, with ``steps`` from :func:`halvings`; S is at least 1.

    If the offsets rise, a row is not valid if it belongs to no sequence, or to one that ends after the P rows. If an offset is
    below the one before, several sequences may hold a row, and any of them is found, or none.
    """
    low = (row * 0).to(tl.int32)
    high = low + S
    for _ in range(steps):
        middle = (low + high) // 2
        later = tl.load(OFFSETS + middle) <= row
        low = tl.where(later, middle, low)
        high = tl.where(later, high, middle)
    begin = tl.load(OFFSETS + low)
    position = row - begin
    # A difference of 64 bits may wrap around, and then it is negative.
    end = tl.load(OFFSETS + low + 1)
    return low, position, (begin <= row) & (position >= 0) & (row < end) & (end <= P)
