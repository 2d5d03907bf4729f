"""The ``native`` backend of ``topk``: fp32 on the CPU."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lares_fast._native_call import allocation
from lares_fast.ops import _catalog_native
from lares_fast.ops._catalog_calls import IndexTables, TopkCall

_INDEX = [f"index_{table}" for table in IndexTables._fields]

obstacle = _catalog_native.obstacle


def run(call: TopkCall, threads: int | None = None) -> tuple[Tensor, Tensor]:
    """Return scores [B, k] and ids [B, k]. The number of threads changes no bit. csrc/topk/topk.h states the workspace."""
    shape = (call.query.shape[0], call.k)
    with allocation(f"the result {list(shape)}"):
        scores, ids = call.query.new_empty(shape), call.query.new_empty(shape, dtype=torch.int64)
    index: dict[str, Any] = {} if call.index is None else dict(zip(_INDEX, call.index, strict=True))
    _catalog_native.run(call, threads, k=call.k, scores=scores, ids=ids, **index)
    return scores, ids
