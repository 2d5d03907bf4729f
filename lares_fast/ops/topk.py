"""``topk``: the exact K best items of each query."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lares_fast import _native, reference
from lares_fast._dispatch import Backend, register, requested, run
from lares_fast._errors import InputError
from lares_fast._library import no_gradient, register_op
from lares_fast.ops._catalog_index import CatalogIndex
from lares_fast.reference.topk import Exclude


def topk(
    query: Tensor,
    items: Tensor,
    k: int,
    *,
    bias: Tensor | None = None,
    exclude: Exclude | None = None,
    index: CatalogIndex | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """``torch.topk(query @ items.T + bias, k)`` in one total order, without the [B, N] scores.

    Order: score descending, then id ascending, so ``topk(k1)`` is a prefix of ``topk(k2)``. A NaN score counts as
    -inf.

    Args:
        query: [B, D] float.
        items: [N, D], same dtype and device as ``query``.
        k: 1..N.
        bias: [N], added to every query's scores.
        exclude: ``(offsets [B + 1], ids [E])``, int64: query b never gets ``ids[offsets[b]:offsets[b + 1]]``.
            Any order, repeats allowed.
        index: of these very ``items``. The answer is the same without it; only the native backend reads it.
        backend: ``auto`` (default), ``native`` (fp32 on the CPU) or ``reference``.

    Returns:
        scores [B, k] in the query's dtype and ids [B, k] int64. Where exclusion leaves fewer than k items, the rest is
        score -inf, id -1.

    Raises:
        InputError: an argument has the wrong shape, dtype, device or range, or ``index`` is stale.
        BackendError: the backend asked for by name cannot take these arguments.
    """
    _check(query, items, k, bias, exclude)
    offsets, ids = exclude if exclude is not None else (None, None)
    tables = [] if index is None else index.tables(items)
    scores, best = _OP(query, items, k, bias, offsets, ids, tables, requested(backend))
    return scores, best


def _check(query: Tensor, items: Tensor, k: int, bias: Tensor | None, exclude: Exclude | None) -> None:
    if query.dim() != 2 or not query.dtype.is_floating_point:
        raise InputError(f"query must be a floating-point [B, D], but got {query.dtype} {list(query.shape)}.")
    if items.dim() != 2 or items.shape[1] != query.shape[1]:
        raise InputError(f"items must be [N, {query.shape[1]}] like query, but got {list(items.shape)}.")
    if not 1 <= k <= len(items):
        raise InputError(f"k must be in 1..{len(items)}, the number of items, but got {k}.")
    for name, value, shape in (("items", items, items.shape), ("bias", bias, items.shape[:1])):
        if value is not None and (value.dtype != query.dtype or value.device != query.device or value.shape != shape):
            raise InputError(
                f"{name} must be {query.dtype} {list(shape)} on {query.device} like query, "
                f"but got {value.dtype} {list(value.shape)} on {value.device}."
            )
    if exclude is None:
        return
    offsets, ids = exclude
    for name, value in (("exclude offsets", offsets), ("exclude ids", ids)):
        if value.dim() != 1 or value.dtype != torch.int64 or value.device != query.device:
            raise InputError(
                f"{name} must be 1-D int64 on {query.device}, but got {value.dtype} {list(value.shape)} on {value.device}."
            )
    if len(offsets) != len(query) + 1:
        raise InputError(f"exclude offsets must have B + 1 = {len(query) + 1} entries, but got {len(offsets)}.")


def _run(
    query: Tensor,
    items: Tensor,
    k: int,
    bias: Tensor | None,
    offsets: Tensor | None,
    ids: Tensor | None,
    index: list[Tensor],
    backend: str,
) -> tuple[Tensor, Tensor]:
    exclude = None
    if offsets is not None and ids is not None:
        if int(offsets[0]) != 0 or int(offsets[-1]) != len(ids) or bool((offsets.diff() < 0).any()):
            raise InputError(f"exclude offsets must rise from 0 to the number of ids, {len(ids)}.")
        if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < len(items):
            raise InputError(f"exclude ids must be in 0..{len(items) - 1}, but they span {int(ids.min())}..{int(ids.max())}.")
        exclude = (offsets, ids)
    scores, best = run("topk", backend, query.detach(), items.detach(), k, bias, exclude, index)
    return scores, best


def _fake(
    query: Tensor,
    items: Tensor,
    k: int,
    bias: Tensor | None,
    offsets: Tensor | None,
    ids: Tensor | None,
    index: list[Tensor],
    backend: str,
) -> tuple[Tensor, Tensor]:
    return query.new_empty(len(query), k), query.new_empty((len(query), k), dtype=torch.int64)


def _reference(
    query: Tensor, items: Tensor, k: int, bias: Tensor | None, exclude: Exclude | None, index: Sequence[Tensor] = ()
) -> tuple[Tensor, Tensor]:
    return reference.topk(query, items, k, bias=bias, exclude=exclude)


def _native_topk(
    query: Tensor, items: Tensor, k: int, bias: Tensor | None, exclude: Exclude | None, index: Sequence[Tensor] = ()
) -> tuple[Tensor, Tensor]:
    return _native.topk(query, items, k, bias=bias, exclude=exclude, index=index)


def _native_obstacle(query: Tensor, items: Tensor, *_: object) -> str | None:
    if query.device.type != "cpu":
        return f"it runs on the CPU, and query is on {query.device}"
    if query.dtype != torch.float32:
        return f"it takes float32, and query is {query.dtype}"
    if len(items) >= 2**31 - 1024:
        return f"it takes fewer than 2^31 - 1024 items, and there are {len(items)}"
    built, reason = _native.available()
    return None if built else reason


register(
    "topk",
    Backend("native", _native_topk, _native_obstacle),
    Backend("reference", _reference, lambda *_: None),
)

_OP = register_op(
    "topk(Tensor query, Tensor items, int k, Tensor? bias, Tensor? exclude_offsets, Tensor? exclude_ids,"
    " Tensor[] index, str backend)"
    " -> (Tensor, Tensor)",
    _run,
    _fake,
    no_gradient("topk", "train with reference.linear_cross_entropy or target_logprob"),
)
