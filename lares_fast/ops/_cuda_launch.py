"""The native module's CUDA kernels behind checked functions: outputs and workspace are torch's, and so is the stream.

The kernels were compiled and run in an emulator (docs/kernels/topk.md), never on a GPU.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from lares_fast import _native, _settings
from lares_fast._errors import BackendError, InputError

# TOPK_LIMIT of csrc/cuda/plan.h.
MAX_K = 1024

# Device -> what it said when it could run the kernels. Anything else may pass, so it is asked for again.
_able: dict[int, str] = {}
# (device, op, products) that ran: the first call loads the kernels, which a graph capture forbids.
_ran: set[tuple[int, str, bool]] = set()


def obstacle(query: Tensor, items: Tensor, *_: object) -> str | None:
    """Why the CUDA kernels cannot score ``items`` for ``query``, or None."""
    if query.device.type != "cuda":
        return f"it runs on CUDA devices, and query is on {query.device}"
    if query.dtype != torch.float32:
        return f"it takes float32, and query is {query.dtype}"
    if len(items) >= 2**32 - 1:
        return f"it takes fewer than 2^32 - 1 items, and there are {len(items)}"
    built, reason = _native.available()
    if not built:
        return reason
    said = _capability(query.device)
    return None if said.startswith("ok") else said


def topk_obstacle(query: Tensor, items: Tensor, k: int, *_: object) -> str | None:
    """:func:`obstacle`, and the largest k."""
    if k > MAX_K:
        return f"it takes k up to {MAX_K}, and k is {k}"
    return obstacle(query, items)


def topk(
    query: Tensor,
    items: Tensor,
    k: int,
    *,
    bias: Tensor | None = None,
    exclude: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Scores [B, k] and ids [B, k] of the best ``query @ items.T + bias``; fp32 on one CUDA device.

    The contract is that of :func:`lares_fast.ops.topk`. Enqueues on the device's current stream and waits for nothing; the
    caller keeps the inputs alive and unchanged until then. Workspace: 8 B (1 + splits (k + 63)) bytes.

    The host does not see the values of ``exclude``. A query whose list has offsets that fall or leave 0..E, or ids that are no
    items, gets scores of NaN and ids of -1; the other queries get their answers.

    Raises RuntimeError within a graph capture if the kernels did not run before.
    """
    batch, width, device = *query.shape, query.device
    if not 1 <= k <= MAX_K:
        raise InputError(f"k must be in 1..{MAX_K}, but got {k}.")
    tensors = _inputs(query, items, bias, exclude)
    if not batch or not len(items):
        return query.new_full((batch, k), -torch.inf), torch.full((batch, k), -1, dtype=torch.int64, device=device)
    scores = torch.empty(batch, k, device=device)
    best = torch.empty(batch, k, dtype=torch.int64, device=device)
    limits = _limits(_index(device))
    plan = _plan(_native.load().plan_topk, batch, len(items), width, k, limits)
    workspace = torch.empty(plan["workspace_bytes"], dtype=torch.uint8, device=device)
    _launch("topk_cuda", device, (*tensors, scores, best, workspace), batch, len(items), width, k, _length(tensors[-1]))
    return scores, best


def target_rank(
    query: Tensor,
    items: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None = None,
    exclude: tuple[Tensor, Tensor] | None = None,
    ties: str = "order",
) -> tuple[Tensor, Tensor]:
    """Ranks [B] int64 of each target among all items, and among those not excluded; fp32 on one CUDA device.

    The contract is that of :func:`lares_fast.ops.target_rank`; enqueued as :func:`topk` is. No workspace.

    A target that is no item has the rank N, which is behind all items; so has, among those not excluded, the target of a query
    whose list :func:`topk` would not answer.
    """
    batch, width, device = *query.shape, query.device
    (target,) = _on(device, (("target", target, torch.int64, (batch,)),))
    query, items, bias, offsets, ids = _inputs(query, items, bias, exclude)
    of_all, of_kept = torch.zeros(2, batch, dtype=torch.int64, device=device)
    if batch and len(items):
        tensors = (query, items, bias, target, offsets, ids, of_all, of_kept)
        _launch("target_rank_cuda", device, tensors, batch, len(items), width, _length(ids), ties == "order")
    return of_all, of_kept


