"""``embedding``: the input of the pre-block, from items to normalised rows with dropout."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lares_fast import _native_random
from lares_fast._dispatch import Backend, register, run
from lares_fast._errors import InputError
from lares_fast._library import no_gradient, register_op
from lares_fast._numbers import number
from lares_fast._random import Draw, drop_threshold, keep_hidden_at
from lares_fast.ops import _embedding_torch, _embedding_triton
from lares_fast.ops._catalog_checks import check_draw, check_ids, check_rows
from lares_fast.ops._embedding_call import EmbeddingCall, Gradients, check
from lares_fast.reference.embedding import Saved, Tables


def embedding(
    items: Tensor,
    offsets: Tensor,
    item_table: Tensor,
    position_table: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    draw: Draw | None = None,
    dropout: float = 0.0,
    eps: float = 1e-12,
    backend: str | None = None,
) -> Tensor:
    """Return ``dropout(layer_norm(item_table[item] + position_table[position]))`` of packed sequences.

    Args:
        items: [P] int64, in 1..N - 1; P items of all sequences, one sequence after the other.
        offsets: [S + 1] int64 on the same device, rising from 0 to P; sequence b is ``items[offsets[b]:offsets[b + 1]]``.
        item_table: [N, D] float, on the same device.
        position_table: [L, D], with the dtype of ``item_table``; no sequence has more than L items.
        weight: [D], the weight of the layer norm.
        bias: [D], the bias of the layer norm.
        draw: the addresses of the dropout mask; ``None`` drops nothing. Its ``rows`` [S] are on the same device.
        dropout: the probability of a drop, in [0, 1).
        eps: the epsilon of the layer norm.
        backend: ``auto`` (default), ``triton`` (fp32, fp16 and bf16 on a GPU, D up to 256), ``native`` (on the CPU; the native
            module makes the mask) or ``reference``.

    Returns:
        [P, D] in the dtype of ``item_table``. The tables, the weight and the bias have gradients, once.

    Raises:
        InputError: an argument has the wrong shape, dtype, device or range. The values of ``items`` and ``offsets`` are checked
            on the CPU only, because a check on a GPU would wait for it. On a GPU ``triton`` returns a row of NaN instead: for
            an item that is PAD (0) or not in the table, for a row in no sequence, and for a position that is not in the table.
            Then gradients are NaN, too. If an offset is below the one before, several sequences may hold a row; it gets its
            position in one of them, or NaN. ``reference`` gives NaN for PAD only; otherwise it ends in an error of PyTorch,
            after which the process must be restarted.
        BackendError: the requested backend cannot take these arguments.
    """
    options = {"draw": draw, "dropout": dropout, "eps": eps, "backend": backend}
    out: Tensor = _OP(*_call(items, offsets, Tables(item_table, position_table, weight, bias), options).arguments())[0]
    return out


def build_call(
    items: Tensor,
    offsets: Tensor,
    item_table: Tensor,
    position_table: Tensor,
    weight: Tensor,
    bias: Tensor,
    **options: Any,
) -> EmbeddingCall:
    """Build and check the call that the arguments of :func:`embedding` describe."""
    tables = Tables(item_table, position_table, weight, bias)
    return _call(items, offsets, tables, {**(embedding.__kwdefaults__ or {}), **options})


def _call(items: Tensor, offsets: Tensor, tables: Tables, options: Mapping[str, Any]) -> EmbeddingCall:
    """Build and check the call that the public arguments describe."""
    draw: Draw | None = options["draw"]
    call = EmbeddingCall(
        items=items,
        offsets=offsets,
        item_table=tables.items,
        position_table=tables.positions,
        weight=tables.weight,
        bias=tables.bias,
        rows=None,
        seed=None,
        dropout=number("dropout", options["dropout"]),
        eps=number("eps", options["eps"]),
        backend=options["backend"],
    )
    check(call)
    if draw is None:
        return call
    check_draw(draw, len(offsets) - 1, items.device)
    return replace(call, rows=draw.rows, seed=draw.seed(items.device)) if drop_threshold(call.dropout) else call


def _run(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    call = EmbeddingCall(*arguments)
    offsets, rows, longest = call.offsets, len(call.items), len(call.position_table)
    if offsets.device.type == "cpu":
        lengths = offsets.diff()
        if int(offsets[0]) or int(offsets[-1]) != rows or bool((lengths < 0).any()) or bool((lengths > longest).any()):
            raise InputError(
                f"offsets must rise from 0 to {rows}, the number of items, by at most {longest}, the rows of position_table."
            )
        check_ids("items", call.items, 1, len(call.item_table))
    check_rows(call.rows)
    out, saved = run("embedding", call.backend, call)
    return out, *(call.nothing() if saved is None else saved)


def _fake(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    call = EmbeddingCall(*arguments)
    width, new_size = call.item_table.shape[1], torch.library.get_ctx().new_dynamic_size
    # The backend is chosen when the op runs, and "triton" saves nothing.
    rows = (call.items.shape[0], new_size(), new_size())
    out, sums, factors = (call.item_table.new_empty((size, width)) for size in rows)
    return out, sums, factors


# The fields of a call that hold tensors come first: items to seed.
_TENSORS = 8


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    ctx.save_for_backward(*output[1:], *inputs[:_TENSORS])
    ctx.rest = inputs[_TENSORS:]
    ctx.mark_non_differentiable(*output[1:])
    # Otherwise PyTorch would fill zeros for the gradients of the other outputs, which have none.
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * EmbeddingCall.count()
    sums, factors, *tensors = ctx.saved_tensors
    gradients = _BACKWARD(*tensors, *ctx.rest, sums, factors, grad)
    return (None, None, *gradients, *[None] * (EmbeddingCall.count() - 2 - len(gradients)))


def _run_backward(*arguments: Any) -> Gradients:
    *inputs, sums, factors, grad = arguments
    call = EmbeddingCall(*inputs)
    # The forward may have run on "triton", which saves nothing.
    saved = Saved(sums, factors) if len(sums) else None
    gradients: Gradients = run("embedding", call.backend, call, grad, saved)
    return gradients


def _fake_backward(*arguments: Any) -> Gradients:
    call = EmbeddingCall(*arguments[: EmbeddingCall.count()])
    item, position, weight, bias = (x.new_empty(x.shape) for x in call.tables())
    return item, position, weight, bias


register(
    "embedding",
    Backend("triton", _embedding_triton.compute, _embedding_triton.obstacle),
    Backend("native", partial(_embedding_torch.compute, _native_random.keep_hidden), _embedding_torch.native_obstacle),
    # A whole model may request ``layers``, which the recurrence has. Here it is the reference.
    *(Backend(name, partial(_embedding_torch.compute, keep_hidden_at)) for name in ("reference", "layers")),
    build=build_call,
)

_OP = register_op(f"embedding({EmbeddingCall.schema()}) -> (Tensor, Tensor, Tensor)", _run, _fake, _backward, _setup_context)
_AFTER = "Tensor sums, Tensor factors, Tensor grad"
_BACKWARD = register_op(
    f"embedding_backward({EmbeddingCall.schema(after=_AFTER)}) -> (Tensor, Tensor, Tensor, Tensor)",
    _run_backward,
    _fake_backward,
    no_gradient("embedding_backward", "embedding can be differentiated once"),
)
