"""h0 of packed rows: one kernel with a tile of R rows, in C columns of registers. One call of the generator gives 4 columns.

The host does not read OFFSETS. Rows from the last offset on are 0, and other rows that belong to no sequence are NaN.
"""

import torch
import triton
import triton.language as tl
from lares_fast.kernels._launch import cdiv, launch, ready
from lares_fast.kernels._packed import halvings, sequence_of
from lares_fast.kernels._random import state_normal

# The numbers of a tile.
TILE = 2048


@triton.jit(do_not_specialize=["P", "S", "steps"])
def initial_state(OFFSETS, ROWS, SEED, OUT, P, S, steps, std, D: tl.constexpr, C: tl.constexpr, R: tl.constexpr):
    """Fill OUT [P, D]."""
    row = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    column = tl.arange(0, C)[None, :]
    sequence, position, valid = sequence_of(row, OFFSETS, P, S, steps)
    state = state_normal(tl.load(SEED), tl.load(ROWS + sequence), position, R, C) * std
    state = tl.where(valid[:, None], state, float("nan"))
    state = tl.where((row >= tl.load(OFFSETS + S))[:, None], 0.0, state)
    tl.store(OUT + row[:, None] * D + column, state, mask=(row < P)[:, None] & (column < D))


def forward(call):
    """Return h0 [P, D] fp32 of an ``InitialStateCall``."""
    P, D, S = call.n_tokens, call.width, len(call.rows)
    how = {"dtype": torch.float32, "device": call.offsets.device}
    if not S:
        return torch.zeros(P, D, **how)
    out = torch.empty(P, D, **how)
    C = max(16, triton.next_power_of_2(D))
    R = TILE // C
    tensors = (*map(ready, (call.offsets, call.rows, call.seed)), out)
    launch(initial_state, cdiv(P, R), *tensors, P, S, halvings(S), call.std, warps=4, D=D, C=C, R=R)
    return out
