"""Launch the CUDA kernels of the native module for ``topk`` and ``target_rank``.

PyTorch allocates results and workspace and owns the stream. A launch is enqueued on the device's current stream, and the CPU
does not wait for it. The kernels were compiled and run in an emulator (docs/kernels/topk.md), never on a GPU.
"""

from __future__ import annotations

import functools
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from lares_fast import _native, _settings
from lares_fast._errors import BackendError
from lares_fast._native_call import addresses
from lares_fast._transfer import capturing
from lares_fast.ops._catalog_calls import CatalogCall

# Number of a device that can run the kernels -> its answer. Any other answer may change, so it is not kept.
_able: dict[int, str] = {}
# Every (device, op, whether products are ``ffma``) that ran. The first call loads the kernels, which a graph capture forbids.
_ran: set[tuple[int, str, bool]] = set()


def obstacle(call: CatalogCall) -> str | None:
    """Return why the CUDA kernels cannot run ``call``, as a clause, or ``None``."""
    query, count = call.query, call.items.shape[0]
    if query.device.type != "cuda":
        return f"it runs on CUDA devices, and query is on {query.device}"
    if query.dtype != torch.float32:
        return f"it takes float32, and query is {query.dtype}"
    if count >= 2**32 - 1:
        return f"it takes fewer than 2^32 - 1 items, and there are {count}"
    built, reason = _native.available()
    if not built:
        return reason
    answer = capability(query.device)
    return None if answer.startswith("ok") else answer


def launch(call: CatalogCall, **arguments: object) -> None:
    """Enqueue the kernel of ``call.op``, with ``arguments`` in addition to the arguments of every call.

    The CPU does not see the values of index tensors. A query with a wrong value gets a result that the backend describes, and
    the other queries get their correct results.

    Raises:
        BackendError: the device did not accept the launch.
        RuntimeError: the device is unusable, or the kernels did not run before a graph capture.
    """
    query, items, count = contiguous(call.query), contiguous(call.items), call.items.shape[0]
    bias = None if call.bias is None else contiguous(call.bias)
    offsets = ids = None
    if call.exclude is not None:
        offsets, ids = sorted_lists(*call.exclude, count)
    tensors = {"query": query, "items": items, "bias": bias, "exclude_offsets": offsets, "exclude_ids": ids}
    sizes = {"B": query.shape[0], "N": count, "D": query.shape[1], "E": 0 if ids is None else ids.shape[0]}
    enqueue(call.op, query.device, **tensors, **sizes, **arguments)


def enqueue(op: str, device: torch.device, **arguments: object) -> None:
    """Call the function ``<op>_cuda`` of the native module. Raises the errors of :func:`launch`."""
    index, plain = device_index(device), _settings.cuda_products() == "ffma"
    with _current(device):
        if (index, op, plain) not in _ran and capturing(device):
            raise RuntimeError(f"{op} was not run on {device} before the graph capture: call it once outside of one first.")
        stream = torch.cuda.current_stream(device).cuda_stream
        # A RuntimeError means that the device is unusable. Nothing may catch it and continue with another backend.
        function = getattr(_native.load(), f"{op}_cuda")
        fault = function(**addresses(arguments), plain=plain, limits=limits(index), device=index, stream=stream)
    if fault:
        raise BackendError(f"{device} did not accept the launch of {op} ({fault}): use backend='reference'.")
    _ran.add((index, op, plain))


def plan(function: str, **sizes: Any) -> dict[str, Any]:
    """Return the launch plan from ``function`` of the native module.

    Raises :class:`BackendError` if the kernels cannot take these sizes.
    """
    try:
        return dict(getattr(_native.load(), function)(**sizes))
    except ValueError as error:
        raise BackendError(f"The CUDA kernels cannot take this call, because {error}: use backend='reference'.") from error


def contiguous(tensor: Tensor) -> Tensor:
    """Return ``tensor`` in contiguous memory, without a gradient."""
    return tensor.detach().resolve_neg().contiguous()


def sorted_lists(offsets: Tensor, ids: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return lists of exclusions as the kernels read them: ids ascending within each list. The CPU does not wait.

    If an offset is below an earlier one, the lists on both of its sides are wrong. The offset becomes -1, so that the kernels
    notice both lists.
    """
    rising = offsets.cummax(0).values
    return torch.where(offsets == rising, offsets, -1), sort_ids(rising, ids, count)


def sort_ids(offsets: Tensor, ids: Tensor, count: int) -> Tensor:
    """Return ``ids`` ascending within each list. Ids outside of 0..count - 1 become -1 or ``count``. The CPU does not wait."""
    lists = torch.bucketize(torch.arange(len(ids), device=ids.device), offsets, right=True)
    first = lists * (count + 2)
    return (first + ids.clamp(-1, count)).sort().values - first


def capability(device: torch.device) -> str:
    """Return the native module's answer whether its kernels can run on ``device``: ``ok: ...``, or the reason why they cannot.

    Raises RuntimeError if the first question for a device comes within a graph capture.
    """
    index = device_index(device)
    if index not in _able:
        with _current(device):
            if capturing(device):
                raise RuntimeError(
                    f"{device} was not tested for the CUDA kernels before the graph capture: call the op once before."
                )
            answer = _native.capability(index)
        if not answer.startswith("ok"):
            return answer
        _able[index] = answer
    return _able[index]


@functools.cache
def limits(index: int) -> list[int]:
    """Return the number of multiprocessors, and the bytes of shared memory of a block and of a multiprocessor."""
    return list(_native.load().device_limits(device=index))


def device_index(device: torch.device) -> int:
    """Return the number of ``device``, or of the current device if it has none."""
    return torch.cuda.current_device() if device.index is None else device.index


def _current(device: torch.device) -> AbstractContextManager[Any]:
    """Make ``device`` current within the ``with`` block, as the native module requires.

    PyTorch switches back afterwards and creates no context on another device.
    """
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
