"""The ``triton`` backend of ``embedding``."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from lares_fast.ops import _triton
from lares_fast.ops._embedding_call import EmbeddingCall, Gradients

WIDEST = 256


def obstacle(call: EmbeddingCall, grad: Tensor | None = None, *_: object) -> str | None:
    """Return why the kernels cannot take a call, as a clause, or ``None``."""
    dtype, width = call.item_table.dtype, call.item_table.shape[1]
    if dtype not in _triton.DTYPES:
        return f"it takes float32, float16 and bfloat16, and item_table is {dtype}"
    if width > WIDEST:
        return f"it takes up to {WIDEST} columns, and item_table has {width}"
    drop, train = call.threshold > 0, grad is not None
    return _triton.refusal("embedding", call.item_table, width=width, drop=drop, train=train)


def compute(call: EmbeddingCall, grad: Tensor | None = None, *_: object) -> tuple[Tensor, None] | Gradients:
    """Return the rows [P, D] and ``None``, or for their gradient ``grad`` the gradients of the four parameters."""
    kernels = _triton.kernels("embedding")
    if not call.threshold:
        call = replace(call, rows=None, seed=None)
    if grad is None:
        return kernels.forward(call), None
    gradients: Gradients = kernels.backward(call, grad)
    return gradients
