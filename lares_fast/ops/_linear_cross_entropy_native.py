"""The ``native`` backend of ``linear_cross_entropy``: fp32 on the CPU. csrc/linear_cross_entropy states the workspace."""

from __future__ import annotations

import torch
from torch import Tensor

from lares_fast._errors import InputError
from lares_fast._native_call import call_native, contiguous, thread_count
from lares_fast.ops._catalog_calls import LogprobBackwardCall, LogprobCall, SoftmaxCall
from lares_fast.ops._catalog_checks import native_obstacle


def obstacle(call: SoftmaxCall) -> str | None:
    """Return why the native backend cannot run ``call``, as a clause, or ``None``."""
    return native_obstacle(call.hidden, call.items, name="hidden")


def forward(call: LogprobCall, threads: int | None = None) -> tuple[Tensor, Tensor | None, Tensor]:
    """Return the log-probabilities [M], the ranks [M] or ``None`` without ``call.ties``, and the log-sum-exp [M] in fp64.

    The number of threads changes no bit.
    """
    rows = call.hidden.shape[0]
    logprob, lse = call.hidden.new_empty(rows), call.hidden.new_empty(rows, dtype=torch.float64)
    rank = None if call.ties is None else call.target.new_empty(rows)
    _run("target_logprob", call, threads, logprob=logprob, lse=lse, rank=rank, ties_by_id=call.ties == "order")
    return logprob, rank, lse


def backward(call: LogprobBackwardCall, threads: int | None = None) -> tuple[Tensor | None, Tensor | None]:
    """Return the gradients of ``hidden`` and ``items``, or ``None`` for a gradient that is not needed.

    The number of threads changes no bit.
    """
    d_hidden = call.hidden.new_empty(call.hidden.shape) if call.need_hidden else None
    d_items = call.items.new_empty(call.items.shape) if call.need_items else None
    grad, lse = contiguous("grad", call.grad), contiguous("lse", call.lse)
    _run("target_logprob_backward", call, threads, grad=grad, lse=lse, d_hidden=d_hidden, d_items=d_items)
    return d_hidden, d_items


def _run(function: str, call: SoftmaxCall, threads: int | None, **arguments: object) -> None:
    try:
        call_native(
            function,
            hidden=contiguous("hidden", call.hidden),
            items=contiguous("items", call.items),
            target=contiguous("target", call.target),
            M=call.hidden.shape[0],
            N=call.items.shape[0],
            D=call.items.shape[1],
            scale=call.scale,
            skip_pad=call.skip_pad,
            threads=thread_count(threads),
            **arguments,
        )
    except InputError:
        # The native code found a wrong target. This check names it.
        call.check_values()
        raise
