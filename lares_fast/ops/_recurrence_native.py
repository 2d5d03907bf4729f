"""The ``native`` backend of ``recurrence``: C++ code for fp32 on the CPU."""

from __future__ import annotations

import torch
from torch import Tensor

from lares_fast import _native
from lares_fast._native_call import call_native, contiguous, thread_count
from lares_fast._random import key_of
from lares_fast.ops._recurrence_call import RecurrenceCall

LONGEST = 512


def obstacle(call: RecurrenceCall, *_: object) -> str | None:
    """Return why the C++ code cannot take a call, or ``None``."""
    h, width, inner = call.h, call.width, call.inner_size
    if h.device.type != "cpu":
        return f"it runs on the CPU, and h is on {h.device}"
    if h.dtype != torch.float32:
        return f"it takes float32, and h is {h.dtype}"
    if width % 16 or not 16 <= width <= 256:
        return f"it takes widths that are multiples of 16 up to 256, and h has {width}"
    if inner % 16 or not 16 <= inner <= 65536:
        return f"it takes inner sizes that are multiples of 16 up to 65536, and the weights have {inner}"
    longest = int(call.offsets.diff().max()) if call.batch else 0
    if longest > LONGEST:
        return f"it takes sequences of up to {LONGEST} tokens, and one has {longest}"
    if call.bf16 and call.keep:
        return "it has no gradients with bf16"
    built, reason = _native.available()
    return None if built else reason


def forward(call: RecurrenceCall) -> tuple[Tensor, Tensor | None]:
    """Return (output, tape). The number of threads changes no bit."""
    depth = call.depths()
    total = int(depth.sum())
    rows = call.output_rows(total)
    out = call.h.new_empty(rows, call.width)
    tape = None
    if call.keep:
        tape = call.h.new_empty((_rows_of_tape(call, depth), 2 * call.width + 2), dtype=torch.int32)
    if call.output == "steps":
        # With ``deepest`` there may be rows after the last sequence.
        out[total:] = 0
    _run("recurrence_forward", call, depth, tape=tape, out=out)
    return out, tape


def backward(call: RecurrenceCall, grad: Tensor, tape: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of ``h``, ``pre`` and the weights. The number of threads changes no bit."""
    h_grad, pre_grad, weights_grad = call.empty_gradients()
    _run(
        "recurrence_backward",
        call,
        call.depths(),
        tape=tape,
        out_grad=grad.contiguous(),
        h_grad=h_grad,
        pre_grad=pre_grad,
        weight_grads=_addresses(call, weights_grad),
    )
    return h_grad, pre_grad, weights_grad


def _rows_of_tape(call: RecurrenceCall, depth: Tensor) -> int:
    """Return the number of rows of the tape: one for each token, step and layer that is computed."""
    unread = 0 if call.output == "tokens" else len(call.h) - call.batch
    return int((call.offsets.diff() * depth).sum()) * call.n_layers - unread


def _addresses(call: RecurrenceCall, weights: Tensor) -> list[int]:
    """Return the address of each weight in the flat tensor ``weights``, in the order of the modules' parameters."""
    first, size = weights.data_ptr(), weights.element_size()
    return [first + size * place for place in call.weight_layout.places]


def _run(function: str, call: RecurrenceCall, depth: Tensor, **arguments: object) -> None:
    """Call ``function`` of the native module, with ``arguments`` in addition to the arguments of both directions."""
    weights = contiguous("weights", call.weights)
    hidden, attention = call.thresholds
    call_native(
        function,
        h=contiguous("h", call.h),
        pre=None if call.pre is None else contiguous("pre", call.pre),
        offsets=call.offsets.contiguous(),
        depth=depth.contiguous(),
        rows=None if call.rows is None else call.rows.contiguous(),
        weights=_addresses(call, weights),
        batch=call.batch,
        width=call.width,
        n_heads=call.n_heads,
        inner_size=call.inner_size,
        n_layers=call.n_layers,
        adapter=call.adapter,
        output=call.output,
        eps=call.eps,
        key=(0, 0) if call.seed is None else key_of(call.seed),
        hidden_threshold=hidden,
        attention_threshold=attention,
        first_step=call.first_step,
        bf16=call.bf16,
        threads=thread_count(None),
        **arguments,
    )
