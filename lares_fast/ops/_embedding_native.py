"""The ``native`` backend of ``embedding``: PyTorch's operations, with the mask from the native module."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from lares_fast import _native
from lares_fast._native_random import keep_hidden
from lares_fast._random import SITE_INPUT
from lares_fast.reference.embedding import Tokens, embed, embed_backward
from lares_fast.reference.initial_state import token_places

if TYPE_CHECKING:
    from lares_fast.ops.embedding import EmbeddingCall, Gradients


def obstacle(call: EmbeddingCall, grad: Tensor | None = None) -> str | None:
    """Return why the native module cannot take a call, as a clause, or ``None``."""
    if call.items.device.type != "cpu":
        return f"it runs on the CPU, and items is on {call.items.device}"
    built, reason = _native.available()
    return None if built else reason


def compute(call: EmbeddingCall, grad: Tensor | None = None) -> Tensor | Gradients:
    """Return the rows [P, D], or for their gradient ``grad`` the gradients of the four parameters."""
    tables, (sequence, position), keep = call.tables(), token_places(call.offsets, len(call.items)), None
    if call.threshold and call.rows is not None and call.seed is not None:
        address = {"site": SITE_INPUT, "step": 0, "layer": 0, "width": tables.items.shape[1]}
        keep = keep_hidden(call.seed, call.threshold, **address, rows=call.rows[sequence], positions=position)
    tokens = Tokens(call.items, position, keep)
    if grad is not None:
        return embed_backward(grad, tokens, tables, call.dropout, call.eps)
    return embed(tokens, tables, call.dropout, call.eps)
