"""Fill a packed batch from a log on the device, in one launch."""

import torch
import triton
import triton.language as tl
from lares_fast.kernels._launch import cdiv, launch

# The elements of a program.
ROWS = 256


@triton.jit(do_not_specialize=["E", "S", "P", "B", "halvings"])
def pack(LOG, STARTS, OFFSETS, ITEMS, TARGETS, E, S, P, B, halvings, R: tl.constexpr):
    """Store R elements of ITEMS [P], or of TARGETS [B] in the programs behind those.

    A program finds the sequence of each item by ``halvings`` halvings of the S sequences. Every element is written once, and no
    address is outside of a tensor, whatever STARTS [S] and OFFSETS [S + 1] hold.
    """
    tiles = tl.cdiv(P, R)
    pid = tl.program_id(0)
    if pid < tiles:
        place = pid.to(tl.int64) * R + tl.arange(0, R)
        # The last sequence that begins at the place or before it is in low .. high - 1.
        low = tl.zeros((R,), tl.int32)
        high = tl.zeros((R,), tl.int32) + S
        for _ in range(halvings):
            middle = (low + high) // 2
            begins = tl.load(OFFSETS + middle) <= place
            low = tl.where(begins, middle, low)
            high = tl.where(begins, high, middle)
        event = tl.load(STARTS + low) + (place - tl.load(OFFSETS + low))
        item = tl.load(LOG + tl.minimum(tl.maximum(event, 0), E - 1))
        tl.store(ITEMS + place, item.to(tl.int64), mask=place < P)
    else:
        row = (pid - tiles).to(tl.int64) * R + tl.arange(0, R)
        inside = row < B
        length = tl.load(OFFSETS + row + 1, mask=inside, other=0) - tl.load(OFFSETS + row, mask=inside, other=0)
        event = tl.load(STARTS + row, mask=inside, other=0) + length
        item = tl.load(LOG + tl.minimum(tl.maximum(event, 0), E - 1))
        tl.store(TARGETS + row, item.to(tl.int64), mask=inside)


def packed(log, starts, offsets, n_tokens, n_targets):
    """Return the items [P] and the targets [B], int64: see ``lares_fast.ops._pack.pack``."""
    items, targets = (torch.empty(n, dtype=torch.int64, device=log.device) for n in (n_tokens, n_targets))
    S = len(starts)
    programs = cdiv(n_tokens, ROWS) + cdiv(n_targets, ROWS)
    numbers = (len(log), S, n_tokens, n_targets, S.bit_length())
    launch(pack, programs, log, starts, offsets, items, targets, *numbers, warps=4, R=ROWS)
    return items, targets
