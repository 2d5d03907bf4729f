"""Dropout masks and initial noise from the native module, with the same bits as :mod:`lares_fast._random`."""

from __future__ import annotations

import torch
from torch import Tensor

from lares_fast._errors import InputError
from lares_fast._native_call import call_native, contiguous
from lares_fast._random import Key, key_of


def keep_hidden(
    key: Key | Tensor, threshold: int, *, site: int, step: int, layer: int, rows: Tensor, positions: Tensor, width: int
) -> Tensor:
    """Return the keep-mask [P, D] (bool) of tokens at ``rows`` [P] and ``positions`` [P], both int64 on the CPU.

    The mask of a token has the bits of :func:`lares_fast._random.keep_hidden` at its row and position. Raises
    :class:`InputError` for tensors of another form.
    """
    rows, positions = _tokens(rows, positions)
    keep = _mask(len(rows), width)
    address = {"key": _integer_key(key), "threshold": threshold, "site": site, "step": step, "layer": layer, "rows": rows}
    call_native("keep_hidden", **address, positions=positions, P=len(rows), D=width, keep=keep)
    return keep


def state_uniforms(key: Key | Tensor, rows: Tensor, positions: Tensor, width: int) -> Tensor:
    """Return :func:`lares_fast._random.state_uniforms`, fp64 [P, D], for ``rows`` and ``positions`` [P] (int64 on the CPU)."""
    rows, positions = _tokens(rows, positions)
    if width < 0:
        raise InputError(f"width must not be negative, but got {width}.")
    uniforms = torch.empty(len(rows), width, dtype=torch.float64)
    call_native(
        "state_uniforms", key=_integer_key(key), rows=rows, positions=positions, P=len(rows), D=width, uniforms=uniforms
    )
    return uniforms


def keep_attention(
    key: Key | Tensor, threshold: int, *, step: int, layer: int, rows: Tensor, heads: int, length: int
) -> Tensor:
    """Return :func:`lares_fast._random.keep_attention`, bool [B, H, L, L], for ``rows`` [B] (int64 on the CPU)."""
    rows = _integers("rows", rows, None)
    keep = _mask(len(rows), heads, length, length)
    address = {"key": _integer_key(key), "threshold": threshold, "step": step, "layer": layer, "rows": rows}
    call_native("keep_attention", **address, B=len(rows), H=heads, L=length, keep=keep)
    return keep


def _integer_key(key: Key | Tensor) -> Key:
    return key_of(key) if isinstance(key, Tensor) else key


def _tokens(rows: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    rows = _integers("rows", rows, None)
    return rows, _integers("positions", positions, len(rows))


def _integers(name: str, tensor: Tensor, length: int | None) -> Tensor:
    """Return ``tensor`` in contiguous memory; :class:`InputError` unless it is int64 [``length``] on the CPU."""
    if not isinstance(tensor, Tensor):
        raise InputError(f"{name} must be a tensor, but got {type(tensor).__name__}.")
    fits = tensor.dim() == 1 and (length is None or len(tensor) == length)
    if not fits or tensor.dtype != torch.int64 or tensor.device.type != "cpu" or tensor.layout != torch.strided:
        raise InputError(
            f"{name} must be a dense torch.int64 [{'any' if length is None else length}] on the CPU, "
            f"but got {tensor.layout} {tensor.dtype} {list(tensor.shape)} on {tensor.device}."
        )
    return contiguous(name, tensor)


def _mask(*shape: int) -> Tensor:
    if min(shape) < 0:
        raise InputError(f"the sizes of a mask must not be negative, but got {list(shape)}.")
    return torch.empty(shape, dtype=torch.bool)
