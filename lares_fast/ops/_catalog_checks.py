"""What the ops over a whole catalog check alike: arguments, the values of exclusion lists, and what the C++ code takes.

Values are checked on the CPU only: a check on a GPU would wait for all that it was given to do before.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lares_fast import _native
from lares_fast._errors import InputError
from lares_fast.reference.topk import Exclude


def check_arguments(query: Tensor, items: Tensor, bias: Tensor | None, exclude: Exclude | None) -> None:
    """Shapes, dtypes and devices, which compilers know too: query [B, D], items [N, D], bias [N], exclude in CSR."""
    tensors = {"query": query, "items": items, "bias": bias}
    for name, value in tensors.items():
        if value is not None:
            check_dense(name, value)
    if query.dim() != 2 or not query.dtype.is_floating_point:
        raise InputError(f"query must be a floating-point [B, D], but got {query.dtype} {list(query.shape)}.")
    if items.dim() != 2 or items.shape[1] != query.shape[1]:
        raise InputError(f"items must be [N, {query.shape[1]}] like query, but got {list(items.shape)}.")
    for name, value, shape in (("items", items, items.shape), ("bias", bias, items.shape[:1])):
        if value is not None and (value.dtype != query.dtype or value.device != query.device or value.shape != shape):
            raise InputError(
                f"{name} must be {query.dtype} {list(shape)} on {query.device} like query, "
                f"but got {value.dtype} {list(value.shape)} on {value.device}."
            )
    if exclude is not None:
        check_exclude(exclude, query)


def check_exclude(exclude: Exclude, query: Tensor) -> None:
    """Shapes, dtypes and devices of exclusion lists for ``query`` [B, D]."""
    if not (isinstance(exclude, tuple | list) and len(exclude) == 2):
        raise InputError(f"exclude must be a pair (offsets [B + 1], ids [E]), but got {type(exclude).__name__}.")
    offsets, ids = exclude
    check_index("exclude offsets", offsets, query)
    check_index("exclude ids", ids, query)
    if len(offsets) != len(query) + 1:
        raise InputError(f"exclude offsets must have B + 1 = {len(query) + 1} entries, but got {len(offsets)}.")


def check_dense(name: str, value: object) -> None:
    """:class:`InputError` unless ``value`` is a tensor with strides."""
    if not isinstance(value, Tensor) or value.layout != torch.strided:
        got = value.layout if isinstance(value, Tensor) else type(value).__name__
        raise InputError(f"{name} must be a dense tensor, but got {got}.")


def check_index(name: str, value: Tensor, query: Tensor) -> None:
    """:class:`InputError` unless ``value`` is a list of whole numbers where ``query`` is."""
    check_dense(name, value)
    if value.dim() != 1 or value.dtype != torch.int64 or value.device != query.device:
        raise InputError(
            f"{name} must be 1-D torch.int64 on {query.device} like query, "
            f"but got {value.dtype} {list(value.shape)} on {value.device}."
        )


def checked_exclude(offsets: Tensor, ids: Tensor, count: int) -> Exclude:
    """The exclusion lists, after a check of their values against ``count`` items."""
    on_cpu = offsets.device.type == "cpu"
    if on_cpu and (int(offsets[0]) != 0 or int(offsets[-1]) != len(ids) or bool((offsets.diff() < 0).any())):
        raise InputError(f"exclude offsets must rise from 0 to the number of ids, {len(ids)}.")
    check_ids("exclude ids", ids, count)
    return offsets, ids


def check_ids(name: str, ids: Tensor, count: int) -> None:
    """:class:`InputError` unless all ``ids``, if they are on the CPU, are rows of a table of ``count``."""
    if ids.device.type == "cpu" and len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < count:
        raise InputError(f"{name} must be in 0..{count - 1}, but they span {int(ids.min())}..{int(ids.max())}.")


def native_obstacle(query: Tensor, items: Tensor, *_: object, name: str = "query") -> str | None:
    """Why the C++ code cannot take a call."""
    if query.device.type != "cpu":
        return f"it runs on the CPU, and {name} is on {query.device}"
    if query.dtype != torch.float32:
        return f"it takes float32, and {name} is {query.dtype}"
    if len(items) >= 2**31 - 1024:
        return f"it takes fewer than 2^31 - 1024 items, and there are {len(items)}"
    built, reason = _native.available()
    return None if built else reason
