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
    """Return the log-probabilities, the ranks or ``None`` without ``call.ties``, and ``lse`` as in ``LogprobBackwardCall``.

    The log-probabilities have the shape of ``target``, and the ranks are [``call.counted()``]. Neither the number of
    threads nor the number of ranks changes a bit.
    """
    call, count = call.rounded(), call.target.numel()
    logprob, lse = call.hidden.new_empty(count), call.hidden.new_empty(count, 2, dtype=torch.float64)
    rank = None if call.ties is None else call.target.new_empty(call.counted())
    for rows, part in call.parts():
        own = {"logprob": logprob[rows], "lse": lse[rows], "rank": None if part.ties is None or rank is None else rank[rows]}
        _run("target_logprob", part, threads, **own, ties_by_id=call.ties == "order")
    return logprob.view(call.target.shape), rank, lse.view(*call.target.shape, 2)


def backward(call: LogprobBackwardCall, threads: int | None = None) -> tuple[Tensor | None, Tensor | None]:
    """Return the gradients of ``hidden`` and ``items``, or ``None`` for a gradient that is not needed.

    The number of threads changes no bit.
    """
    call = call.rounded()
    d_hidden = call.hidden.new_empty(call.hidden.shape) if call.need_hidden else None
    d_items = call.items.new_empty(call.items.shape) if call.need_items else None
    for j, part in enumerate(call.each()):
        own = {"d_hidden": d_hidden, "d_items": d_items}
        own = {name: x if x is None or x.dim() == 2 else x[j] for name, x in own.items()}
        grad, lse = contiguous("grad", part.grad), contiguous("lse", part.lse)
        _run("target_logprob_backward", part, threads, grad=grad, lse=lse, **own)
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
