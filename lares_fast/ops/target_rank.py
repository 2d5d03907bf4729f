"""``target_rank``: the place of each query's target among all items."""

from __future__ import annotations

from torch import Tensor

from lares_fast import _cuda, _native
from lares_fast._dispatch import Backend, register, run
from lares_fast._errors import InputError
from lares_fast._library import no_gradient, register_op
from lares_fast.ops._catalog_checks import check_arguments, check_ids, check_index, checked_exclude, native_obstacle
from lares_fast.reference.target_rank import target_ranks as reference_ranks
from lares_fast.reference.topk import Exclude

TIES = ("order", "strict")


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
    """``(s > s.gather(1, target[:, None])).sum(1)`` for ``s = query @ items.T + bias``, without the [B, N] scores.

    The items that outrank the target, so 0 is the best rank and ``topk`` has the target at this place. An item j outranks
    target t if s_j > s_t, or if s_j == s_t and j < t: scores that are all equal earn no credit. A NaN score counts as
    -inf. The target's score is summed like every other, so it cannot outrank itself by rounding.

    Args:
        query: [B, D] float. Any strides, here and below; the native backend copies what is not contiguous.
        items: [N, D], same dtype and device as ``query``.
        target: [B] int64, ids in 0..N - 1.
        bias: [N], added to every query's scores.
        exclude: as in :func:`topk`; an excluded item outranks nothing, and a target is never excluded by its own list.
        ties: ``order``, or ``strict`` where only s_j > s_t counts (the official reward of phase 2).
        backend: ``auto`` (default), ``cuda`` (fp32), ``native`` (fp32 on the CPU) or ``reference``.

    Returns:
        int64 [B].

    Raises:
        InputError: an argument has the wrong shape, dtype, device or range. The values of ``target`` and ``exclude``
            are checked on the CPU only. On a GPU ``cuda`` gives the rank N, behind all items, where the target is no item
            or the query's list is wrong; ``reference`` ends in an error of PyTorch, after which the process must start
            again.
        BackendError: the backend asked for by name cannot take these arguments.
    """
    return _ranks(query, items, target, bias, exclude, ties, backend)[1]


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
    """``target_rank(query, items, target), target_rank(query, items, target, exclude=exclude)`` from one pass.

    Arguments and errors are those of :func:`target_rank`.
    """
    return _ranks(query, items, target, bias, exclude, ties, backend)


def _ranks(
    query: Tensor,
    items: Tensor,
    target: Tensor,
    bias: Tensor | None,
    exclude: Exclude | None,
    ties: str,
    backend: str | None,
) -> tuple[Tensor, Tensor]:
    check_arguments(query, items, bias, exclude)
    check_index("target", target, query)
    if len(target) != len(query):
        raise InputError(f"target must have B = {len(query)} entries like query, but got {len(target)}.")
    if ties not in TIES:
        raise InputError(f"ties must be one of {', '.join(TIES)}, but got {ties!r}.")
    offsets, ids = exclude if exclude is not None else (None, None)
    of_all, of_kept = _OP(query, items, target, bias, offsets, ids, ties, backend)
    return of_all, of_kept


def _run(
    query: Tensor,
    items: Tensor,
    target: Tensor,
    bias: Tensor | None,
    offsets: Tensor | None,
    ids: Tensor | None,
    ties: str,
    backend: str | None,
) -> tuple[Tensor, Tensor]:
    check_ids("target", target, len(items))
    exclude = None if offsets is None or ids is None else checked_exclude(offsets, ids, len(items))
    bias = None if bias is None else bias.detach()
    of_all, of_kept = run("target_rank", backend, query.detach(), items.detach(), target, bias, exclude, ties)
    return of_all, of_kept


def _fake(query: Tensor, items: Tensor, target: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    return target.new_empty(len(target)), target.new_empty(len(target))


def _reference(
    query: Tensor,
    items: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    exclude: Exclude | None = None,
    ties: str = "order",
) -> tuple[Tensor, Tensor]:
    of_all, of_kept = reference_ranks(query, items, target, (None, exclude), bias=bias, ties=ties)
    return of_all, of_kept


def _native_ranks(
    query: Tensor,
    items: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    exclude: Exclude | None = None,
    ties: str = "order",
) -> tuple[Tensor, Tensor]:
    return _native.target_rank(query, items, target, bias=bias, exclude=exclude, ties=ties)


def _cuda_ranks(
    query: Tensor,
    items: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    exclude: Exclude | None = None,
    ties: str = "order",
) -> tuple[Tensor, Tensor]:
    return _cuda.target_rank(query, items, target, bias=bias, exclude=exclude, ties=ties)


register(
    "target_rank",
    Backend("cuda", _cuda_ranks, _cuda.obstacle),
    Backend("native", _native_ranks, native_obstacle),
    Backend("reference", _reference, lambda *_: None),
)

_OP = register_op(
    "target_rank(Tensor query, Tensor items, Tensor target, Tensor? bias, Tensor? exclude_offsets, Tensor? exclude_ids,"
    " str ties, str? backend) -> (Tensor, Tensor)",
    _run,
    _fake,
    no_gradient("target_rank", "train with target_logprob"),
)
