"""``initial_state``: h0 of packed sequences."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lares_fast import reference
from lares_fast._dispatch import Backend, register, run
from lares_fast._errors import InputError
from lares_fast._library import register_op
from lares_fast._native_call import allocation
from lares_fast._random import Draw
from lares_fast.ops import _initial_state_native, _initial_state_triton
from lares_fast.ops._catalog_checks import check_rows
from lares_fast.ops._initial_state_call import InitialStateCall, build_call


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


def _run(*arguments: Any) -> Tensor:
    call = InitialStateCall(*arguments)
    offsets = call.offsets
    if offsets.device.type == "cpu" and (
        int(offsets[0]) or int(offsets[-1]) > call.n_tokens or bool((offsets.diff() < 0).any())
    ):
        raise InputError(f"offsets must rise from 0 to at most n_tokens = {call.n_tokens}.")
    check_rows(call.rows)
    out: Tensor = run("initial_state", call.backend, call)
    return out


def _native(call: InitialStateCall) -> Tensor:
    with allocation(f"n_tokens {call.n_tokens} times width {call.width}"):
        return _initial_state_native.forward(call)


def _fake(*arguments: Any) -> Tensor:
    call = InitialStateCall(*arguments)
    return call.offsets.new_empty((call.n_tokens, call.width), dtype=torch.float32)


def _reference(call: InitialStateCall) -> Tensor:
    with allocation(f"n_tokens {call.n_tokens} times width {call.width}"):
        return reference.initial_state(call.draw(), call.offsets, call.n_tokens, call.width, std=call.std)


register(
    "initial_state",
    Backend("triton", _initial_state_triton.forward, _initial_state_triton.obstacle),
    Backend("native", _native, _initial_state_native.obstacle),
    # A whole model may request ``layers``, which the recurrence has. Here it is the reference.
    Backend("reference", _reference),
    Backend("layers", _reference),
    build=build_call,
)

_OP = register_op(f"initial_state({InitialStateCall.schema()}) -> Tensor", _run, _fake)
