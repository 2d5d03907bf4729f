"""Calls of every native op whose results are compared bit by bit, for the part ``threads``."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lares_fast.ops import _linear_cross_entropy_native as softmax
from lares_fast.ops import _recurrence_native
from lares_fast.ops._catalog_calls import LogprobBackwardCall, LogprobCall
from lares_fast.ops._catalog_index import build_index
from tests.support.catalog_cases import native_ranks, native_topk, whole_numbers
from tests.support.recurrence_case import Case

Results = list[Any]


@functools.cache
def catalog() -> tuple[Any, ...]:
    """Return queries, items, biases and exclusions. There are more than 32,768 items, so that an index has codes."""
    return whole_numbers(3, 9, 40_000, 8, longest=20)


@functools.cache
def recurrence_call(width: int) -> Any:
    """Return a call of the recurrence."""
    torch.manual_seed(0)
    return Case([3, 20, 49, 50, 64, 100], D=width, H=2, inner=width, layers=1, depth=2).operator_call()


@functools.cache
def _index() -> Any:
    return build_index(catalog()[1], threads=1)


def prepare() -> None:
    """Make all arguments, without a native call."""
    catalog(), recurrence_call(32), recurrence_call(256)


def _topk(threads: int | None) -> Results:
    query, items, bias, exclude = catalog()
    return [*native_topk(query, items, 20, bias=bias, exclude=exclude, threads=threads)]


def _topk_with_index(threads: int | None) -> Results:
    query, items, _, exclude = catalog()
    return [*native_topk(query, items, 20, exclude=exclude, index=_index(), threads=threads)]


def _build_index(threads: int | None) -> Results:
    return [*build_index(catalog()[1], threads=threads)]


def _target_rank(threads: int | None) -> Results:
    query, items, bias, exclude = catalog()
    return [*native_ranks(query, items, torch.arange(9) * 4000, bias=bias, exclude=exclude, threads=threads)]


def _target_logprob(threads: int | None) -> Results:
    query, items, *_ = catalog()
    target = torch.arange(9) * 3000 + 1
    logprob, _, lse = softmax.forward(LogprobCall.build(query, items, target), threads)
    grad = torch.ones_like(logprob)
    call = LogprobBackwardCall.build(query, items, target, grad=grad, lse=lse, need_hidden=True, need_items=True)
    return [logprob, lse, *softmax.backward(call, threads)]


def _recurrence(width: int, threads: int | None) -> Results:
    call = recurrence_call(width)
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        out, tape = _recurrence_native.forward(call)
        assert tape is not None
        return [out, *_recurrence_native.backward(call, torch.ones_like(out), tape)]
    finally:
        torch.set_num_threads(before)


# Each takes the number of threads; ``None`` is the number of PyTorch.
CALLS: dict[str, Callable[[int | None], Results]] = {
    "topk": _topk, "topk with an index": _topk_with_index, "build_index": _build_index, "target_rank": _target_rank,
    "target_logprob": _target_logprob, "recurrence": functools.partial(_recurrence, 32),
    "a wide recurrence": functools.partial(_recurrence, 256),
}  # fmt: skip


def digest(results: Results) -> str:
    """Return a digest of the bits of ``results``."""
    sha = hashlib.sha256()
    for result in results:
        if isinstance(result, Tensor):
            sha.update(result.contiguous().numpy().tobytes())
    return sha.hexdigest()


def all_digests(_: object = None) -> dict[str, str]:
    """Return the digest of each call."""
    return {name: digest(call(None)) for name, call in CALLS.items()}
