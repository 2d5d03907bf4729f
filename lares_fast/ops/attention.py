"""``attention``: causal self-attention of sequences without padding."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from lares_fast import reference
from lares_fast._dispatch import Backend, register, run
from lares_fast._errors import InputError
from lares_fast._library import no_gradient, register_op
from lares_fast._numbers import check_dense, number, whole
from lares_fast._random import Draw, drop_threshold, key_of
from lares_fast.ops import _triton
from lares_fast.ops._call import Call
from lares_fast.ops._catalog_checks import check_draw, check_floats, check_rows
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
    """Run ``F.scaled_dot_product_attention(query, key, value, is_causal=True)`` on each packed sequence, heads in dimension 1.

    Sequence b is the rows ``offsets[b]:offsets[b + 1]`` of all three inputs. The address (``draw``, ``step``, ``layer``)
    decides which probabilities dropout drops, so every backend and the backward drop the same ones.

    Args:
        query: [P, H, D/H] float; P rows of all sequences, one sequence after the other.
        key: [P, H, D/H], with the dtype and device of ``query``.
        value: [P, H, D/H], with the dtype and device of ``query``.
        offsets: [B + 1] int64 on the same device, rising from 0 to P.
        longest: at least the length of every sequence; an integer, so that the CPU does not wait for a GPU.
        draw: the addresses of the dropout masks; ``None`` drops nothing. Its ``rows`` [B] are on the same device.
        dropout: the probability of a drop, in [0, 1).
        step: part of the address, in 0..65,535.
        layer: part of the address, in 0..65,535.
        backend: ``auto`` (default), ``triton`` (fp32, fp16 and bf16 on a GPU, D/H a multiple of 8 in 16..128, ``longest`` up to
            512) or ``reference``.

    Returns:
        [P, H, D/H] in the dtype of ``query``; it can be differentiated once.

    Raises:
        InputError: an argument has the wrong shape, dtype, device or range. The values of ``offsets`` are checked on the
            CPU only, because a check on a GPU would wait for it. On a GPU the results and gradients of ``triton`` are NaN
            instead: in the rows of a sequence that is longer than ``longest`` or leaves the P rows, and in all rows if an
            offset is below the one before. ``reference`` ends in an error of PyTorch, after which the process must be
            restarted.
        BackendError: the requested backend cannot take these arguments.
    """
    options = {"draw": draw, "dropout": dropout, "step": step, "layer": layer, "backend": backend}
    return attend(_call(query, key, value, offsets, longest, options))


@dataclass(frozen=True)
class AttentionCall(Call):
    """The arguments of the operator, for the forward and the backward."""

    op: ClassVar[str] = "attention"

    # [P, H, D/H] each.
    query: Tensor
    key: Tensor
    value: Tensor
    # [B + 1] int64.
    offsets: Tensor
    # The rows [B] int64 of the global batch, and the seed [1] int64 of the dropout masks. Nothing is dropped without them.
    rows: Tensor | None
    seed: Tensor | None
    longest: int
    dropout: float
    step: int
    layer: int
    backend: str | None

    @property
    def threshold(self) -> int:
        """Return the dropout threshold, or 0 without a seed."""
        return 0 if self.rows is None or self.seed is None else drop_threshold(self.dropout)


def attend(call: AttentionCall) -> Tensor:
    """Run the operator on a call."""
    out: Tensor = _OP(*call.arguments())[0]
    return out


def _call(
    query: Tensor, key: Tensor, value: Tensor, offsets: Tensor, longest: int, options: Mapping[str, Any]
) -> AttentionCall:
    """Build and check the call that the public arguments describe."""
    draw: Draw | None = options["draw"]
    call = AttentionCall(
        query=query,
        key=key,
        value=value,
        offsets=offsets,
        rows=None,
        seed=None,
        longest=whole("longest", longest),
        dropout=number("dropout", options["dropout"]),
        step=whole("step", options["step"]),
        layer=whole("layer", options["layer"]),
        backend=options["backend"],
    )
    _check(call)
    if draw is None:
        return call
    check_draw(draw, len(offsets) - 1, query.device)
    return replace(call, rows=draw.rows, seed=draw.seed(query.device)) if drop_threshold(call.dropout) else call


def build_call(query: Tensor, key: Tensor, value: Tensor, offsets: Tensor, longest: int, **options: Any) -> AttentionCall:
    """Build and check the call that the arguments of :func:`attention` describe."""
    return _call(query, key, value, offsets, longest, {**(attention.__kwdefaults__ or {}), **options})


def _check(call: AttentionCall) -> None:
    query, offsets = call.query, call.offsets
    for name in ("query", "key", "value", "offsets"):
        check_dense(name, getattr(call, name))
    check_floats("query", query, 3, "[P, H, D/H]")
    for name, x in (("key", call.key), ("value", call.value)):
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
        raise InputError(f"offsets must rise from 0 to {len(query)}, the rows of query, but there is only one offset.")
    if not 1 <= call.longest < 2**63:
        raise InputError(f"longest must be at least 1 and an integer of 64 bits, but got {call.longest}.")
    if not 0 <= call.dropout < 1:
        raise InputError(f"dropout must be at least 0 and less than 1, but got {call.dropout}.")
    for name, part in (("step", call.step), ("layer", call.layer)):
        if not 0 <= part < 2**16:
            raise InputError(f"{name} must be in 0..65535, because an address has 16 bits for it, but got {part}.")


def _run(*arguments: Any) -> tuple[Tensor, Tensor]:
    call = AttentionCall(*arguments)
    rows, longest, offsets = len(call.query), call.longest, call.offsets
    if offsets.device.type == "cpu":
        lengths = offsets.diff()
        if int(offsets[0]) or int(offsets[-1]) != rows or bool((lengths < 0).any()) or bool((lengths > longest).any()):
            raise InputError(f"offsets must rise from 0 to {rows}, the rows of query, by at most longest = {longest}.")
    check_rows(call.rows)
    call = replace(call, query=call.query.detach(), key=call.key.detach(), value=call.value.detach())
    out, lse = run("attention", call.backend, call)
    return out, lse


def _fake(query: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return query.new_empty(query.shape), query.new_empty((query.shape[1], query.shape[0]), dtype=_statistics(query.dtype))


def _statistics(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


# The fields of a call that hold tensors come first: query to seed.
_TENSORS = 6


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*output, *inputs[:_TENSORS])
    ctx.rest = inputs[_TENSORS:]
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    out, lse, *tensors = ctx.saved_tensors
    gradients = _BACKWARD(*tensors, *ctx.rest, out, lse, grad)
    return (*gradients, *[None] * (AttentionCall.count() - len(gradients)))


def _run_backward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    *inputs, out, lse, grad = arguments
    call = AttentionCall(*inputs)
    dq, dk, dv = run("attention", call.backend, call, (out, lse, grad))
    return dq, dk, dv


def _fake_backward(query: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return query.new_empty(query.shape), query.new_empty(query.shape), query.new_empty(query.shape)


# The tensors that the backward takes in addition to the call: both results of the forward, and the gradient of the first one.
_Saved = tuple[Tensor, Tensor, Tensor]


def _reference(call: AttentionCall, saved: _Saved | None = None) -> tuple[Tensor, ...]:
    draw = None if call.rows is None or call.seed is None else Draw(key_of(call.seed), call.rows)
    how: dict[str, Any] = {"draw": draw, "dropout": call.dropout, "step": call.step, "layer": call.layer}
    query, offsets, longest = call.query, call.offsets, call.longest
    if offsets.device.type == "cpu":
        # The actual longest length keeps the scores [B, H, longest, longest] small.
        longest = max(1, int(offsets.diff().max()) if len(offsets) > 1 else 1)
    if saved is not None:
        return packed_attention_backward(query, call.key, call.value, offsets, longest, saved[2], **how)
    out = reference.packed_attention(query, call.key, call.value, offsets, longest, **how)
    return out, packed_logsumexp(query, call.key, offsets, longest).to(_statistics(query.dtype))


def _triton_attention(call: AttentionCall, saved: _Saved | None = None) -> tuple[Tensor, ...]:
    kernels = _triton.kernels("attention")
    if not call.threshold:
        call = replace(call, rows=None, seed=None)
    results: tuple[Tensor, ...] = kernels.forward(call) if saved is None else kernels.backward(call, *saved)
    return results


def _obstacle(call: AttentionCall, saved: _Saved | None = None) -> str | None:
    dtype, width = call.query.dtype, call.query.shape[2]
    if dtype not in _triton.DTYPES:
        return f"it takes float32, float16 and bfloat16, and query is {dtype}"
    if width not in HEAD_WIDTHS:
        return f"it takes heads of 16 to 128 columns, a multiple of 8, and they have {width}"
    if call.longest > LONGEST:
        return f"it takes sequences of up to {LONGEST} rows, and longest is {call.longest}"
    drop, train = call.threshold > 0, saved is not None
    return _triton.refusal("attention", call.query, width=width, drop=drop, short=call.longest <= 16, train=train)


register(
    "attention",
    Backend("triton", _triton_attention, _obstacle, note=lambda call, *_: _triton.note("attention", call.query)),
    Backend("reference", _reference),
    build=build_call,
)

_OP = register_op(f"attention({AttentionCall.schema()}) -> (Tensor, Tensor)", _run, _fake, _backward, _setup_context)
_BACKWARD = register_op(
    f"attention_backward({AttentionCall.schema(after='Tensor out, Tensor lse, Tensor grad')}) -> (Tensor, Tensor, Tensor)",
    _run_backward,
    _fake_backward,
    no_gradient("attention_backward", "attention can be differentiated once"),
)
