"""``embedding``: the input of the pre-block, from items to normalised rows with dropout."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from lares_fast._dispatch import Backend, register, run
from lares_fast._errors import InputError
from lares_fast._library import no_gradient, register_op
from lares_fast._numbers import number
from lares_fast._random import Draw, drop_threshold
from lares_fast.ops import _embedding_native, _embedding_triton
from lares_fast.ops._call import Call
from lares_fast.ops._catalog_checks import check_dense, check_ids
from lares_fast.reference.embedding import Tables, embed, embed_backward, tokens_of

Gradients = tuple[Tensor, Tensor, Tensor, Tensor]


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
            Then gradients are NaN, too. ``reference`` does this for PAD only; otherwise it ends in an error of PyTorch, after
            which the process must be restarted.
        BackendError: the requested backend cannot take these arguments.
    """
    options = {"draw": draw, "dropout": dropout, "eps": eps, "backend": backend}
    out: Tensor = _OP(*_call(items, offsets, Tables(item_table, position_table, weight, bias), options).arguments())
    return out


@dataclass(frozen=True)
class EmbeddingCall(Call):
    """The arguments of the operator, for the forward and the backward."""

    op: ClassVar[str] = "embedding"

    # [P] and [S + 1] int64.
    items: Tensor
    offsets: Tensor
    # [N, D], [L, D], [D] and [D].
    item_table: Tensor
    position_table: Tensor
    weight: Tensor
    bias: Tensor
    # The rows [S] int64 of the global batch, and the seed [1] int64 of the dropout mask. Nothing is dropped without them.
    rows: Tensor | None
    seed: Tensor | None
    dropout: float
    eps: float
    backend: str | None

    @property
    def threshold(self) -> int:
        """Return the dropout threshold, or 0 without a seed."""
        return 0 if self.rows is None or self.seed is None else drop_threshold(self.dropout)

    def draw(self) -> Draw | None:
        """Return the addresses of the dropout mask, or ``None``."""
        return None if self.rows is None or self.seed is None else Draw(self.seed, self.rows)

    def tables(self) -> Tables:
        """Return the parameters, without gradients."""
        return Tables(*(x.detach() for x in (self.item_table, self.position_table, self.weight, self.bias)))


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
    _check(call)
    if draw is None:
        return call
    if draw.rows.shape != (len(offsets) - 1,) or draw.rows.dtype != torch.int64 or draw.rows.device != items.device:
        raise InputError(
            f"draw.rows must be torch.int64 [{len(offsets) - 1}] on {items.device}, one for each sequence, "
            f"but got {draw.rows.dtype} {list(draw.rows.shape)} on {draw.rows.device}."
        )
    return replace(call, rows=draw.rows, seed=draw.seed(items.device)) if drop_threshold(call.dropout) else call


def _check(call: EmbeddingCall) -> None:
    table = call.item_table
    for name in ("items", "offsets", "item_table", "position_table", "weight", "bias"):
        check_dense(name, getattr(call, name))
    if table.dim() != 2 or not table.numel() or not table.dtype.is_floating_point:
        raise InputError(f"item_table must be a floating-point [N, D], not empty, but got {table.dtype} {list(table.shape)}.")
    for name, wanted in (("items", "[P]"), ("offsets", "[S + 1]")):
        index = getattr(call, name)
        if index.dim() != 1 or index.dtype != torch.int64 or index.device != table.device:
            raise InputError(
                f"{name} must be {wanted} int64 on {table.device} like item_table, "
                f"but got {index.dtype} {list(index.shape)} on {index.device}."
            )
    if len(call.offsets) < 1 + (len(call.items) > 0):
        raise InputError(
            f"offsets must rise from 0 to {len(call.items)}, the number of items, but has {len(call.offsets)} entries."
        )
    width = table.shape[1]
    positions = call.position_table
    if positions.dim() != 2 or not len(positions):
        raise InputError(f"position_table must be [L, {width}] with L at least 1, but got {list(positions.shape)}.")
    for name, shape in (("position_table", (len(positions), width)), ("weight", (width,)), ("bias", (width,))):
        x = getattr(call, name)
        if x.shape != shape or x.dtype != table.dtype or x.device != table.device:
            raise InputError(
                f"{name} must be {table.dtype} {list(shape)} on {table.device} like item_table, "
                f"but got {x.dtype} {list(x.shape)} on {x.device}."
            )
    if not 0 <= call.dropout < 1:
        raise InputError(f"dropout must be at least 0 and less than 1, but got {call.dropout}.")


def _run(*arguments: Any) -> Tensor:
    call = EmbeddingCall(*arguments)
    offsets, rows, longest = call.offsets, len(call.items), len(call.position_table)
    if offsets.device.type == "cpu":
        lengths = offsets.diff()
        if int(offsets[0]) or int(offsets[-1]) != rows or bool((lengths < 0).any()) or bool((lengths > longest).any()):
            raise InputError(
                f"offsets must rise from 0 to {rows}, the number of items, by at most {longest}, the rows of position_table."
            )
        check_ids("items", call.items, 1, len(call.item_table))
    out: Tensor = run("embedding", call.backend, call)
    return out


def _fake(items: Tensor, offsets: Tensor, item_table: Tensor, *_: Any) -> Tensor:
    return item_table.new_empty((items.shape[0], item_table.shape[1]))


# The fields of a call that hold tensors come first: items to seed.
_TENSORS = 8


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:_TENSORS])
    ctx.rest = inputs[_TENSORS:]


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    gradients = _BACKWARD(*ctx.saved_tensors, *ctx.rest, grad)
    return (None, None, *gradients, *[None] * (EmbeddingCall.count() - 2 - len(gradients)))


def _run_backward(*arguments: Any) -> Gradients:
    *inputs, grad = arguments
    call = EmbeddingCall(*inputs)
    gradients: Gradients = run("embedding", call.backend, call, grad)
    return gradients


def _fake_backward(*arguments: Any) -> Gradients:
    call = EmbeddingCall(*arguments[: EmbeddingCall.count()])
    item, position, weight, bias = (x.new_empty(x.shape) for x in call.tables())
    return item, position, weight, bias


def _reference(call: EmbeddingCall, grad: Tensor | None = None) -> Tensor | Gradients:
    tables = call.tables()
    tokens = tokens_of(call.items, call.offsets, call.draw(), call.dropout, tables.items.shape[1])
    if grad is not None:
        return embed_backward(grad, tokens, tables, call.dropout, call.eps)
    return embed(tokens, tables, call.dropout, call.eps)


register(
    "embedding",
    Backend("triton", _embedding_triton.compute, _embedding_triton.obstacle),
    Backend("native", _embedding_native.compute, _embedding_native.obstacle),
    Backend("reference", _reference),
    build=build_call,
)

_OP = register_op(f"embedding({EmbeddingCall.schema()}) -> Tensor", _run, _fake, _backward, _setup_context)
_BACKWARD = register_op(
    f"embedding_backward({EmbeddingCall.schema(after='Tensor grad')}) -> (Tensor, Tensor, Tensor, Tensor)",
    _run_backward,
    _fake_backward,
    no_gradient("embedding_backward", "embedding can be differentiated once"),
)
