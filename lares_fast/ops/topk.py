"""``topk``: the exact K best items of each query."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lares_fast import _cuda, _native, reference
from lares_fast._dispatch import Backend, register, run
from lares_fast._errors import InputError
from lares_fast._library import no_gradient, register_op
from lares_fast._numbers import whole
from lares_fast.ops._catalog_checks import check_arguments, checked_exclude, native_obstacle
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
        query: [B, D] float. Any strides, here and below; the native backend copies what is not contiguous.
        items: [N, D], same dtype and device as ``query``.
        k: 1..N.
        bias: [N], added to every query's scores.
        exclude: ``(offsets [B + 1], ids [E])``, int64: query b never gets ``ids[offsets[b]:offsets[b + 1]]``.
            Any order, repeats allowed.
        index: of these very ``items``. The answer is the same without it; only the native backend reads it.
        backend: ``auto`` (default), ``cuda`` (fp32, k up to 1024), ``native`` (fp32 on the CPU) or ``reference``.

    Returns:
        scores [B, k] in the query's dtype and ids [B, k] int64. Where exclusion leaves fewer than k items, the rest is
        score -inf, id -1.

    Raises:
        InputError: an argument has the wrong shape, dtype, device or range, or ``index`` is stale. The values of
            ``exclude`` are checked on the CPU only. On a GPU ``cuda`` gives a query whose list is wrong scores of NaN and
            ids of -1; ``reference`` ends in an error of PyTorch, after which the process must start again.
        BackendError: the backend asked for by name cannot take these arguments.
    """
    check_arguments(query, items, bias, exclude)
    k = whole("k", k)
    if not 1 <= k <= len(items):
        raise InputError(f"k must be in 1..{len(items)}, the number of items, but got {k}.")
    offsets, ids = exclude if exclude is not None else (None, None)
    tables = [] if index is None else index.tables(items)
    scores, best = _OP(query, items, k, bias, offsets, ids, tables, backend)
    return scores, best


def _run(
    query: Tensor,
    items: Tensor,
    k: int,
    bias: Tensor | None,
    offsets: Tensor | None,
    ids: Tensor | None,
    index: list[Tensor],
    backend: str | None,
) -> tuple[Tensor, Tensor]:
    exclude = None if offsets is None or ids is None else checked_exclude(offsets, ids, len(items))
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
    backend: str | None,
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


def _cuda_topk(
    query: Tensor, items: Tensor, k: int, bias: Tensor | None, exclude: Exclude | None, index: Sequence[Tensor] = ()
) -> tuple[Tensor, Tensor]:
    return _cuda.topk(query, items, k, bias=bias, exclude=exclude)


register(
    "topk",
    Backend("cuda", _cuda_topk, _cuda.topk_obstacle),
    Backend("native", _native_topk, native_obstacle),
    Backend("reference", _reference, lambda *_: None),
)

_OP = register_op(
    "topk(Tensor query, Tensor items, int k, Tensor? bias, Tensor? exclude_offsets, Tensor? exclude_ids,"
    " Tensor[] index, str? backend)"
    " -> (Tensor, Tensor)",
    _run,
    _fake,
    no_gradient("topk", "train with reference.linear_cross_entropy or target_logprob"),
)
