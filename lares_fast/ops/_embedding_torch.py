"""The backends ``native`` and ``reference`` of ``embedding``: PyTorch's operations, with two functions that make the mask."""

from __future__ import annotations

from torch import Tensor

from lares_fast import _native
from lares_fast.ops._embedding_call import EmbeddingCall, Gradients
from lares_fast.reference.embedding import Mask, Saved, embed, embed_backward, saved_of, tokens_of


def native_obstacle(call: EmbeddingCall, *_: object) -> str | None:
    """Return why the native module cannot make the mask of a call, as a clause, or ``None``."""
    if call.items.device.type != "cpu":
        return f"it runs on the CPU, and items is on {call.items.device}"
    built, reason = _native.available()
    return None if built else reason


def compute(
    mask: Mask, call: EmbeddingCall, grad: Tensor | None = None, saved: Saved | None = None
) -> tuple[Tensor, Saved] | Gradients:
    """Return the rows [P, D] and what the backward needs, or for their gradient ``grad`` the gradients of the parameters."""
    tables, width = call.tables(), call.item_table.shape[1]
    # The mask is in the saved factors.
    draw = call.draw() if saved is None else None
    tokens = tokens_of(call.items, call.offsets, draw, call.dropout, width, mask)
    if grad is None:
        return embed(tokens, tables, call.dropout, call.eps)
    return embed_backward(grad, tokens, tables, saved or saved_of(tokens, tables, call.dropout), call.eps)
