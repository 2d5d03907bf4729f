"""The call of ``initial_state``: its arguments, and their checks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lares_fast._errors import InputError
from lares_fast._numbers import check_dense, number, whole
from lares_fast._random import Draw
from lares_fast.ops._call import Call
from lares_fast.ops._catalog_checks import check_draw

# A larger result fits into no memory, and its size in bytes must fit into 64 bits.
_MOST_NUMBERS = 2**48


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
    check_dense("offsets", offsets)
    if offsets.dim() != 1 or not len(offsets) or offsets.dtype != torch.int64:
        raise InputError(f"offsets must be torch.int64 [S + 1], but got {offsets.dtype} {list(offsets.shape)}.")
    check_draw(draw, len(offsets) - 1, offsets.device)
    n_tokens, width = whole("n_tokens", n_tokens), whole("width", width)
    if n_tokens < 0:
        raise InputError(f"n_tokens must be at least 0, but got {n_tokens}.")
    if not 1 <= width <= _MOST_NUMBERS:
        raise InputError(f"width must be between 1 and 2^48, but got {width}.")
    if n_tokens * width > _MOST_NUMBERS:
        raise InputError(f"n_tokens times width must be at most 2^48, but got {n_tokens} and {width}.")
    return InitialStateCall(
        offsets=offsets,
        rows=draw.rows,
        seed=draw.seed(offsets.device),
        n_tokens=n_tokens,
        width=width,
        std=number("std", std),
        backend=backend,
    )
