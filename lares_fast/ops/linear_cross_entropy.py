"""``linear_cross_entropy`` and ``target_logprob``: a softmax over whole item tables, without the scores in memory."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lares_fast._dispatch import Backend, register, run
from lares_fast._library import no_gradient, register_op
from lares_fast.ops import _chunked_softmax, _linear_cross_entropy_native, _linear_cross_entropy_triton
from lares_fast.ops._catalog_calls import LogprobBackwardCall, LogprobCall, check_ties
from lares_fast.reference.linear_cross_entropy import check_reduction, reduced


def target_logprob(
    hidden: Tensor,
    items: Tensor,
    target: Tensor,
    *,
    scale: float = 1.0,
    skip_pad: bool = False,
    bf16: bool = False,
    backend: str | None = None,
) -> Tensor:
    """Return the log-probability of each target under a softmax over all items, without the [M, N] scores.

    It is ``(scale * hidden @ items.T).log_softmax(-1).gather(-1, target[..., None]).squeeze(-1)``.

    It can be differentiated once, in ``hidden`` and ``items``. The backward pass computes the probabilities again. A row with
    a NaN score gives NaN, a row with a score of +inf gives the value of ``logsumexp``, and a score of -inf has the
    probability 0. A row whose log-sum-exp is not finite makes gradients NaN.

    If ``items`` has three dimensions, the call has J catalogs: hidden [J, M, D], items [J, N, D] and target [J, M]. The rows of
    each catalog are scored against its own items, and the result is [J, M]. If ``items`` has two dimensions, all rows share it.

    Args:
        hidden: [..., D] float.
        items: [N, D] or [J, N, D], with the dtype and device of ``hidden``; N is at least 1, or with ``skip_pad`` at least 2.
        target: [...] int64, ids in 0..N - 1, or with ``skip_pad`` in 1..N - 1.
        scale: a positive number, such as 1 / temperature. It gets no gradient, so a tensor that requires one raises an error.
            To learn the temperature, divide ``hidden`` by it.
        skip_pad: leave row 0 of ``items``, the PAD row, out of the softmax. With J catalogs each one has a PAD row.
        bf16: round the operands of the products to bf16. Sums, results and gradients keep their dtype.
        backend: ``auto`` (default), ``triton`` (fp32, fp16 and bf16 on a GPU), ``native`` (fp32 on the CPU) or
            ``reference`` (PyTorch, 4 million scores at a time).

    Returns:
        [...] in the dtype of ``hidden``.

    Raises:
        InputError: an argument has a wrong shape, dtype, device or range. The values of ``target`` are checked on the CPU
            only, because a check on a GPU would wait for it. On a GPU a wrong target gives NaN in the result and the gradients.
        BackendError: the requested backend cannot run this call.
    """
    call = LogprobCall.build(hidden, items, target, scale=scale, skip_pad=skip_pad, bf16=bf16, backend=backend)
    return _logprob_and_rank(call)[0]


def target_logprob_and_rank(
    hidden: Tensor,
    items: Tensor,
    target: Tensor,
    *,
    scale: float = 1.0,
    skip_pad: bool = False,
    ties: str = "order",
    ranked: int | None = None,
    bf16: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Return :func:`target_logprob`, and the rank of the target among the softmax's items as in :func:`target_rank`.

    The backends ``triton`` and ``native`` count ranks in the same pass over the catalog. The rank is int64 [...] and has no
    gradient; the best rank is 0. The arguments and errors are as in the two functions.

    With ``ranked``, only the first ``ranked`` rows get a rank, and the rank is [``ranked``]. The rows are counted in the order
    of ``target.flatten()``. The log-probabilities have the same bits for every ``ranked``.
    """
    check_ties(ties)
    how = {"scale": scale, "skip_pad": skip_pad, "ties": ties, "ranked": ranked, "bf16": bf16}
    call = LogprobCall.build(hidden, items, target, **how, backend=backend)
    return _logprob_and_rank(call)


