"""Checks of arguments that several ops share. No check reads values on a GPU, because the CPU would have to wait for it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lares_fast import _native
from lares_fast._errors import InputError
from lares_fast._numbers import check_dense, shown
from lares_fast._random import Draw

# The dtypes in which ops compute.
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


class ExcludeLists(NamedTuple):
    """The items to leave out: ``ids[offsets[b]:offsets[b + 1]]`` for query b, int64. Ids may be in any order and repeat."""

    offsets: Tensor
    ids: Tensor


def check_floats(name: str, value: Tensor, dims: int, shape: str) -> None:
    """Raise :class:`InputError` unless ``value``, a dense tensor, has ``dims`` dimensions and one of :data:`DTYPES`.

    ``shape`` describes the dimensions.
    """
    if value.dim() != dims or value.dtype not in DTYPES:
        raise InputError(
            f"{name} must be a floating-point {shape}, of 16, 32 or 64 bits, but got {value.dtype} {list(value.shape)}."
        )


def check_rows(rows: Tensor | None) -> None:
    """Raise :class:`InputError` unless the rows of a draw have 32 bits, as in an address. Rows on a GPU are not read."""
    if rows is not None:
        check_ids("draw.rows", rows, 0, 2**32)


def check_draw(draw: object, batch: int, device: torch.device, *, or_cpu: bool = False) -> Draw:
    """Return ``draw``. Raises :class:`InputError` unless it is a draw for ``batch`` sequences on ``device``.

    With ``or_cpu`` its rows may also be on the CPU. Its key is checked when it is used.
    """
    if not isinstance(draw, Draw):
        raise InputError(f"draw must be a Draw, but got {shown(draw)}.")
    check_dense("draw.rows", draw.rows)
    rows = draw.rows
    there = rows.device == device or (or_cpu and rows.device.type == "cpu")
    if rows.shape != (batch,) or rows.dtype != torch.int64 or not there:
        raise InputError(
            f"draw.rows must be torch.int64 [{batch}] on {device}, one for each sequence of offsets, "
            f"but got {rows.dtype} {list(rows.shape)} on {rows.device}."
        )
    return draw


def check_index(name: str, value: Tensor, query: Tensor) -> None:
    """Raise :class:`InputError` unless ``value`` is a 1-D int64 tensor on the device of ``query``."""
    check_dense(name, value)
    if value.dim() != 1 or value.dtype != torch.int64 or value.device != query.device:
        raise InputError(
            f"{name} must be 1-D torch.int64 on {query.device} like query, "
            f"but got {value.dtype} {list(value.shape)} on {value.device}."
        )


def check_ids(name: str, ids: Tensor, first: int, count: int) -> None:
    """Raise :class:`InputError` unless all ``ids`` are in ``first`` .. ``count - 1``. Ids on a GPU are not read."""
    if ids.device.type != "cpu" or not ids.numel():
        return
    least, most = int(ids.min()), int(ids.max())
    if not first <= least <= most < count:
        raise InputError(f"{name} must be in {first}..{count - 1}, but got values in {least}..{most}.")


def check_exclude(exclude: object, query: Tensor) -> ExcludeLists:
    """Return ``exclude`` as lists for ``query`` [B, D]. Raises :class:`InputError` if a shape, dtype or device is wrong."""
    if not (isinstance(exclude, tuple | list) and len(exclude) == 2):
        raise InputError(f"exclude must be a pair (offsets [B + 1], ids [E]), but got {type(exclude).__name__}.")
    offsets, ids = exclude
    check_index("exclude offsets", offsets, query)
    check_index("exclude ids", ids, query)
    if offsets.shape[0] != query.shape[0] + 1:
        raise InputError(f"exclude offsets must have B + 1 = {query.shape[0] + 1} entries, but got {offsets.shape[0]}.")
    return ExcludeLists(offsets, ids)


def checked_exclude(offsets: Tensor, ids: Tensor, count: int) -> ExcludeLists:
    """Return the lists. Raises :class:`InputError` if values are wrong for ``count`` items; lists on a GPU are not read."""
    on_cpu = offsets.device.type == "cpu"
    if on_cpu and (int(offsets[0]) != 0 or int(offsets[-1]) != ids.shape[0] or bool((offsets.diff() < 0).any())):
        raise InputError(f"exclude offsets must rise from 0 to the number of ids, {ids.shape[0]}.")
    check_ids("exclude ids", ids, 0, count)
    return ExcludeLists(offsets, ids)


def native_obstacle(query: Tensor, items: Tensor, *, name: str = "query") -> str | None:
    """Return why the native catalog kernels cannot take these tensors, as a clause, or ``None``."""
    if query.device.type != "cpu":
        return f"it runs on the CPU, and {name} is on {query.device}"
    if query.dtype != torch.float32:
        return f"it takes float32, and {name} is {query.dtype}"
    if items.shape[-2] >= 2**31 - 1024:
        return f"it takes fewer than 2^31 - 1024 items, and there are {items.shape[-2]}"
    built, reason = _native.available()
    return None if built else reason
