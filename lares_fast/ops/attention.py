"""``attention``: causal self-attention of sequences without padding."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lares_fast import reference
from lares_fast._dispatch import Backend, register, run
from lares_fast._errors import InputError
from lares_fast._library import no_gradient, register_op
from lares_fast._numbers import number, whole
from lares_fast._random import Draw, drop_threshold
from lares_fast.ops import _triton
from lares_fast.ops._catalog_checks import check_dense
from lares_fast.reference.attention import packed_attention_backward, packed_logsumexp

LONGEST = 512
HEAD_WIDTHS = range(16, 129, 8)


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    offsets: Tensor,
    longest: int,
    *,
    draw: Draw | None = None,
    dropout: float = 0.0,
    step: int = 0,
    layer: int = 0,
    backend: str | None = None,
) -> Tensor:
    """``F.scaled_dot_product_attention(query, key, value, is_causal=True)`` of each packed sequence, heads in dimension 1.

    Sequence b is rows ``offsets[b]`` .. ``offsets[b + 1]`` of all three inputs. Dropout of the probabilities is addressed by
    (``draw``, ``step``, ``layer``), so every backend and the backward drop the same ones.

    Args:
        query: [P, H, D/H] float; P rows of all sequences, one sequence after the other.
        key: as ``query``.
        value: as ``query``.
        offsets: [B + 1] int64 on the same device, rising from 0 to P.
        longest: at least the length of every sequence; an integer, so that no GPU is waited for.
        draw: whose masks are dropped; ``None`` drops nothing. Its ``rows`` [B] are on the same device.
        dropout: the probability of a drop.
        step: part of the address.
        layer: part of the address.
        backend: ``auto`` (default), ``triton`` (fp32, fp16 and bf16 on a GPU) or ``reference``.

    Returns:
        [P, H, D/H] in the dtype of ``query``, differentiable once.

    Raises:
        InputError: an argument has the wrong shape, dtype, device or range. The values of ``offsets`` are checked on the
            CPU only, because a check on a GPU would wait for it. There ``triton`` answers NaN, and so are the gradients:
            in the rows of a sequence that is longer than ``longest`` or leaves the P rows, and in all rows if an offset
            is below the one before. ``reference`` ends in an error of PyTorch, after which the process must start again.
        BackendError: the backend asked for by name cannot take these arguments.
    """
    longest, step, layer = (whole(name, x) for name, x in (("longest", longest), ("step", step), ("layer", layer)))
    dropout = number("dropout", dropout)
    _check(query, key, value, offsets, longest, draw, dropout)
    for name, part in (("step", step), ("layer", layer)):
        if not 0 <= part < 2**16:
            raise InputError(f"{name} must be in 0..65535, which is what an address has room for, but got {part}.")
    rows = seed = None
    if draw is not None and drop_threshold(dropout):
        seed = _triton.seed(draw.key, query.device)
        rows = draw.rows
    return _OP(query, key, value, offsets, longest, rows, seed, dropout, step, layer, backend)[0]


def _check(query: Tensor, key: Tensor, value: Tensor, offsets: Tensor, longest: int, draw: Draw | None, dropout: float) -> None:
    for name, x in (("query", query), ("key", key), ("value", value), ("offsets", offsets)):
        check_dense(name, x)
    if query.dim() != 3 or not query.dtype.is_floating_point:
        raise InputError(f"query must be a floating-point [P, H, D/H], but got {query.dtype} {list(query.shape)}.")
    for name, x in (("key", key), ("value", value)):
        if x.shape != query.shape or x.dtype != query.dtype or x.device != query.device:
            raise InputError(
                f"{name} must be {query.dtype} {list(query.shape)} on {query.device} like query, "
                f"but got {x.dtype} {list(x.shape)} on {x.device}."
            )
    if offsets.dim() != 1 or len(offsets) < 1 or offsets.dtype != torch.int64 or offsets.device != query.device:
        raise InputError(
            f"offsets must be [B + 1] int64 on {query.device}, "
            f"but got {offsets.dtype} {list(offsets.shape)} on {offsets.device}."
        )
    if len(query) and len(offsets) < 2:
        raise InputError(f"offsets must rise from 0 to {len(query)}, the rows of query, but there is only one.")
    if longest < 1:
        raise InputError(f"longest must be at least 1, but got {longest}.")
    if not 0 <= dropout < 1:
        raise InputError(f"dropout must be at least 0 and less than 1, but got {dropout}.")
    if draw is not None and (draw.rows.shape != (len(offsets) - 1,) or draw.rows.device != query.device):
        raise InputError(
            f"draw.rows must be [{len(offsets) - 1}] on {query.device}, one of each sequence, "
            f"but got {list(draw.rows.shape)} on {draw.rows.device}."
        )


def _run(query: Tensor, key: Tensor, value: Tensor, offsets: Tensor, longest: int, *rest: Any) -> tuple[Tensor, Tensor]:
    if offsets.device.type == "cpu":
        lengths = offsets.diff()
        if int(offsets[0]) or int(offsets[-1]) != len(query) or bool((lengths < 0).any()) or bool((lengths > longest).any()):
            raise InputError(f"offsets must rise from 0 to {len(query)}, the rows of query, by at most longest = {longest}.")
    *address, backend = rest
    tensors = (x.detach() for x in (query, key, value))
    out, lse = run("attention", backend, *tensors, offsets, longest, *address, None)
    return out, lse


def _fake(query: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return query.new_empty(query.shape), query.new_empty((query.shape[1], query.shape[0]), dtype=_statistics(query.dtype))


def _statistics(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    query, key, value, offsets, ctx.longest, rows, seed, *ctx.address = inputs
    ctx.save_for_backward(query, key, value, offsets, rows, seed, *output)
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    query, key, value, offsets, rows, seed, out, lse = ctx.saved_tensors
    gradients = _BACKWARD(query, key, value, offsets, ctx.longest, rows, seed, *ctx.address, out, lse, grad)
    return (*gradients, *[None] * 8)


def _run_backward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    *inputs, backend, out, lse, grad = arguments
    dq, dk, dv = run("attention", backend, *inputs, (out, lse, grad))
    return dq, dk, dv


def _fake_backward(query: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return query.new_empty(query.shape), query.new_empty(query.shape), query.new_empty(query.shape)


# What a backend needs for the gradients beside the inputs: the results of the forward and the gradient of the first.
_Gradient = tuple[Tensor, Tensor, Tensor]


def _reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    offsets: Tensor,
    longest: int,
    rows: Tensor | None,
    seed: Tensor | None,
    dropout: float,
    step: int,
    layer: int,
    gradient: _Gradient | None,
) -> tuple[Tensor, ...]:
    draw = None
    if rows is not None and seed is not None:
        packed = int(seed)
        draw = Draw((packed & 0xFFFFFFFF, packed >> 32 & 0xFFFFFFFF), rows)
    how: dict[str, Any] = {"draw": draw, "dropout": dropout, "step": step, "layer": layer}
    if offsets.device.type == "cpu":
        # The scores are [B, H, longest, longest].
        longest = max(1, int(offsets.diff().max()) if len(offsets) > 1 else 1)
    if gradient is not None:
        return packed_attention_backward(query, key, value, offsets, longest, gradient[2], **how)
    out = reference.packed_attention(query, key, value, offsets, longest, **how)
    return out, packed_logsumexp(query, key, offsets, longest).to(_statistics(query.dtype))


def _triton_attention(*arguments: Any) -> tuple[Tensor, ...]:
    *inputs, dropout, step, layer, gradient = arguments
    address = (drop_threshold(dropout), step, layer)
    kernels = _triton.kernels("attention")
    if gradient is not None:
        return kernels.backward(*inputs, *address, *gradient)
    return kernels.forward(*inputs, *address)


def _obstacle(query: Tensor, key: Tensor, value: Tensor, offsets: Tensor, longest: int, *rest: Any) -> str | None:
    if query.dtype not in _triton.DTYPES:
        return f"it takes float32, float16 and bfloat16, and query is {query.dtype}"
    if query.shape[2] not in HEAD_WIDTHS:
        return f"it takes heads of 16 to 128 columns, a multiple of 8, and they have {query.shape[2]}"
    if longest > LONGEST:
        return f"it takes sequences of up to {LONGEST} rows, and longest is {longest}"
    drop = len(rest) > 1 and rest[1] is not None
    # What is asked for the gradients stands last.
    train = len(rest) > 5 and rest[5] is not None
    return _triton.refusal("attention", query, width=query.shape[2], drop=drop, short=longest <= 16, train=train)


register(
    "attention",
    Backend("triton", _triton_attention, _obstacle, note=lambda query, *_: _triton.note("attention", query)),
    Backend("reference", _reference, lambda *_: None),
)

_INPUTS = (
    "Tensor query, Tensor key, Tensor value, Tensor offsets, int longest, Tensor? rows, Tensor? seed,"
    " float dropout, int step, int layer, str? backend"
)
_OP = register_op(
    f"attention({_INPUTS}) -> (Tensor, Tensor)",
    _run,
    _fake,
    _backward,
    _setup_context,
)
_BACKWARD = register_op(
    f"attention_backward({_INPUTS}, Tensor out, Tensor lse, Tensor grad) -> (Tensor, Tensor, Tensor)",
    _run_backward,
    _fake_backward,
    no_gradient("attention_backward", "attention can be differentiated once"),
)
