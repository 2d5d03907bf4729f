"""The call of ``embedding``: its arguments, and their checks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lares_fast._errors import InputError
from lares_fast._numbers import check_dense
from lares_fast._random import Draw, drop_threshold
from lares_fast.ops._call import Call
from lares_fast.ops._catalog_checks import check_floats
from lares_fast.reference.embedding import Saved, Tables

Gradients = tuple[Tensor, Tensor, Tensor, Tensor]


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

    def nothing(self) -> Saved:
        """Return what the forward saves on a backend whose backward computes everything again."""
        return Saved(*(self.item_table.new_empty((0, self.item_table.shape[1])) for _ in range(2)))

    def tables(self) -> Tables:
        """Return the parameters, without gradients."""
        return Tables(*(x.detach() for x in (self.item_table, self.position_table, self.weight, self.bias)))


def check(call: EmbeddingCall) -> None:
    """Raise :class:`InputError` for a wrong shape, dtype, device or range. Values of tensors are not read."""
    table = call.item_table
    for name in ("items", "offsets", "item_table", "position_table", "weight", "bias"):
        check_dense(name, getattr(call, name))
    check_floats("item_table", table, 2, "[N, D]")
    if not table.numel():
        raise InputError(f"item_table must not be empty, but is {list(table.shape)}.")
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
    if call.eps < 0:
        raise InputError(f"eps must be at least 0, but got {call.eps}.")
    if not 0 <= call.dropout < 1:
        raise InputError(f"dropout must be at least 0 and less than 1, but got {call.dropout}.")
