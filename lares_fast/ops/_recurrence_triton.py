"""The ``triton`` backend of ``recurrence``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lares_fast._errors import InputError
from lares_fast._random import MOST_STEPS, drop_threshold
from lares_fast._transfer import to_device
from lares_fast.ops import _triton

WIDTHS = (64, 128)
WEIGHTS_A_LAYER = 16
HEAD_WIDTHS = (16, 32, 64, 128)
LONGEST = {torch.float32: 64, torch.float16: 128, torch.bfloat16: 128}


def obstacle(h: Tensor, offsets: Tensor, weights: Sequence[Tensor], call: Any = None, *rest: object) -> str | None:
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
    return _triton.refusal("recurrence", h, **_variant(h, weights, call, *rest))


def _variant(h: Tensor, weights: Sequence[Tensor], call: Any = None, *rest: object) -> dict[str, Any]:
    """All of a call that leads to kernels of its own; without ``call``, of one that answers."""
    # An adapter is known by its parameters and those of its norm.
    adapter = {0: "none", 2: "add", 3: "linear", 4: "concat"}[len(weights) % WEIGHTS_A_LAYER]
    sizes = {"width": h.shape[1], "inner": weights[-6].shape[0], "adapter": adapter}
    if call is None:
        return {**sizes, "heads": 2, "output": "last", "drop": False, "long": False, "train": False}
    # Behind the call stands whether a tape is kept, or the gradient.
    train = isinstance(rest[0], Tensor) or bool(rest[0]) if rest else False
    long = call.longest > LONGEST[torch.float32]
    return {**sizes, "heads": call.n_heads, "output": call.output, "drop": _drops(call), "long": long, "train": train}


def _drops(call: Any) -> bool:
    return call.rows is not None and any(map(drop_threshold, call.dropout))


def tape_columns(h: Tensor) -> int:
    """Columns of the tape, which is int32: a row is a token's state before a step."""
    return h.shape[1] * h.element_size() // 4


def forward(call: Any, keep: bool) -> tuple[Tensor, Tensor | None]:
    """(output, tape); a depth of each sequence's own on a GPU is waited for where the size of one of them follows from it."""
    h, B, depth = call.h, len(call.offsets) - 1, call.depth
    if len(h) and not B:
        raise InputError(f"offsets must rise from 0 to the number of tokens, {len(h)}, but there is only one.")
    deepest, total = call.steps, B * call.steps
    keep, by_step = keep and len(h) > 0, call.output == "steps"
    if depth is not None and B and (keep or by_step or _on_host(depth)):
        least, deepest, total = torch.stack((depth.min(), depth.max(), depth.sum())).cpu().tolist()
        if not 1 <= least <= deepest <= MOST_STEPS:
            raise InputError(f"depth must be in 1..{MOST_STEPS}, but it spans {least}..{deepest}.")
    out_rows = {"last": B, "tokens": len(h), "steps": total}[call.output]
    steps = deepest if keep else 0
    out, states = _triton.kernels("recurrence").forward(kernel_call(call), out_rows, steps)
    return out, None if states is None else states.view(torch.int32).view(-1, tape_columns(h))


def _on_host(depth: Tensor) -> bool:
    return depth.device.type == "cpu"


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
    dropped = _drops(call)
    return kernels.Call(
        h=ready(call.h),
        pre=None if call.pre is None else ready(call.pre),
        offsets=ready(call.offsets),
        depth=ready(to_device(call.depths(), call.h.device)),
        weights=call.weights,
        rows=ready(to_device(call.rows, call.h.device)) if dropped else None,
        seed=_triton.seed(call.key, call.h.device) if dropped else None,
        thresholds=thresholds,
        n_heads=call.n_heads,
        adapter=call.adapter,
        output=call.output,
        eps=call.eps,
        longest=call.longest,
    )
