"""The ``triton`` backend of ``recurrence``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lares_fast._random import drop_threshold
from lares_fast._transfer import sent
from lares_fast.ops import _triton

WIDTHS = (64, 128)
HEAD_WIDTHS = (16, 32, 64, 128)
LONGEST = {torch.float32: 64, torch.float16: 128, torch.bfloat16: 128}


def obstacle(h: Tensor, offsets: Tensor, weights: Sequence[Tensor], call: Any = None, *_: object) -> str | None:
    """Why the kernels cannot take a call, or ``None``."""
    if h.dtype not in _triton.DTYPES:
        return f"it takes float32, float16 and bfloat16, and h is {h.dtype}"
    if h.shape[1] not in WIDTHS:
        return f"it takes widths of 64 and 128, and h has {h.shape[1]}"
    if (inner := weights[-6].shape[0]) % 64 or not inner:
        return f"it takes inner sizes that are multiples of 64, and the weights have {inner}"
    if call is not None:
        if call.bf16:
            return "it multiplies in the dtype of h: for bf16 give it bfloat16 tensors"
        if (head := h.shape[1] // call.n_heads) not in HEAD_WIDTHS:
            return f"it takes heads of 16, 32, 64 or 128 columns, and they have {head}"
        if call.longest is None:
            return "it needs longest, the length of the longest sequence"
        if call.longest > LONGEST[h.dtype]:
            return f"it takes sequences of up to {LONGEST[h.dtype]} rows in {h.dtype}, and longest is {call.longest}"
    return _triton.refusal("recurrence", h, width=h.shape[1])


def tape_columns(h: Tensor) -> int:
    """Columns of the tape, which is int32: a row is a token's state before a step."""
    return h.shape[1] * h.element_size() // 4


def forward(call: Any, keep: bool) -> tuple[Tensor, Tensor | None]:
    """(output, tape); a depth of each sequence's own on a GPU is waited for where the size of one of them follows from it."""
    h, B, depth = call.h, len(call.offsets) - 1, call.depth
    steps = 0
    if keep and len(h):
        steps = call.steps if depth is None else int(depth.max())
    out_rows = {"last": B, "tokens": len(h)}.get(call.output)
    if out_rows is None:
        out_rows = B * call.steps if depth is None else int(depth.sum())
    out, states = _triton.kernels("recurrence").forward(kernel_call(call), out_rows, steps)
    return out, None if states is None else states.view(torch.int32).view(-1, tape_columns(h))


def backward(call: Any, grad: Tensor, tape: Tensor) -> list[Tensor]:
    """The gradients of ``h``, ``pre`` and all weights."""
    if not len(call.h):
        return [torch.zeros_like(x) for x in call.tensors()]
    states = tape.view(call.h.dtype).view(-1, *call.h.shape)
    gradients: list[Tensor] = _triton.kernels("_recurrence_backward").backward(kernel_call(call), grad, states)
    return gradients


def kernel_call(call: Any) -> Any:
    """``call`` as the kernels take it."""
    kernels, ready = _triton.kernels("recurrence"), _triton.kernels("_launch").ready
    thresholds = (0, 0) if call.rows is None else tuple(map(drop_threshold, call.dropout))
    dropped = any(thresholds)
    return kernels.Call(
        h=ready(call.h),
        pre=None if call.pre is None else ready(call.pre),
        offsets=ready(call.offsets),
        depth=ready(sent(call.depths(), call.h.device)),
        weights=call.weights,
        rows=ready(sent(call.rows, call.h.device)) if dropped else None,
        seed=_triton.seed(call.key, call.h.device) if dropped else None,
        thresholds=thresholds,
        n_heads=call.n_heads,
        adapter=call.adapter,
        output=call.output,
        eps=call.eps,
        longest=call.longest,
    )
