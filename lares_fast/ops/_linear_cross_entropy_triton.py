"""The ``triton`` backend of ``linear_cross_entropy``: fp32, fp16 and bf16 on a GPU."""

from __future__ import annotations

from torch import Tensor

from lares_fast.ops import _triton
from lares_fast.ops._catalog_calls import LogprobBackwardCall, LogprobCall, SoftmaxCall

_STEM = "linear_cross_entropy"
_WIDEST, _MOST_ITEMS = 256, 2**30


def obstacle(call: SoftmaxCall) -> str | None:
    """Return why the Triton kernels cannot run ``call``, as a clause, or ``None``."""
    hidden, count = call.hidden, call.items.shape[-2]
    if hidden.dtype not in _triton.DTYPES:
        return f"it takes float32, float16 and bfloat16, and hidden is {hidden.dtype}"
    if not 1 <= hidden.shape[-1] <= _WIDEST:
        return f"it takes 1 to {_WIDEST} columns, and hidden has {hidden.shape[-1]}"
    if count > _MOST_ITEMS:
        return f"it takes up to 2^30 items, and there are {count}"
    variant = {"width": hidden.shape[-1], "bf16": call.bf16, "train": isinstance(call, LogprobBackwardCall)}
    return _triton.refusal(_STEM, hidden, **variant)


def note(call: SoftmaxCall) -> str | None:
    """Return the text that ``explain`` adds, which names the tuned launch settings, or ``None``."""
    return _triton.note(_STEM, call.hidden)


def forward(call: LogprobCall) -> tuple[Tensor, Tensor | None, Tensor]:
    """Return the log-probabilities, the ranks or ``None`` without ``call.ties``, and ``lse`` as in ``LogprobBackwardCall``."""
    logprob, rank, lse = _triton.kernels(_STEM).forward(call)
    return logprob, rank, lse


def backward(call: LogprobBackwardCall) -> tuple[Tensor | None, Tensor | None]:
    """Return the gradients of ``hidden`` and ``items``, or ``None`` for a gradient that is not needed."""
    d_hidden, d_items = _triton.kernels(_STEM).backward(call)
    return d_hidden, d_items
