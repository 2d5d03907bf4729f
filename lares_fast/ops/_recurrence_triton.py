"""The ``triton`` backend of ``recurrence``."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lares_fast._errors import InputError
from lares_fast._numbers import MOST_STEPS
from lares_fast._transfer import to_device
from lares_fast.ops import _triton
from lares_fast.ops._recurrence_call import RecurrenceCall

WIDTHS = (64, 128)
HEAD_WIDTHS = (16, 32, 64, 128)
LONGEST = {torch.float32: 64, torch.float16: 128, torch.bfloat16: 128}


def obstacle(call: RecurrenceCall, *_: object) -> str | None:
    """Return why the kernels cannot take a call, or ``None``."""
    h, width, inner, head = call.h, call.width, call.inner_size, call.width // call.n_heads
    if h.dtype not in _triton.DTYPES:
        return f"it takes float32, float16 and bfloat16, and h is {h.dtype}"
    if width not in WIDTHS:
        return f"it takes widths of 64 and 128, and h has {width}"
    if inner % 64 or not inner:
        return f"it takes inner sizes that are multiples of 64, and the weights have {inner}"
    if head not in HEAD_WIDTHS:
        return f"it takes heads of 16, 32, 64 or 128 columns, and they have {head}"
    if call.longest is None:
        return "it needs longest, the length of the longest sequence"
    products = _products(call)
    if call.longest > LONGEST[products]:
        return f"it takes sequences of up to {LONGEST[products]} rows in {products}, and longest is {call.longest}"
    return _triton.refusal("recurrence", h, **_variant(call, call.longest))


def _products(call: RecurrenceCall) -> torch.dtype:
    """Return the dtype of the operands of products."""
    return torch.bfloat16 if call.bf16 else call.h.dtype


def _variant(call: RecurrenceCall, longest: int) -> dict[str, Any]:
    """Return the properties of a call that decide which kernels it compiles."""
    return {
        "width": call.width,
        "inner": call.inner_size,
        "adapter": call.adapter,
        "heads": call.n_heads,
        "output": call.output,
        "drop": any(call.thresholds),
        "long": longest > LONGEST[torch.float32],
        "bf16": call.bf16,
        "train": call.keep,
    }


def forward(call: RecurrenceCall) -> tuple[Tensor, Tensor | None]:
    """Return (output, tape); the tape holds the state of each token before each step.

    Without ``deepest`` the host waits for a tensor ``depth`` on a GPU if the size of one of the results depends on it. Raises
    :class:`InputError` for a wrong value in a ``depth`` that the host reads.
    """
    h, B, depth = call.h, call.batch, call.depth
    if len(h) and not B:
        raise InputError(f"offsets must rise from 0 to the number of tokens, {len(h)}, but there is only one offset.")
    keep, by_step = call.keep and len(h) > 0, call.output == "steps"
    deepest, total = call.deepest or call.steps, B * call.steps
    if call.deepest is None and depth is not None and B and (keep or by_step or _on_host(depth)):
        least, deepest, total = torch.stack((depth.min(), depth.max(), depth.sum())).cpu().tolist()
        if not 1 <= least <= deepest <= MOST_STEPS:
            raise InputError(f"depth must be in 1..{MOST_STEPS}, but it spans {least}..{deepest}.")
    most = MOST_STEPS if call.deepest is None else call.deepest
    kernels, steps = _triton.kernels("recurrence"), deepest if keep else 0
    out, tape = kernels.forward(*_ready(call), call.output_rows(total), most, steps)
    return out, None if tape is None else tape[:, None]


def _on_host(depth: Tensor) -> bool:
    return depth.device.type == "cpu"


def backward(call: RecurrenceCall, grad: Tensor, tape: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of ``h``, ``pre`` and the weights."""
    if not len(call.h):
        zero = [torch.zeros_like(x) for x in call.empty_gradients()]
        return zero[0], zero[1], zero[2]
    kernels = _triton.kernels("_recurrence_backward")
    h_grad, pre_grad, weights_grad = kernels.backward(*_ready(call), grad, tape.flatten())
    return h_grad, pre_grad, weights_grad


def _ready(call: RecurrenceCall) -> tuple[RecurrenceCall, Tensor]:
    """Return ``call`` as the kernels take it, and its weights in the dtype of products.

    Tensors are contiguous, aligned and on the device of ``h``. ``rows`` and ``seed`` are ``None`` if nothing is dropped.
    """
    aligned, device = _triton.kernels("_launch").ready, call.h.device
    drops = any(call.thresholds)
    made = replace(
        call,
        h=aligned(call.h),
        pre=None if call.pre is None else aligned(call.pre),
        offsets=aligned(call.offsets),
        depth=None if call.depth is None else aligned(to_device(call.depth, device)),
        rows=aligned(to_device(call.rows, device)) if drops and call.rows is not None else None,
        seed=aligned(call.seed) if drops and call.seed is not None else None,
        weights=aligned(call.weights),
    )
    return made, made.weights.to(_products(call))
