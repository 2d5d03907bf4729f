"""The ``native`` backend of ``initial_state``: the native module makes the uniform numbers, with the bits of the reference."""

from __future__ import annotations

from torch import Tensor

from lares_fast import _native
from lares_fast._native_random import state_uniforms
from lares_fast._random import key_of, normal_of
from lares_fast.ops._initial_state_call import InitialStateCall
from lares_fast.reference.initial_state import spread


def obstacle(call: InitialStateCall) -> str | None:
    """Return why the native module cannot take a call, as a clause, or ``None``."""
    if call.offsets.device.type != "cpu":
        return f"it runs on the CPU, and offsets is on {call.offsets.device}"
    built, reason = _native.available()
    return None if built else reason


def forward(call: InitialStateCall) -> Tensor:
    """Return h0 [P, D]."""
    key = key_of(call.seed)

    def normal(rows: Tensor, positions: Tensor) -> Tensor:
        return normal_of(state_uniforms(key, rows, positions, call.width))

    return spread(normal, call.rows, call.offsets, call.n_tokens).mul_(call.std)
