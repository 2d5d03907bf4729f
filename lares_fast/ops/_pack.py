"""Fill a packed batch from a log on the device of the model."""

from __future__ import annotations

import functools
import warnings

import torch
from torch import Tensor

from lares_fast._errors import InputError
from lares_fast._native_call import allocation
from lares_fast._numbers import check_dense, shown, whole
from lares_fast.ops import _triton


def pack(log: Tensor, starts: Tensor, offsets: Tensor, n_tokens: int, n_targets: int) -> tuple[Tensor, Tensor]:
    """Return the items [P] of S sequences, and the item that follows each of the first B sequences, [B]. Both are int64.

    ``log`` [E] int32 has all items. Sequence s has the items ``log[starts[s]:]``, and takes the places ``offsets[s]`` to
    ``offsets[s + 1] - 1`` of the batch. ``starts`` [S] and ``offsets`` [S + 1] are int64 on the device of ``log``. ``n_tokens``
    is P, and ``n_targets`` is B. The host does not wait for the device, so the values are not checked. A place outside of the
    log gives its first or its last item.

    Raises :class:`InputError` for a wrong type, shape, dtype or device.
    """
    _check(log, starts, offsets, n_tokens, n_targets)
    if _triton.obstacle(log) is None and (log.device.type != "cuda" or _kernel_is_right(log.device)):
        items, targets = _triton.kernels("_pack").packed(log, starts, offsets, n_tokens, n_targets)
        return items, targets
    with allocation(f"n_tokens {n_tokens}"):
        return pack_by_torch(log, starts, offsets, n_tokens, n_targets)


@functools.cache
def _kernel_is_right(device: torch.device) -> bool:
    """Return whether the kernel fills a small batch on the GPU ``device`` as PyTorch does, and warn if it does not.

    The host waits for the answer.
    """
    lengths = torch.arange(600) % 7 + 1
    starts, offsets = lengths * 5, torch.cat((torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)))
    call = (torch.arange(1, 60, dtype=torch.int32), starts, offsets)
    sizes = int(offsets[-1]), 599
    there = _triton.kernels("_pack").packed(*(x.to(device) for x in call), *sizes)
    right = all(torch.equal(x.cpu(), y) for x, y in zip(there, pack_by_torch(*call, *sizes), strict=True))
    if not right:
        text = f"the kernel that packs batches failed its check on {device}, so PyTorch packs them, which is slower."
        warnings.warn(text, stacklevel=3)
    return right


def _check(log: Tensor, starts: Tensor, offsets: Tensor, n_tokens: int, n_targets: int) -> None:
    for name, value, dtype in (("log", log, torch.int32), ("starts", starts, torch.int64), ("offsets", offsets, torch.int64)):
        check_dense(name, value)
        if value.dim() != 1 or value.dtype != dtype or value.device != log.device:
            raise InputError(f"{name} must be {dtype} [...] on the device of log, but is {shown(value)} on {value.device}.")
    if len(offsets) != len(starts) + 1:
        raise InputError(f"offsets must have an entry more than starts, but have {len(offsets)} for {len(starts)} starts.")
    for name, number, most in (("n_tokens", n_tokens, 2**48 * (len(starts) > 0)), ("n_targets", n_targets, len(starts))):
        if not 0 <= whole(name, number) <= most:
            raise InputError(f"{name} must be in 0..{most} for {len(starts)} starts, but got {number}.")
    if not len(log) and (n_tokens or n_targets):
        raise InputError("log must hold an item, but is empty.")


def pack_by_torch(log: Tensor, starts: Tensor, offsets: Tensor, n_tokens: int, n_targets: int) -> tuple[Tensor, Tensor]:
    """Return the result of :func:`pack`, by operations of PyTorch."""
    place = torch.arange(n_tokens, device=log.device)
    owner = (torch.searchsorted(offsets, place, right=True) - 1).clamp(0, len(starts) - 1)
    events = torch.cat((starts[owner] + (place - offsets[owner]), starts[:n_targets] + offsets.diff()[:n_targets]))
    found = log[events.clamp(0, len(log) - 1)].long()
    return found[:n_tokens], found[n_tokens:]
