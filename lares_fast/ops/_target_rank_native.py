"""The ``native`` backend of ``target_rank``: fp32 on the CPU."""

from __future__ import annotations

from torch import Tensor

from lares_fast._native_call import contiguous
from lares_fast.ops import _catalog_native
from lares_fast.ops._catalog_calls import TargetRankCall

obstacle = _catalog_native.obstacle


def run(call: TargetRankCall, threads: int | None = None) -> tuple[Tensor, Tensor]:
    """Return the ranks [B] among all items, and the ranks [B] among the items that are not excluded.

    The number of threads changes no bit. The workspace is a panel of items and B counters for each thread.
    """
    target = contiguous("target", call.target)
    of_all, of_kept = target.new_empty(target.shape), target.new_empty(target.shape)
    ties_by_id = call.ties == "order"
    _catalog_native.run(call, threads, target=target, rank=of_kept, rank_of_all=of_all, ties_by_id=ties_by_id)
    return of_all, of_kept
