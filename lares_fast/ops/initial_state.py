"""``initial_state``: h0 of packed sequences."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from lares_fast import reference
from lares_fast._dispatch import Backend, register, run
from lares_fast._errors import InputError
from lares_fast._library import register_op
from lares_fast._numbers import number, whole
from lares_fast._random import Draw
from lares_fast.ops import _initial_state_native, _initial_state_triton
from lares_fast.ops._call import Call
from lares_fast.ops._catalog_checks import check_dense


def initial_state(
    draw: Draw, offsets: Tensor, n_tokens: int, width: int, *, std: float = 1.0, backend: str | None = None
) -> Tensor:
    """Return ``std`` times standard normal numbers, truncated to [-3, 3], at the addresses of ``draw``.

    A number depends on its row of the batch, its position in the sequence and its column, and on nothing else. It has no
    gradient.

    Args:
        draw: the key, and the ``rows`` [S] of the global batch, on the device of ``offsets``. The key may be a tensor there.
        offsets: [S + 1] int64, rising from 0 to at most P; sequence b is the rows ``offsets[b]:offsets[b + 1]``.
        n_tokens: P, an integer, so that the CPU does not wait for a GPU.
        width: D.
        std: the factor of the numbers.
        backend: ``auto`` (default), ``triton`` (on a GPU, D up to 256), ``native`` (on the CPU) or ``reference``. The numbers
            of ``triton`` differ from those of the other backends by up to 1e-6 times ``std``.

    Returns:
        [P, D] fp32 on the device of ``offsets``. Rows from ``offsets[-1]`` on are 0.

    Raises:
        InputError: an argument has the wrong shape, dtype, device or range. The values of ``offsets`` are checked on the CPU
            only, because a check on a GPU would wait for it. On a GPU ``triton`` returns NaN instead, in the rows before
            ``offsets[-1]`` that belong to no sequence.
        BackendError: the requested backend cannot take these arguments.
    """
    out: Tensor = _OP(*build_call(draw, offsets, n_tokens, width, std=std, backend=backend).arguments())
    return out


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
    """Build and check the call that the arguments of :func:`initial_state` describe."""
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
    return InitialStateCall(
        offsets=offsets,
        rows=draw.rows,
        seed=draw.seed(offsets.device),
        n_tokens=n_tokens,
        width=width,
        std=number("std", std),
        backend=backend,
    )


def _run(*arguments: Any) -> Tensor:
    call = InitialStateCall(*arguments)
    offsets = call.offsets
    if offsets.device.type == "cpu" and (
        int(offsets[0]) or int(offsets[-1]) > call.n_tokens or bool((offsets.diff() < 0).any())
    ):
        raise InputError(f"offsets must rise from 0 to at most n_tokens = {call.n_tokens}.")
    out: Tensor = run("initial_state", call.backend, call)
    return out


def _fake(*arguments: Any) -> Tensor:
    call = InitialStateCall(*arguments)
    return call.offsets.new_empty((call.n_tokens, call.width), dtype=torch.float32)


def _reference(call: InitialStateCall) -> Tensor:
    return reference.initial_state(call.draw(), call.offsets, call.n_tokens, call.width, std=call.std)


register(
    "initial_state",
    Backend("triton", _initial_state_triton.forward, _initial_state_triton.obstacle),
    Backend("native", _initial_state_native.forward, _initial_state_native.obstacle),
    Backend("reference", _reference),
    build=build_call,
)

_OP = register_op(f"initial_state({InitialStateCall.schema()}) -> Tensor", _run, _fake)
