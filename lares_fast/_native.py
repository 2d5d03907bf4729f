"""The native module ``lares_fast._C``: loaded on first use, and reached only through the checked functions below."""

from __future__ import annotations

import functools
import importlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from lares_fast import _settings
from lares_fast._errors import InputError, NotBuiltError
from lares_fast._random import Key

# Equal to ABI in csrc/bindings.cpp: pointers cross this line, so a module of other sources must not be called.
ABI = 10

_REMEDY = "run pip install . in the sources' folder"


@functools.cache
def _attempt() -> tuple[ModuleType | None, str]:
    """The module, or None and why not, as a clause without a full stop."""
    try:
        module = importlib.import_module("lares_fast._C")
    except Exception as error:  # whatever a foreign or damaged file raises must not stop the pure-Python package
        return None, _why_missing(error)
    if getattr(module, "ABI", None) != ABI:
        return None, f"the native module {module.__file__} was built from other sources: {_REMEDY} again"
    simd = _settings.simd()
    try:
        module.use_level(simd)
    except ValueError as error:
        raise InputError(f"LARES_FAST_SIMD: {error}.") from None
    return module, ""


def _why_missing(error: Exception) -> str:
    folder = Path(__file__).parent
    files = sorted(folder.glob("_C.*"))
    if not isinstance(error, ModuleNotFoundError) and files:
        return f"the native module {files[0]} does not load ({error}): {_REMEDY} again"
    if files:
        return f"the native module {files[0]} is for another Python or platform: {_REMEDY} with this Python"
    try:
        note = json.loads((folder / "_build.json").read_text())
        reason = str(note["reason"])
    except (OSError, ValueError, KeyError, TypeError):
        return f"the native module is not built, because these are bare sources: {_REMEDY}"
    if not reason:
        return f"the native module was built, but its file is no longer in {folder}: {_REMEDY} again"
    remedy = f": {_REMEDY} without LARES_FAST_BUILD" if "LARES_FAST_BUILD" in reason else ""
    return f"the native module is not built ({reason}){remedy}"


def load() -> ModuleType:
    """The native module; :class:`NotBuiltError` says why it is not there and what to do."""
    module, reason = _attempt()
    if module is None:
        raise NotBuiltError(reason[0].upper() + reason[1:] + ".")
    return module


def available() -> tuple[bool, str]:
    """Whether the native module can be called, and if not, why."""
    module, reason = _attempt()
    return module is not None, reason


def build_info() -> dict[str, Any]:
    """What this installation's native module is and why; never raises and never asks the driver.

    ``native`` (bool) and ``reason`` (why not, else empty) are always there, and so are ``cuda_built`` and ``cuda_reason``;
    a native module adds its file, SIMD level, whether that multiplies in bf16, version, compiler, flags, build type, CPU and
    CUDA architectures and nvcc version.
    """
    module, reason = _attempt()
    if module is None:
        return {"native": False, "reason": reason, "cuda_built": False, "cuda_reason": "there is no native module"}
    level = {"simd": module.level(), "bf16": module.has_bf16()}
    return {"native": True, "reason": "", "file": str(module.__file__), **level, **module.build_info()}


def capability(device: int = -1) -> str:
    """Whether the module's CUDA code can run on ``device``, or on the current one: ``ok: ...``, or why not. Asks the driver."""
    module, reason = _attempt()
    return str(module.capability(device)) if module is not None else reason


