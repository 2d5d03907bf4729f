"""The ``triton`` backend of ``initial_state``."""

from __future__ import annotations

import torch
from torch import Tensor

from lares_fast.ops import _triton
from lares_fast.ops._initial_state_call import InitialStateCall

WIDEST = 256


def obstacle(call: InitialStateCall) -> str | None:
    """Return why the kernel cannot take a call, as a clause, or ``None``."""
    if call.width > WIDEST:
        return f"it takes up to {WIDEST} columns, and width is {call.width}"
    # The numbers are fp32, and the self-test of the kernel is stored for this dtype.
    return _triton.refusal("initial_state", call.offsets.new_empty(0, dtype=torch.float32), width=call.width)


def forward(call: InitialStateCall) -> Tensor:
    """Return h0 [P, D]."""
    out: Tensor = _triton.kernels("initial_state").forward(call)
    return out
