"""The ``layers`` backend of ``recurrence``: PyTorch's layers and ``ops.attention`` on packed rows, for any size."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from lares_fast._random import SITE_ATTENTION_OUT, SITE_FEED_FORWARD_OUT, RoundKeys, apply_dropout, keep_hidden_at
from lares_fast._transfer import to_device
from lares_fast.ops._recurrence_call import RecurrenceCall
from lares_fast.ops.attention import AttentionCall, attend


def obstacle(call: RecurrenceCall, *_: object) -> str | None:
    """Return why the layers cannot take a call, or ``None``."""
    return "it multiplies in the dtype of h: for bf16 give it bfloat16 tensors" if call.bf16 else None


def not_automatic(call: RecurrenceCall, *_: object) -> str | None:
    """Return why ``auto`` does not choose this backend for ``call``, as a clause, or ``None``."""
    return None if _is_gpu(call.h) else f"it is meant for GPUs, and h is on {call.h.device}"


def _is_gpu(tensor: Tensor) -> bool:
    return tensor.device.type == "cuda"


def forward(call: RecurrenceCall) -> tuple[Tensor, Tensor | None]:
    """Return (output, tape); the tape holds the state before every step."""
    steps, h = _Steps(call), call.h
    states = tape = None
    if call.keep and len(h):
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
        return steps.pack(torch.stack(after, dim=1)), tape
    return h if call.output == "tokens" else h[steps.last], tape


def backward(call: RecurrenceCall, grad: Tensor, tape: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of ``h``, ``pre`` and the weights. Each step is computed again and differentiated alone."""
    h = call.h
    if not len(h):
        zero = [torch.zeros_like(x) for x in call.empty_gradients()]
        return zero[0], zero[1], zero[2]
    steps = _Steps(call)
    states = _states(tape.flatten(), steps)
    precise = torch.promote_types(h.dtype, torch.float32)
    # Without an adapter nothing reads ``pre``, and its gradient stays empty.
    dstate, dpre, dweights = (torch.zeros_like(x, dtype=precise) for x in call.empty_gradients())
    if call.output == "tokens":
        dstate += grad
    elif call.output == "last":
        dstate[steps.last] = grad.to(precise)
    else:
        after = steps.unpack(grad.to(precise))
    for t in reversed(range(steps.count)):
        if call.output == "steps":
            dstate[steps.last] += after[:, t]
        with torch.enable_grad():
            state, weights = (x.detach().requires_grad_() for x in (states[t], call.weights))
            pre = None if call.pre is None else call.pre.detach().requires_grad_()
            out = steps.advance(t, state, pre, weights)
            leaves = [state, weights, *(x for x in (pre,) if x is not None)]
            found = torch.autograd.grad(out, leaves, dstate.to(h.dtype))
        dstate = found[0].to(precise)
        dweights += found[1]
        if pre is not None:
            dpre += found[2]
    return dstate.to(h.dtype), dpre.to(h.dtype), dweights.to(h.dtype)


def _states(tape: Tensor, steps: _Steps) -> Tensor:
    """Return the words of ``tape`` as states [T, P, D]."""
    h = steps.call.h
    return tape.view(h.dtype)[: steps.count * h.numel()].view(steps.count, *h.shape)


