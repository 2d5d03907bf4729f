"""Checks that several ops share. No check reads values on a GPU, because the CPU would have to wait for the GPU."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lares_fast import _native
from lares_fast._errors import InputError


class ExcludeLists(NamedTuple):
    """The items to leave out: ``ids[offsets[b]:offsets[b + 1]]`` for query b, int64. Ids may be in any order and repeat."""

    offsets: Tensor
    ids: Tensor


def check_dense(name: str, value: object) -> None:
    """Raise :class:`InputError` unless ``value`` is a dense tensor, which means that its layout has strides."""
    if not isinstance(value, Tensor) or value.layout != torch.strided:
        got = value.layout if isinstance(value, Tensor) else type(value).__name__
        raise InputError(f"{name} must be a dense tensor, but got {got}.")


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
