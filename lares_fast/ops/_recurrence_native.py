"""The ``native`` backend of ``recurrence``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lares_fast import _native
from lares_fast._random import drop_threshold

# In the order of the enumerations of csrc/recurrence.
ADAPTERS = ("none", "add", "linear", "concat")
OUTPUTS = ("last", "steps", "tokens")
LONGEST = 512


def obstacle(h: Tensor, offsets: Tensor, weights: Sequence[Tensor], *_: object) -> str | None:
    """Why the C++ code cannot take a call, or ``None``."""
    if h.device.type != "cpu":
        return f"it runs on the CPU, and h is on {h.device}"
    if h.dtype != torch.float32:
        return f"it takes float32, and h is {h.dtype}"
    width, inner = h.shape[1], weights[-6].shape[0]
    if width % 16 or not 16 <= width <= 256:
        return f"it takes widths that are multiples of 16 up to 256, and h has {width}"
    if inner % 16 or not 16 <= inner <= 65536:
        return f"it takes inner sizes that are multiples of 16 up to 65536, and the weights have {inner}"
    longest = int(offsets.diff().max()) if len(offsets) > 1 else 0
    if longest > LONGEST:
        return f"it takes sequences of up to {LONGEST} tokens, and one has {longest}"
    built, reason = _native.available()
    return None if built else reason


def forward(call: Any, keep: bool) -> tuple[Tensor, Tensor | None]:
    """(output, tape)."""
    h = call.h
    out = h.new_empty(call.output_rows(int(call.depths().sum())), h.shape[1])
    tape = h.new_empty((_rows_of_tape(call), 2 * h.shape[1] + 2), dtype=torch.int32) if keep else None
    _native.recurrence_forward(_native_call(call), out, tape)
    return out, tape


def backward(call: Any, grad: Tensor, tape: Tensor) -> list[Tensor]:
    """The gradients of ``h``, ``pre`` and all weights."""
    h_grad, pre_grad, weight_grads = _native.recurrence_backward(_native_call(call), grad.contiguous(), tape)
    return [h_grad, *([] if pre_grad is None else [pre_grad]), *weight_grads]


def _rows_of_tape(call: Any) -> int:
    """One for each token, step and layer that is computed."""
    unread = 0 if call.output == "tokens" else len(call.h) - (len(call.offsets) - 1)
    return int((call.offsets.diff() * call.depths()).sum()) * call.layers - unread


def _native_call(call: Any) -> _native.RecurrenceCall:
    return _native.RecurrenceCall(
        h=call.h.contiguous(),
        pre=None if call.pre is None else call.pre.contiguous(),
        offsets=call.offsets.contiguous(),
        depth=call.depths().contiguous(),
        weights=[weight.contiguous() for weight in call.weights],
        rows=None if call.rows is None else call.rows.cpu().contiguous(),
        key=(call.key[0], call.key[1]),
        thresholds=(0, 0) if call.rows is None else (drop_threshold(call.dropout[0]), drop_threshold(call.dropout[1])),
        n_heads=call.n_heads,
        inner_size=call.weights[-6].shape[0],
        n_layers=call.layers,
        adapter=ADAPTERS.index(call.adapter),
        output=OUTPUTS.index(call.output),
        eps=call.eps,
        bf16=call.bf16,
    )
