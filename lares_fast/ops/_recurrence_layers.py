"""The ``layers`` backend of ``recurrence``: PyTorch's layers on packed rows around ``ops.attention``, of any size."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lares_fast._random import SITE_ATTENTION_OUT, SITE_FEED_FORWARD_OUT, Draw, apply_dropout, drop_threshold, keep_hidden_at
from lares_fast._transfer import to_device
from lares_fast.ops.attention import attention

# One column of words, which no other backend's tape has.
TAPE_COLUMNS = 1


def obstacle(h: Tensor, offsets: Tensor, weights: Sequence[Tensor], call: Any = None, *_: object) -> str | None:
    """Why the layers cannot take a call, or ``None``."""
    return "it multiplies in the dtype of h: for bf16 give it bfloat16 tensors" if call is not None and call.bf16 else None


def unasked(h: Tensor, *_: object) -> str | None:
    """Why ``auto`` passes over a call, or ``None``."""
    return None if _is_gpu(h) else f"it is there for GPUs, and h is on {h.device}"


def _is_gpu(tensor: Tensor) -> bool:
    return tensor.device.type == "cuda"


def forward(call: Any, keep: bool) -> tuple[Tensor, Tensor | None]:
    """(output, tape): the tape is the state before every step."""
    steps, h = _Steps(call), call.h
    states = tape = None
    if keep and len(h):
        size = steps.count * h.numel()
        tape = h.new_empty(-(-size * h.element_size() // 4), dtype=torch.int32)
        states, tape = _states(tape, steps), tape[:, None]
    after = []
    for t in range(steps.count):
        if states is not None:
            states[t] = h
        h = steps.advance(t, h, call.pre, call.weights)
        if call.output == "steps":
            after.append(h[steps.last])
    if call.output == "steps":
        return torch.stack(after, dim=1).flatten(0, 1)[steps.taken], tape
    return h if call.output == "tokens" else h[steps.last], tape


def backward(call: Any, grad: Tensor, tape: Tensor) -> list[Tensor]:
    """The gradients of ``h``, ``pre`` and all weights: each step is computed again and differentiated alone."""
    steps, h = _Steps(call), call.h
    states = _states(tape.flatten(), steps)
    others = call.tensors()[1:]
    precise = torch.promote_types(h.dtype, torch.float32)
    dstate, *sums = (torch.zeros_like(x, dtype=precise, memory_format=torch.contiguous_format) for x in (h, *others))
    if call.output == "tokens":
        dstate += grad
    elif call.output == "last":
        dstate[steps.last] = grad.to(precise)
    else:
        after = dstate.new_zeros((len(call.offsets) - 1) * steps.count, h.shape[1])
        after[steps.taken] = grad.to(precise)
        after = after.unflatten(0, (-1, steps.count))
    for t in reversed(range(steps.count)):
        if call.output == "steps":
            dstate[steps.last] += after[:, t]
        with torch.enable_grad():
            state, *leaves = (x.detach().requires_grad_() for x in (states[t], *others))
            pre, weights = (None, leaves) if call.pre is None else (leaves[0], leaves[1:])
            out = steps.advance(t, state, pre, weights)
            found = torch.autograd.grad(out, [state, *leaves], dstate.to(h.dtype))
        dstate = found[0].to(precise)
        for total, one in zip(sums, found[1:], strict=True):
            total += one
    return [x.to(h.dtype) for x in (dstate, *sums)]


def _states(tape: Tensor, steps: _Steps) -> Tensor:
    """The words of ``tape`` as states [T, P, D]."""
    h = steps.call.h
    return tape.view(h.dtype)[: steps.count * h.numel()].view(steps.count, *h.shape)


class _Steps:
    """One step after the other of ``call``; all that they share is where ``h`` is."""

    def __init__(self, call: Any) -> None:
        self.call = call
        device, B, lengths = call.h.device, len(call.offsets) - 1, call.offsets.diff()
        rows = torch.arange(len(call.h), device=device)
        self.sequence = torch.repeat_interleave(torch.arange(B, device=device), lengths, output_size=len(rows))
        self.position = rows - call.offsets[self.sequence]
        self.last = call.offsets[1:] - 1
        self.longest = max(1, call.longest or (int(lengths.max()) if B else 1))
        draw = call.draw()
        self.draw = None if draw is None else Draw(draw.key, to_device(draw.rows, device))
        self.count, depth = call.steps, call.depth
        # Of every sequence's T steps, sequence by sequence, those that it takes; and until when a row takes part.
        self.taken: Any = slice(None)
        self.until: Tensor | None = None
        if depth is not None:
            self.count = int(depth.max()) if B else 1
            if call.output == "steps":
                self.taken = to_device((torch.arange(self.count) < depth.cpu()[:, None]).flatten().nonzero()[:, 0], device)
            self.until = to_device(depth, device)[self.sequence][:, None]

    def advance(self, t: int, h: Tensor, pre: Tensor | None, weights: Sequence[Tensor]) -> Tensor:
        """The states [P, D] after step ``t``, counted from 0."""
        call, x, ahead = self.call, h, len(weights) % 16
        step = t + int(pre is not None)
        if pre is not None:
            *adapter, scale, shift = weights[:ahead]
            x = self.norm(_join(call.adapter, h, pre, adapter), scale, shift)
        for layer in range(call.layers):
            x = self.layer(x, weights[ahead + 16 * layer : ahead + 16 * (layer + 1)], step=step, layer=layer)
        return x if self.until is None else torch.where(t < self.until, x, h)

    def layer(self, x: Tensor, weights: Sequence[Tensor], **address: int) -> Tensor:
        """One transformer layer."""
        linear = list(zip(weights[::2], weights[1::2], strict=True))
        query, key, value, output, norm, up, down, last_norm = linear
        call = self.call
        q, k, v = (F.linear(x, *pair).unflatten(-1, (call.n_heads, -1)) for pair in (query, key, value))
        context = attention(
            q, k, v, call.offsets, self.longest, draw=self.draw, dropout=call.dropout[1], backend="auto", **address
        )
        y = self.dropped(F.linear(context.flatten(-2), *output), SITE_ATTENTION_OUT, **address)
        x = self.norm(x + y, *norm)
        y = self.dropped(F.linear(F.gelu(F.linear(x, *up)), *down), SITE_FEED_FORWARD_OUT, **address)
        return self.norm(x + y, *last_norm)

    def norm(self, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        """A layer norm."""
        return F.layer_norm(x, x.shape[-1:], scale, shift, self.call.eps)

    def dropped(self, x: Tensor, site: int, **address: int) -> Tensor:
        """Dropout of a hidden activation."""
        if self.draw is None or not (threshold := drop_threshold(self.call.dropout[0])):
            return x
        rows = self.draw.rows[self.sequence]
        keep = keep_hidden_at(
            self.draw.key, threshold, site=site, rows=rows, positions=self.position, width=x.shape[1], **address
        )
        return apply_dropout(x, keep, threshold)


def _join(adapter: str, h: Tensor, pre: Tensor, weights: Sequence[Tensor]) -> Tensor:
    if adapter == "add":
        return (h + pre) / 2
    if adapter == "concat":
        return F.linear(torch.cat((h, pre), dim=-1), *weights)
    share = weights[0].sigmoid()
    return share * h + (1 - share) * pre