def topk(
    query: Tensor,
    items: Tensor,
    k: int,
    *,
    bias: Tensor | None = None,
    exclude: tuple[Tensor, Tensor] | None = None,
    index: Sequence[Tensor] = (),
    threads: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Scores [B, k] and ids [B, k] of the best ``query @ items.T + bias``; fp32 on the CPU, same bits for every ``threads``.

    The contract is that of :func:`lares_fast.ops.topk`, and ``k`` may exceed N. ``exclude`` is (offsets [B + 1], ids).
    ``index`` are the tables that :func:`build_index` made of the same values. ``threads`` defaults to
    ``torch.get_num_threads()``. Workspace: csrc/topk/topk.h.
    """
    query = _dense("query", query, torch.float32, (None, None))
    batch, width = query.shape
    items = _dense("items", items, torch.float32, (None, width))
    bias = None if bias is None else _dense("bias", bias, torch.float32, (len(items),))
    offsets, ids = _exclude(exclude, batch)
    threads = _threads(threads)
    if k < 1:
        raise InputError(f"k must be at least 1, but got {k}.")
    module = load()
    with _memory(f"the result [{batch}, {k}]"):
        scores = torch.empty(batch, k, dtype=torch.float32)
        best = torch.empty(batch, k, dtype=torch.int64)
    _call(
        module.topk,
        *(0 if tensor is None else tensor.data_ptr() for tensor in (query, items, bias, offsets, ids)),
        scores.data_ptr(),
        best.data_ptr(),
        [table.data_ptr() for table in index],
        batch,
        len(items),
        width,
        k,
        threads,
    )
    return scores, best


def build_index(items: Tensor, *, threads: int | None = None) -> list[Tensor]:
    """What :func:`topk` can be given as ``index``: centre [D], scale [D], panels, and int8 codes, starts and bounds (empty
    where nothing is screened). fp32 on the CPU. Layout: csrc/topk/index.h."""
    items = _dense("items", items, torch.float32, (None, None))
    count, width = items.shape
    panel, panels, coded_panel, coded_panels, code_bytes, lane_bytes = load().index_shape(count, width)
    centre, scale = _centre_and_scale(items) if coded_panels else (torch.zeros(width), torch.ones(width))
    tables = [
        centre,
        scale,
        torch.empty(panels, width, panel),
        torch.empty(coded_panels, code_bytes, coded_panel, dtype=torch.int8),
        torch.empty(coded_panels, coded_panel, dtype=torch.int16 if lane_bytes == 2 else torch.int32),
        torch.empty(coded_panels, 4),
    ]
    addresses = [table.data_ptr() for table in tables]
    _call(load().build_index, items.data_ptr(), count, width, addresses, _threads(threads))
    return tables


def _centre_and_scale(items: Tensor) -> tuple[Tensor, Tensor]:
    """Mean [D], and a power of two [D] near the spread around it, so that no dimension wastes the codes of the others.

    Any finite centre and any power of two give the same answers; these make the bound tight.
    """
    centre = items.mean(dim=0)
    centre = torch.where(centre.isfinite(), centre, 0.0)
    spread = (items[:: max(1, len(items) // 16384)] - centre).std(dim=0)
    exponent = spread.log2().nan_to_num(nan=0.0, posinf=0.0, neginf=0.0).round().clamp(-12, 12)
    return centre, exponent.exp2()


def target_rank(
    query: Tensor,
    items: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None = None,
    exclude: tuple[Tensor, Tensor] | None = None,
    ties: str = "order",
    threads: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Ranks [B] int64 of each target by ``query @ items.T + bias``, among all items and among those not excluded.

    fp32 on the CPU, the same for every ``threads``. The contract is that of :func:`lares_fast.ops.target_ranks`.
    Workspace: a panel of items and B counters a thread.
    """
    query = _dense("query", query, torch.float32, (None, None))
    batch, width = query.shape
    items = _dense("items", items, torch.float32, (None, width))
    bias = None if bias is None else _dense("bias", bias, torch.float32, (len(items),))
    target = _dense("target", target, torch.int64, (batch,))
    offsets, ids = _exclude(exclude, batch)
    rank, rank_of_all = torch.empty_like(target), torch.empty_like(target)
    tensors = (query, items, bias, target, offsets, ids, rank, rank_of_all)
    sizes = (batch, len(items), width, ties == "order", _threads(threads))
    _call(load().target_rank, *(0 if tensor is None else tensor.data_ptr() for tensor in tensors), *sizes)
    return rank_of_all, rank


def target_logprob(
    hidden: Tensor,
    items: Tensor,
    target: Tensor,
    *,
    scale: float = 1.0,
    skip_pad: bool = False,
    ties: str | None = None,
    threads: int | None = None,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """(log-probabilities [M], ranks [M] int64 if ``ties`` is given, log-sum-exp [M] fp64) of each target; fp32 on the CPU, same
    bits for every ``threads``.

    The contract is that of :func:`lares_fast.ops.target_logprob`. Workspace: csrc/linear_cross_entropy/linear_cross_entropy.h.
    """
    hidden, items, target = _softmax(hidden, items, target)
    logprob, lse = hidden.new_empty(len(hidden)), hidden.new_empty(len(hidden), dtype=torch.float64)
    rank = None if ties is None else torch.empty_like(target)
    tensors = (hidden, items, target, logprob, lse, rank)
    sizes = (len(hidden), *items.shape, scale, skip_pad, ties == "order", _threads(threads))
    _call(load().target_logprob, *(0 if tensor is None else tensor.data_ptr() for tensor in tensors), *sizes)
    return logprob, rank, lse


def target_logprob_backward(
    grad: Tensor,
    hidden: Tensor,
    items: Tensor,
    target: Tensor,
    lse: Tensor,
    *,
    scale: float = 1.0,
    skip_pad: bool = False,
    needs: tuple[bool, bool] = (True, True),
    threads: int | None = None,
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients by ``hidden`` [M, D] and ``items`` [N, D], each if it ``needs`` one, of ``grad @ target_logprob(...)``."""
    hidden, items, target = _softmax(hidden, items, target)
    grad = _dense("grad", grad, torch.float32, (len(hidden),))
    lse = _dense("lse", lse, torch.float64, (len(hidden),))
    gradients = [torch.empty_like(tensor) if needed else None for tensor, needed in zip((hidden, items), needs, strict=True)]
    tensors = (hidden, items, target, grad, lse, *gradients)
    sizes = (len(hidden), *items.shape, scale, skip_pad, _threads(threads))
    _call(load().target_logprob_backward, *(0 if tensor is None else tensor.data_ptr() for tensor in tensors), *sizes)
    return gradients[0], gradients[1]


def _softmax(hidden: Tensor, items: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    hidden = _dense("hidden", hidden, torch.float32, (None, None))
    return (
        hidden,
        _dense("items", items, torch.float32, (None, hidden.shape[1])),
        _dense("target", target, torch.int64, (len(hidden),)),
    )


def keep_hidden(
    key: Key, threshold: int, *, site: int, step: int, layer: int, rows: Tensor, positions: Tensor, width: int
) -> Tensor:
    """Keep-mask [P, D] (bool) of tokens at ``rows`` [P] and ``positions`` [P]: the bits of ``_random.keep_hidden`` there."""
    rows = _dense("rows", rows, torch.int64, (None,))
    positions = _dense("positions", positions, torch.int64, rows.shape)
    keep = _mask(len(rows), width)
    address = (*key, threshold, site, step, layer, rows.data_ptr(), positions.data_ptr())
    _call(load().keep_hidden, *address, len(rows), width, keep.data_ptr())
    return keep


def state_uniforms(key: Key, rows: Tensor, positions: Tensor, width: int) -> Tensor:
    """:func:`lares_fast._random.state_uniforms` [P, D], bit for bit, of ``rows`` [P] and ``positions`` [P]."""
    rows = _dense("rows", rows, torch.int64, (None,))
    positions = _dense("positions", positions, torch.int64, rows.shape)
    if width < 0:
        raise InputError(f"width must not be negative, but is {width}.")
    uniforms = torch.empty(len(rows), width, dtype=torch.float64)
    address = (*key, rows.data_ptr(), positions.data_ptr())
    _call(load().state_uniforms, *address, len(rows), width, uniforms.data_ptr())
    return uniforms


def keep_attention(key: Key, threshold: int, *, step: int, layer: int, rows: Tensor, heads: int, length: int) -> Tensor:
    """:func:`lares_fast._random.keep_attention`, bit for bit."""
    rows = _dense("rows", rows, torch.int64, (None,))
    keep = _mask(len(rows), heads, length, length)
    address = (*key, threshold, step, layer, rows.data_ptr())
    _call(load().keep_attention, *address, len(rows), heads, length, keep.data_ptr())
    return keep


def _dense(name: str, tensor: Tensor, dtype: torch.dtype, shape: Sequence[int | None]) -> Tensor:
    """``tensor`` in contiguous memory, after a check of all that the C++ code takes on trust."""
    if not isinstance(tensor, Tensor):
        raise InputError(f"{name} must be a tensor, but got {type(tensor).__name__}.")
    fits = tensor.dim() == len(shape) and all(want in (None, got) for want, got in zip(shape, tensor.shape, strict=True))
    if not fits or tensor.dtype != dtype or tensor.device.type != "cpu" or tensor.layout != torch.strided:
        wanted = ", ".join("any" if size is None else str(size) for size in shape)
        raise InputError(
            f"{name} must be a dense {dtype} [{wanted}] on the CPU, "
            f"but got {tensor.layout} {tensor.dtype} {list(tensor.shape)} on {tensor.device}."
        )
    with _memory(f"{name} {list(tensor.shape)}"):
        return tensor.detach().resolve_neg().contiguous()


@contextmanager
def _memory(what: str) -> Iterator[None]:
    """Torch's complaint about memory as ours."""
    try:
        yield
    except RuntimeError as error:
        raise InputError(f"{what} does not fit into memory: pass fewer rows at a time ({error}).") from error


def _exclude(exclude: tuple[Tensor, Tensor] | None, batch: int) -> tuple[Tensor | None, Tensor | None]:
    if exclude is None:
        return None, None
    offsets = _dense("exclude offsets", exclude[0], torch.int64, (batch + 1,))
    ids = _dense("exclude ids", exclude[1], torch.int64, (None,))
    if int(offsets[-1]) != len(ids):
        raise InputError(f"exclude offsets must end with the number of ids, {len(ids)}, but end with {int(offsets[-1])}.")
    return offsets, ids


def _threads(threads: int | None) -> int:
    threads = torch.get_num_threads() if threads is None else threads
    if threads < 1:
        raise InputError(f"threads must be at least 1, but got {threads}.")
    return threads


def _mask(*shape: int) -> Tensor:
    if min(shape) < 0:
        raise InputError(f"The mask's sizes must not be negative, but are {list(shape)}.")
    return torch.empty(shape, dtype=torch.bool)


def _call(function: Callable[..., None], *arguments: object) -> None:
    """The C++ side's complaints as ours: a value out of range there, or an integer too large for its type."""
    try:
        function(*arguments)
    except (ValueError, TypeError) as error:
        sentence = str(error).partition("\n")[0]
        raise InputError(f"{function.__name__}: {sentence}.") from error
