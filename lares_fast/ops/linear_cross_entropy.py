"""``linear_cross_entropy`` and ``target_logprob``: a softmax over the whole item table that is never held."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lares_fast import _native
from lares_fast._dispatch import Backend, register, run
from lares_fast._errors import InputError
from lares_fast._library import no_gradient, register_op
from lares_fast._numbers import number
from lares_fast.ops import _chunked_softmax, _triton
from lares_fast.ops._catalog_checks import check_dense, native_obstacle
from lares_fast.ops.target_rank import TIES
from lares_fast.reference.linear_cross_entropy import PAD, reduced
from lares_fast.reference.target_rank import target_rank

_LOWEST_SCALE, _HIGHEST_SCALE = 2.0**-100, 2.0**100
# Of the Triton kernels.
_WIDEST, _MOST_ITEMS = 256, 2**30


def target_logprob(
    hidden: Tensor,
    items: Tensor,
    target: Tensor,
    *,
    scale: float = 1.0,
    skip_pad: bool = False,
    backend: str | None = None,
) -> Tensor:
    """``(scale * hidden @ items.T).log_softmax(-1).gather(-1, target[..., None]).squeeze(-1)``, without the [M, N] scores.

    Differentiable once in ``hidden`` and ``items``; the backward pass computes the probabilities again. A row with a NaN score
    gives NaN, one with a score of +inf as ``logsumexp`` does, and scores of -inf have probability 0; a row whose
    log-sum-exp is not finite makes gradients NaN.

    Args:
        hidden: [..., D] float.
        items: [N, D], same dtype and device as ``hidden``; with ``skip_pad`` N >= 2.
        target: [...] int64, ids in 0..N - 1, with ``skip_pad`` in 1..N - 1.
        scale: a positive number, such as 1 / temperature. It gets no gradient, so a tensor that wants one is refused:
            for a learned temperature multiply ``hidden`` by it.
        skip_pad: take row 0 out of the softmax.
        backend: ``auto`` (default), ``triton`` (fp32, fp16 and bf16 on a GPU), ``native`` (fp32 on the CPU) or
            ``reference`` (PyTorch, 4 million scores at a time).

    Returns:
        [...] in the dtype of ``hidden``.

    Raises:
        InputError: an argument has the wrong shape, dtype, device or range. The values of ``target`` are checked on the CPU
            only, because a check on a GPU would wait for it. There a wrong one gives NaN, and gradients that are NaN.
        BackendError: the backend asked for by name cannot take these arguments.
    """
    return _logprob(hidden, items, target, scale, skip_pad, None, backend)[0]


def target_logprob_and_rank(
    hidden: Tensor,
    items: Tensor,
    target: Tensor,
    *,
    scale: float = 1.0,
    skip_pad: bool = False,
    ties: str = "order",
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """:func:`target_logprob`, and the rank of the target among the softmax's items as :func:`target_rank` has it.

    The native backend counts in the pass that sums. Arguments and errors are those of the two functions; the rank is int64
    [...], 0 is best, and has no gradient.
    """
    if ties not in TIES:
        raise InputError(f"ties must be one of {', '.join(TIES)}, but got {ties!r}.")
    return _logprob(hidden, items, target, scale, skip_pad, ties, backend)


def linear_cross_entropy(
    hidden: Tensor,
    items: Tensor,
    target: Tensor,
    *,
    scale: float = 1.0,
    skip_pad: bool = False,
    reduction: str = "mean",
    backend: str | None = None,
) -> Tensor:
    """``torch.nn.functional.cross_entropy(scale * hidden @ items.T, target)``, without the [M, N] scores.

    ``-target_logprob`` reduced by ``reduction``: ``none``, ``mean`` (NaN of no rows) or ``sum``. Arguments and errors are those
    of :func:`target_logprob`.
    """
    loss = -target_logprob(hidden, items, target, scale=scale, skip_pad=skip_pad, backend=backend)
    return reduced(loss, reduction)


def _logprob(
    hidden: Tensor, items: Tensor, target: Tensor, scale: float, skip_pad: bool, ties: str | None, backend: str | None
) -> tuple[Tensor, Tensor]:
    scale = number("scale", scale)
    _check(hidden, items, target, scale, skip_pad)
    shape = target.shape
    logprob, rank, _ = _OP(
        hidden.reshape(-1, hidden.shape[-1]), items, target.reshape(-1), scale, bool(skip_pad), ties, backend
    )
    return logprob.reshape(shape), rank if ties is None else rank.reshape(shape)


def _check(hidden: Tensor, items: Tensor, target: Tensor, scale: float, skip_pad: bool) -> None:
    for name, value in (("hidden", hidden), ("items", items), ("target", target)):
        check_dense(name, value)
    if hidden.dim() < 1 or not hidden.dtype.is_floating_point:
        raise InputError(f"hidden must be a floating-point [..., D], but got {hidden.dtype} {list(hidden.shape)}.")
    if items.dim() != 2 or items.shape[1] != hidden.shape[-1] or len(items) < 1 + skip_pad:
        least = "at least 2 rows with skip_pad" if skip_pad else "at least 1 row"
        raise InputError(f"items must be [N, {hidden.shape[-1]}] like hidden, with {least}, but got {list(items.shape)}.")
    if items.dtype != hidden.dtype or items.device != hidden.device:
        raise InputError(
            f"items must be {hidden.dtype} on {hidden.device} like hidden, but got {items.dtype} on {items.device}."
        )
    if target.dtype != torch.int64 or target.device != hidden.device or target.shape != hidden.shape[:-1]:
        raise InputError(
            f"target must be torch.int64 {list(hidden.shape[:-1])} on {hidden.device} like hidden, "
            f"but got {target.dtype} {list(target.shape)} on {target.device}."
        )
    if not _LOWEST_SCALE <= scale <= _HIGHEST_SCALE:
        raise InputError(f"scale must be a positive number in 2^-100..2^100, but got {scale}.")


def _run(
    hidden: Tensor, items: Tensor, target: Tensor, scale: float, skip_pad: bool, ties: str | None, backend: str | None
) -> tuple[Tensor, Tensor, Tensor]:
    first = PAD + skip_pad
    if target.device.type == "cpu" and len(target) and not first <= int(target.min()) <= int(target.max()) < len(items):
        raise InputError(f"target must be in {first}..{len(items) - 1}, but it spans {int(target.min())}..{int(target.max())}.")
    logprob, rank, lse = run(
        "linear_cross_entropy", backend, hidden.detach(), items.detach(), target, scale, skip_pad, ties, None
    )
    return logprob, target.new_empty(0) if rank is None else rank, lse


def _fake(
    hidden: Tensor, items: Tensor, target: Tensor, scale: float, skip_pad: bool, ties: str | None, backend: str | None
) -> tuple[Tensor, Tensor, Tensor]:
    size = len(target)
    return hidden.new_empty(size), target.new_empty(0 if ties is None else size), hidden.new_empty(size, dtype=torch.float64)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    hidden, items, target, ctx.scale, ctx.skip_pad, _, ctx.backend = inputs
    ctx.save_for_backward(hidden, items, target, output[2])


def _backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    needs = ctx.needs_input_grad[:2]
    both = _BACKWARD(grad, *ctx.saved_tensors, ctx.scale, ctx.skip_pad, *needs, ctx.backend)
    return *(gradient if needed else None for gradient, needed in zip(both, needs, strict=True)), None, None, None, None, None


def _run_backward(
    grad: Tensor,
    hidden: Tensor,
    items: Tensor,
    target: Tensor,
    lse: Tensor,
    scale: float,
    skip_pad: bool,
    need_hidden: bool,
    need_items: bool,
    backend: str | None,
) -> tuple[Tensor, Tensor]:
    gradient = (grad.detach(), lse, (need_hidden, need_items))
    both = run("linear_cross_entropy", backend, hidden.detach(), items.detach(), target, scale, skip_pad, None, gradient)
    d_hidden, d_items = (grad.new_empty(0) if value is None else value for value in both)
    return d_hidden, d_items


def _fake_backward(
    grad: Tensor, hidden: Tensor, items: Tensor, target: Tensor, lse: Tensor, scale: float, skip_pad: bool, need_hidden: bool,
    need_items: bool, backend: str | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return hidden.new_empty(hidden.shape if need_hidden else 0), items.new_empty(items.shape if need_items else 0)


# What a backend needs for the gradients: those of the log-probabilities [M], the log-sum-exp [M], and which are wanted.
_Gradient = tuple[Tensor, Tensor, tuple[bool, bool]]


def _native_softmax(
    hidden: Tensor,
    items: Tensor,
    target: Tensor,
    scale: float = 1.0,
    skip_pad: bool = False,
    ties: str | None = None,
    gradient: _Gradient | None = None,
) -> tuple[Tensor | None, ...]:
    if gradient is None:
        return _native.target_logprob(hidden, items, target, scale=scale, skip_pad=skip_pad, ties=ties)
    grad, lse, needs = gradient
    return _native.target_logprob_backward(grad, hidden, items, target, lse, scale=scale, skip_pad=skip_pad, needs=needs)


def _reference(
    hidden: Tensor,
    items: Tensor,
    target: Tensor,
    scale: float = 1.0,
    skip_pad: bool = False,
    ties: str | None = None,
    gradient: _Gradient | None = None,
) -> tuple[Tensor | None, ...]:
    if gradient is not None:
        grad, lse, needs = gradient
        return _chunked_softmax.gradients(grad, hidden, items, target, lse, scale, skip_pad, needs)
    logprob, lse = _chunked_softmax.logprob_and_lse(hidden, items, target, scale, skip_pad)
    rank = None if ties is None else target_rank(hidden, items[int(skip_pad) :], target - int(skip_pad), ties=ties)
    return logprob, rank, lse


def _triton_softmax(
    hidden: Tensor,
    items: Tensor,
    target: Tensor,
    scale: float = 1.0,
    skip_pad: bool = False,
    ties: str | None = None,
    gradient: _Gradient | None = None,
) -> tuple[Tensor | None, ...]:
    kernels = _triton.kernels("linear_cross_entropy")
    if gradient is None:
        return kernels.forward(hidden, items, target, scale, skip_pad, ties)
    grad, lse, needs = gradient
    return kernels.backward(grad, hidden, items, target, lse, scale, skip_pad, needs)


def _triton_obstacle(hidden: Tensor, items: Tensor, *rest: object) -> str | None:
    if hidden.dtype not in _triton.DTYPES:
        return f"it takes float32, float16 and bfloat16, and hidden is {hidden.dtype}"
    if not 1 <= hidden.shape[-1] <= _WIDEST:
        return f"it takes 1 to {_WIDEST} columns, and hidden has {hidden.shape[-1]}"
    if len(items) > _MOST_ITEMS:
        return f"it takes up to 2^30 items, and there are {len(items)}"
    # What is asked for the gradients stands last.
    train = len(rest) > 4 and rest[4] is not None
    return _triton.refusal("linear_cross_entropy", hidden, width=hidden.shape[-1], train=train)


register(
    "linear_cross_entropy",
    Backend("triton", _triton_softmax, _triton_obstacle, note=lambda hidden, *_: _triton.note("linear_cross_entropy", hidden)),
    Backend("native", _native_softmax, lambda hidden, items, *_: native_obstacle(hidden, items, name="hidden")),
    Backend("reference", _reference, lambda *_: None),
)

_BACKWARD = register_op(
    "target_logprob_backward(Tensor grad, Tensor hidden, Tensor items, Tensor target, Tensor lse, float scale, bool skip_pad,"
    " bool need_hidden, bool need_items, str? backend) -> (Tensor, Tensor)",
    _run_backward,
    _fake_backward,
    no_gradient("The gradient of target_logprob", "for second derivatives use reference.target_logprob"),
)
_OP = register_op(
    "target_logprob(Tensor hidden, Tensor items, Tensor target, float scale, bool skip_pad, str? ties, str? backend)"
    " -> (Tensor, Tensor, Tensor)",
    _run,
    _fake,
    _backward,
    _save,
)