class _Steps:
    """The steps of ``call``, and the index tensors on the device of ``h`` that all steps share."""

    def __init__(self, call: RecurrenceCall) -> None:
        self.call = call
        device, B, lengths = call.h.device, call.batch, call.offsets.diff()
        rows = torch.arange(len(call.h), device=device)
        self.sequence = torch.repeat_interleave(torch.arange(B, device=device), lengths, output_size=len(rows))
        self.position = rows - call.offsets[self.sequence]
        self.last = call.offsets[1:] - 1
        self.longest = max(1, call.longest or (int(lengths.max()) if B else 1))
        self.thresholds = call.thresholds
        self.rows = self.seed = self.keys = None
        if any(self.thresholds) and call.rows is not None and call.seed is not None:
            self.rows, self.seed, self.keys = to_device(call.rows, device), call.seed, RoundKeys.of_seed(call.seed)
        self.count, depth = call.steps, call.depth
        # [P, 1]: the number of steps of each row's sequence.
        self.until: Tensor | None = None
        if depth is not None:
            self.count = call.deepest or (int(depth.max()) if B else 1)
            self.until = to_device(depth, device)[self.sequence][:, None]
        if call.output == "steps":
            # The number of rows of the output, and the row of each state [B, T] in it. States after the last step of their
            # sequence have a row after all others, which the output does not have.
            total = B * call.steps if depth is None else 0 if call.deepest else int(depth.sum())
            self.rows_out = int(call.output_rows(total))
            until = to_device(call.depths(), device)[:, None]
            step = torch.arange(self.count, device=device)
            self.row_out = torch.where(step < until, until.cumsum(0) - until + step, self.rows_out)

    def pack(self, states: Tensor) -> Tensor:
        """Return the output "steps" of the ``states`` [B, T, D] of each sequence after every step."""
        out = states.new_zeros(self.rows_out + 1, states.shape[-1])
        out[self.row_out] = states
        return out[:-1]

    def unpack(self, grad: Tensor) -> Tensor:
        """Return the gradients [B, T, D] of the states whose :meth:`pack` has the gradient ``grad``."""
        return torch.cat((grad, grad.new_zeros(1, grad.shape[-1])))[self.row_out]

    def advance(self, t: int, h: Tensor, pre: Tensor | None, weights: Tensor) -> Tensor:
        """Return the states [P, D] after step ``t``, counted from 0."""
        call, x, parts = self.call, h, self.call.weight_layout.cut(weights)
        if pre is not None:
            x = self.norm(_join(call.adapter, h, pre, parts), parts, "norm")
        for layer in range(call.n_layers):
            x = self.layer(x, parts, step=t + call.first_step, layer=layer)
        return x if self.until is None else torch.where(t < self.until, x, h)

    def layer(self, x: Tensor, weights: dict[str, Tensor], *, step: int, layer: int) -> Tensor:
        """Return the states after one transformer layer."""
        call, prefix = self.call, f"layers.{layer}"

        def linear(x: Tensor, name: str) -> Tensor:
            return F.linear(x, weights[f"{prefix}.{name}.weight"], weights[f"{prefix}.{name}.bias"])

        query, key, value = (
            linear(x, f"attention.{name}").unflatten(-1, (call.n_heads, -1)) for name in ("query", "key", "value")
        )
        drops = bool(self.thresholds[1])
        context = attend(
            AttentionCall(
                query,
                key,
                value,
                call.offsets,
                self.rows if drops else None,
                self.seed if drops else None,
                longest=self.longest,
                dropout=call.attention_dropout,
                step=step,
                layer=layer,
                backend="auto",
            )
        )
        y = self.dropped(linear(context.flatten(-2), "attention.output"), SITE_ATTENTION_OUT, step=step, layer=layer)
        x = self.norm(x + y, weights, f"{prefix}.attention.norm")
        y = linear(F.gelu(linear(x, "feed_forward.up")), "feed_forward.down")
        y = self.dropped(y, SITE_FEED_FORWARD_OUT, step=step, layer=layer)
        return self.norm(x + y, weights, f"{prefix}.feed_forward.norm")

    def norm(self, x: Tensor, weights: dict[str, Tensor], name: str) -> Tensor:
        """Return the layer norm of ``x`` with the weights ``name``."""
        return F.layer_norm(x, x.shape[-1:], weights[f"{name}.weight"], weights[f"{name}.bias"], self.call.eps)

    def dropped(self, x: Tensor, site: int, **address: int) -> Tensor:
        """Return ``x`` [P, D] after hidden dropout."""
        threshold = self.thresholds[0]
        if not threshold or self.rows is None or self.keys is None:
            return x
        rows, width = self.rows[self.sequence], x.shape[1]
        keep = keep_hidden_at(self.keys, threshold, site=site, rows=rows, positions=self.position, width=width, **address)
        return apply_dropout(x, keep, threshold)


def _join(adapter: str, h: Tensor, pre: Tensor, weights: dict[str, Tensor]) -> Tensor:
    if adapter == "add":
        return (h + pre) / 2
    if adapter == "concat":
        return F.linear(torch.cat((h, pre), dim=-1), weights["adapter.linear.weight"], weights["adapter.linear.bias"])
    share = weights["adapter.gate"].sigmoid()
    return share * h + (1 - share) * pre
