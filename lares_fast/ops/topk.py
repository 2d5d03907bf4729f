"""``topk``: the exact K best items of each query."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lares_fast import reference
from lares_fast._dispatch import Backend, register, run
from lares_fast._library import no_gradient, register_op
from lares_fast.ops import _topk_cuda, _topk_native
from lares_fast.ops._catalog_calls import TopkCall
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
    """Return the k best items of each query, as ``torch.topk(query @ items.T + bias, k)`` but without the [B, N] scores.

    The order is total: score descending, then id ascending. So ``topk(k1)`` is a prefix of ``topk(k2)`` for k1 < k2. A NaN
    score counts as -inf.

    Args:
        query: [B, D] float. All tensors may have any strides; the native backend copies a tensor that is not contiguous.
        items: [N, D], with the dtype and device of ``query``.
        k: 1..N.
        bias: [N], added to the scores of every query.
        exclude: ``(offsets [B + 1], ids [E])``, int64: query b never gets ``ids[offsets[b]:offsets[b + 1]]``. The ids may
            be in any order and repeat.
        index: a :class:`CatalogIndex` of the tensor ``items``. It changes the speed, not the answer. Only the native backend
            reads it.
        backend: ``auto`` (default), ``cuda`` (fp32, k up to 1024), ``native`` (fp32 on the CPU) or ``reference``.

    Returns:
        Scores [B, k] in the dtype of ``query`` and ids [B, k] int64. Where exclusion leaves fewer than k items, the remaining
        places have the score -inf and the id -1.

    Raises:
        InputError: an argument has a wrong shape, dtype, device or range, or ``index`` is stale. The values of ``exclude``
            are checked on the CPU only. On a GPU the backend ``cuda`` gives a query with a wrong list scores of NaN and ids
            of -1. The backend ``reference`` on a GPU ends in an error of PyTorch, after which the process must be restarted.
        BackendError: the requested backend cannot run this call.
    """
    call = TopkCall.build(query, items, k, bias=bias, exclude=exclude, index=index, backend=backend)
    scores, ids = _OP(*call.arguments())
    return scores, ids


def _run(*arguments: Any) -> tuple[Tensor, Tensor]:
    call = TopkCall.of(*arguments)
    scores, ids = run(call.op, call.backend, call)
    return scores, ids


def _fake(*arguments: Any) -> tuple[Tensor, Tensor]:
    call = TopkCall.of(*arguments)
    shape = (call.query.shape[0], call.k)
    return call.query.new_empty(shape), call.query.new_empty(shape, dtype=torch.int64)


def _reference(call: TopkCall) -> tuple[Tensor, Tensor]:
    call.check_values()
    return reference.topk(call.query, call.items, call.k, bias=call.bias, exclude=call.exclude)


register(
    "topk",
    Backend("cuda", _topk_cuda.run, _topk_cuda.obstacle),
    Backend("native", _topk_native.run, _topk_native.obstacle),
    Backend("reference", _reference),
    build=TopkCall.build,
)

_OP = register_op(
    f"topk({TopkCall.schema()}) -> (Tensor, Tensor)",
    _run,
    _fake,
    no_gradient("topk", "train with reference.linear_cross_entropy or target_logprob"),
)
