"""The call of ``initial_state``: its arguments, and their checks."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lares_fast._errors import InputError
from lares_fast._numbers import number, whole
from lares_fast._random import Draw
from lares_fast.ops._call import Call
from lares_fast.ops._catalog_checks import check_dense


@dataclass(frozen=True)
class InitialStateCall(Call):
    """The arguments of the operator."""

    op: ClassVar[str] = "initial_state"

    # [S + 1] int64; the rows [S] int64 of the global batch, and the seed [1] int64.
    offsets: Tensor
    rows: Tensor
    seed: Tensor
    n_tokens: int
    width: int
    std: float
    backend: str | None

    def draw(self) -> Draw:
        """Return the addresses of the numbers."""
        return Draw(self.seed, self.rows)


def build_call(
    draw: Draw, offsets: Tensor, n_tokens: int, width: int, *, std: float = 1.0, backend: str | None = None
) -> InitialStateCall:
    """Build and check the call that the arguments of :func:`lares_fast.ops.initial_state` describe."""
    for name, value in (("offsets", offsets), ("draw.rows", draw.rows)):
        check_dense(name, value)
        if value.dim() != 1 or value.dtype != torch.int64 or value.device != offsets.device:
            raise InputError(
                f"{name} must be 1-D torch.int64 on {offsets.device}, "
                f"but got {value.dtype} {list(value.shape)} on {value.device}."
            )
    if not len(offsets):
        raise InputError("offsets must have S + 1 entries, but are empty.")
    if len(draw.rows) != len(offsets) - 1:
        raise InputError(f"draw.rows must be [{len(offsets) - 1}], one for each sequence, but got {list(draw.rows.shape)}.")
    n_tokens, width = whole("n_tokens", n_tokens), whole("width", width)
    if n_tokens < 0:
        raise InputError(f"n_tokens must be at least 0, but got {n_tokens}.")
    if width < 1:
        raise InputError(f"width must be at least 1, but got {width}.")
    std = number("std", std)
    if not -math.inf < std < math.inf:
        raise InputError(f"std must be a finite number, but got {std}.")
    return InitialStateCall(
        offsets=offsets,
        rows=draw.rows,
        seed=draw.seed(offsets.device),
        n_tokens=n_tokens,
        width=width,
        std=std,
        backend=backend,
    )