def _inputs(
    query: Tensor, items: Tensor, bias: Tensor | None, exclude: tuple[Tensor, Tensor] | None
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """All in contiguous memory of one device, the exclusion lists sorted query by query."""
    device, count = query.device, len(items)
    query, items = _on(
        device, (("query", query, torch.float32, query.shape), ("items", items, torch.float32, (count, query.shape[1])))
    )
    if bias is not None:
        (bias,) = _on(device, (("bias", bias, torch.float32, (count,)),))
    if exclude is None:
        return query, items, bias, None, None
    offsets, ids = _on(
        device,
        (
            ("exclude offsets", exclude[0], torch.int64, (len(query) + 1,)),
            ("exclude ids", exclude[1], torch.int64, exclude[1].shape[:1]),
        ),
    )
    rising = offsets.cummax(0).values
    # The lists on both sides of an offset that falls are no lists, and each must be seen to be none.
    return query, items, bias, torch.where(offsets == rising, offsets, -1), sort_lists(rising, ids, count)


def sort_lists(offsets: Tensor, ids: Tensor, count: int) -> Tensor:
    """``ids`` ascending within each list, those that are not in 0..count - 1 as -1 or ``count``; waits for nothing."""
    lists = torch.bucketize(torch.arange(len(ids), device=ids.device), offsets, right=True)
    places = lists * (count + 2)
    return (places + ids.clamp(-1, count)).sort().values - places


def _length(ids: Tensor | None) -> int:
    return 0 if ids is None else len(ids)


def _on(device: torch.device, wanted: Sequence[tuple[str, Tensor, torch.dtype, Sequence[int]]]) -> list[Tensor]:
    for name, tensor, dtype, shape in wanted:
        if tensor.dtype != dtype or tensor.device != device or tuple(tensor.shape) != tuple(shape):
            raise InputError(
                f"{name} must be {dtype} {list(shape)} on {device}, "
                f"but got {tensor.dtype} {list(tensor.shape)} on {tensor.device}."
            )
    return [tensor.detach().resolve_neg().contiguous() for _, tensor, _, _ in wanted]


def _launch(name: str, device: torch.device, tensors: Sequence[Tensor | None], *sizes: int) -> None:
    addresses = (0 if tensor is None else tensor.data_ptr() for tensor in tensors)
    op, index = name.removesuffix("_cuda"), _index(device)
    plain = _settings.cuda_products() == "ffma"
    with _current(device):
        if (index, op, plain) not in _ran and _capturing(device):
            raise RuntimeError(f"{op} was not run on {device} before the graph capture: call it once outside of one first.")
        stream = torch.cuda.current_stream(device).cuda_stream
        # A RuntimeError means that the device is beyond use: nothing may catch it and go on elsewhere.
        refusal = getattr(_native.load(), name)(*addresses, *sizes, plain, _limits(index), index, stream)
    if refusal:
        raise BackendError(f"{device} refused {op} ({refusal}): use backend='reference'.")
    _ran.add((index, op, plain))


def _plan(plan: Any, *arguments: Any) -> dict[str, Any]:
    try:
        return dict(plan(*arguments))
    except ValueError as error:
        raise BackendError(f"The CUDA kernels cannot take this call, because {error}: use backend='reference'.") from error


def _index(device: torch.device) -> int:
    return torch.cuda.current_device() if device.index is None else device.index


def _current(device: torch.device) -> AbstractContextManager[Any]:
    """Makes ``device`` current, as the native module demands: PyTorch knows how to leave no context on another device."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _capability(device: torch.device) -> str:
    index = _index(device)
    if index not in _able:
        with _current(device):
            if _capturing(device):
                raise RuntimeError(
                    f"{device} was not asked for the CUDA kernels before the graph capture: call the op once before."
                )
            said = _native.capability(index)
        if not said.startswith("ok"):
            return said
        _able[index] = said
    return _able[index]


@functools.cache
def _limits(index: int) -> list[int]:
    return list(_native.load().device_limits(index))
