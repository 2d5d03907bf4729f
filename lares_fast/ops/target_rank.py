"""``target_rank``: the rank of each query's target among all items."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lares_fast._dispatch import Backend, register, run
from lares_fast._library import no_gradient, register_op
from lares_fast.ops import _target_rank_cuda, _target_rank_native
from lares_fast.ops._catalog_calls import TargetRankCall
from lares_fast.reference.target_rank import target_ranks as reference_ranks
from lares_fast.reference.topk import Exclude


def target_rank(
    query: Tensor,
    items: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None = None,
    exclude: Exclude | None = None,
    ties: str = "order",
    backend: str | None = None,
) -> Tensor:
    """Return the number of items that outrank each query's target, without the [B, N] scores.

    It is ``(s > s.gather(1, target[:, None])).sum(1)`` for ``s = query @ items.T + bias``, and ``ties`` says how equal scores
    count. The best rank is 0. With ``order``, a target of rank r that is not excluded is in column r of :func:`topk`.

    Item j outranks target t if s_j > s_t, or if s_j == s_t and j < t. So a model whose scores are all equal does not get good
    ranks. A NaN score counts as -inf. The target's score is summed in the same way as every other score, so that the target
    cannot outrank itself by rounding.

    Args:
        query: [B, D] float. All tensors may have any strides; the native backend copies a tensor that is not contiguous.
        items: [N, D], with the dtype and device of ``query``.
        target: [B] int64, ids in 0..N - 1.
        bias: [N], added to the scores of every query.
        exclude: lists of items as in :func:`topk`. An excluded item outranks nothing. A list never excludes the target.
        ties: ``order`` (default), or ``strict``, where item j outranks t only if s_j > s_t (the official reward of phase 2).
        backend: ``auto`` (default), ``cuda`` (fp32), ``native`` (fp32 on the CPU) or ``reference``.

    Returns:
        int64 [B].

    Raises:
        InputError: an argument has a wrong shape, dtype, device or range. The values of ``target`` and ``exclude`` are
            checked on the CPU only. On a GPU the backend ``cuda`` gives the rank N, behind all items, to a target that is no
            item, and to a query with a wrong list. The backend ``reference`` on a GPU ends in an error of PyTorch, after
            which the process must be restarted.
        BackendError: the requested backend cannot run this call.
    """
    call = TargetRankCall.build(query, items, target, bias=bias, exclude=exclude, ties=ties, backend=backend)
    rank: Tensor = _OP(*call.arguments())[1]
    return rank


def target_ranks(
    query: Tensor,
    items: Tensor,
    target: Tensor,
    exclude: Exclude,
    *,
    bias: Tensor | None = None,
    ties: str = "order",
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Return ``target_rank(query, items, target)`` and ``target_rank(query, items, target, exclude=exclude)`` from one pass.

    Both are int64 [B]. The arguments and errors are as in :func:`target_rank`.
    """
    call = TargetRankCall.build(query, items, target, bias=bias, exclude=exclude, ties=ties, backend=backend)
    of_all, of_kept = _OP(*call.arguments())
    return of_all, of_kept


def _run(*arguments: Any) -> tuple[Tensor, Tensor]:
    call = TargetRankCall.of(*arguments)
    of_all, of_kept = run(call.op, call.backend, call)
    return of_all, of_kept


def _fake(*arguments: Any) -> tuple[Tensor, Tensor]:
    target = TargetRankCall.of(*arguments).target
    return target.new_empty(target.shape), target.new_empty(target.shape)


def _reference(call: TargetRankCall) -> tuple[Tensor, Tensor]:
    call.check_values()
    lists = (None, call.exclude)
    of_all, of_kept = reference_ranks(call.query, call.items, call.target, lists, bias=call.bias, ties=call.ties)
    return of_all, of_kept


register(
    "target_rank",
    Backend("cuda", _target_rank_cuda.run, _target_rank_cuda.obstacle),
    Backend("native", _target_rank_native.run, _target_rank_native.obstacle),
    Backend("reference", _reference),
    build=TargetRankCall.build,
)

_OP = register_op(
    f"target_rank({TargetRankCall.schema()}) -> (Tensor, Tensor)",
    _run,
    _fake,
    no_gradient("target_rank", "train with target_logprob"),
)
