"""The ``cuda`` backend of ``topk``: fp32 on one CUDA device."""

from __future__ import annotations

import torch
from torch import Tensor

from lares_fast.ops import _cuda_launch
from lares_fast.ops._catalog_calls import TopkCall

# This must equal TOPK_LIMIT in csrc.
MAX_K = 1024


def obstacle(call: TopkCall) -> str | None:
    """Return why the CUDA kernels cannot run ``call``, as a clause, or ``None``."""
    if call.k > MAX_K:
        return f"it takes k up to {MAX_K}, and k is {call.k}"
    return _cuda_launch.obstacle(call)


def run(call: TopkCall) -> tuple[Tensor, Tensor]:
    """Return scores [B, k] and ids [B, k]. The workspace has 8 B (1 + splits (k + 63)) bytes.

    A query with a wrong list gets scores of NaN and ids of -1. A list is wrong if its offsets fall or leave 0..E, or if it
    holds an id that is not an item.
    """
    query, (batch, width), count = call.query, call.query.shape, call.items.shape[0]
    scores, ids = query.new_empty(batch, call.k), query.new_empty((batch, call.k), dtype=torch.int64)
    if batch:
        limits = _cuda_launch.limits(_cuda_launch.device_index(query.device))
        plan = _cuda_launch.plan("plan_topk", B=batch, N=count, D=width, k=call.k, limits=limits)
        workspace = query.new_empty(plan["workspace_bytes"], dtype=torch.uint8)
        _cuda_launch.launch(call, k=call.k, scores=scores, ids=ids, workspace=workspace)
    return scores, ids