def linear_cross_entropy(
    hidden: Tensor,
    items: Tensor,
    target: Tensor,
    *,
    scale: float = 1.0,
    skip_pad: bool = False,
    reduction: str = "mean",
    bf16: bool = False,
    backend: str | None = None,
) -> Tensor:
    """Return ``torch.nn.functional.cross_entropy(scale * hidden @ items.T, target)``, without the [M, N] scores.

    It is ``-target_logprob``, reduced by ``reduction``: ``none`` gives [...], ``mean`` (NaN if there are no rows) and ``sum``
    give a scalar. The other arguments and the errors are as in :func:`target_logprob`.
    """
    # The sign changes after the reduction, so that it costs one number and not one for each row.
    logprob = target_logprob(hidden, items, target, scale=scale, skip_pad=skip_pad, bf16=bf16, backend=backend)
    return -reduced(logprob, reduction)


def _explained(*arguments: Any, reduction: str = "mean", **options: Any) -> LogprobCall:
    """Return the call that :func:`linear_cross_entropy` makes."""
    check_reduction(reduction)
    return LogprobCall.build(*arguments, **options).rows()


def _logprob_and_rank(call: LogprobCall) -> tuple[Tensor, Tensor]:
    shape = call.target.shape
    logprob, rank, _ = _OP(*call.rows().arguments())
    return logprob.reshape(shape), rank if call.ties is None or call.ranked is not None else rank.reshape(shape)


def _run(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    call = LogprobCall.of(*arguments)
    logprob, rank, lse = run(call.op, call.backend, call)
    return logprob, call.target.new_empty(0) if rank is None else rank, lse


def _fake(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    call = LogprobCall.of(*arguments)
    hidden, rows = call.hidden, call.target.shape
    rank = call.target.new_empty(call.counted())
    return hidden.new_empty(rows), rank, hidden.new_empty((*rows, 2), dtype=torch.float64)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    hidden, items, target, ctx.scale, ctx.skip_pad, ctx.bf16, ctx.backend, *_ = inputs
    ctx.save_for_backward(hidden, items, target, output[2])
    # A gradient of the log-sum-exp would be a tensor of zeros.
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * LogprobCall.count()
    *tensors, lse = ctx.saved_tensors
    options = (ctx.scale, ctx.skip_pad, ctx.bf16, ctx.backend)
    need_hidden, need_items, *_ = ctx.needs_input_grad
    d_hidden, d_items = _BACKWARD(*tensors, *options, grad, lse, need_hidden, need_items)
    rest = [None] * (LogprobCall.count() - 2)
    return d_hidden if need_hidden else None, d_items if need_items else None, *rest


def _run_backward(*arguments: Any) -> tuple[Tensor, Tensor]:
    call = LogprobBackwardCall.of(*arguments)
    d_hidden, d_items = run(call.op, call.backend, call)
    nothing = call.grad.new_empty(0)
    return nothing if d_hidden is None else d_hidden, nothing if d_items is None else d_items


def _fake_backward(*arguments: Any) -> tuple[Tensor, Tensor]:
    call = LogprobBackwardCall.of(*arguments)
    d_hidden = call.hidden.new_empty(call.hidden.shape if call.need_hidden else 0)
    return d_hidden, call.items.new_empty(call.items.shape if call.need_items else 0)


register(
    "linear_cross_entropy",
    Backend(
        "triton",
        _linear_cross_entropy_triton.forward,
        _linear_cross_entropy_triton.obstacle,
        note=_linear_cross_entropy_triton.note,
    ),
    Backend("native", _linear_cross_entropy_native.forward, _linear_cross_entropy_native.obstacle),
    Backend("reference", _chunked_softmax.forward),
    build=_explained,
)
register(
    "linear_cross_entropy_backward",
    Backend("triton", _linear_cross_entropy_triton.backward, _linear_cross_entropy_triton.obstacle),
    Backend("native", _linear_cross_entropy_native.backward, _linear_cross_entropy_native.obstacle),
    Backend("reference", _chunked_softmax.backward),
)

_BACKWARD = register_op(
    f"target_logprob_backward({LogprobBackwardCall.schema()}) -> (Tensor, Tensor)",
    _run_backward,
    _fake_backward,
    no_gradient("The gradient of target_logprob", "for second derivatives use reference.target_logprob"),
)
_OP = register_op(
    f"target_logprob({LogprobCall.schema()}) -> (Tensor, Tensor, Tensor)",
    _run,
    _fake,
    _backward,
    _save,
)
