"""The ``cuda`` backend of ``target_rank``: fp32 on one CUDA device, without a workspace."""

from __future__ import annotations

from torch import Tensor

from lares_fast.ops import _cuda_launch
from lares_fast.ops._catalog_calls import TargetRankCall

obstacle = _cuda_launch.obstacle


def run(call: TargetRankCall) -> tuple[Tensor, Tensor]:
    """Return the ranks [B] among all items, and the ranks [B] among the items that are not excluded.

    A target that is not an item gets the rank N, behind all items. A query with a wrong list gets the rank N among the items
    that are not excluded. A list is wrong if its offsets fall or leave 0..E, or if it holds an id that is not an item.
    """
    target = _cuda_launch.contiguous(call.target)
    of_all, of_kept = target.new_zeros(2, len(target))
    if len(target) and call.items.shape[0]:
        _cuda_launch.launch(call, target=target, of_all=of_all, of_kept=of_kept, ties_by_id=call.ties == "order")
    return of_all, of_kept
