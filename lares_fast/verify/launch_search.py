"""Search for the fastest launch settings of Triton kernels on this GPU, for the sizes of one model."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from lares_fast import ops, reference
from lares_fast._errors import BackendError
from lares_fast._random import Draw
from lares_fast.config import LARESConfig
from lares_fast.verify import cases, self_test, tuning
from lares_fast.verify.comparison import same_bits
from lares_fast.verify.tolerance import judge

# A gain below this factor does not justify results with other bits.
_GAIN = 1.03
_ITEMS = 20_000

Tell = Callable[[str], None]


def tune(op: str, dtype: torch.dtype, device: torch.device, model: LARESConfig, batch: int, tell: Tell) -> str:
    """Measure ``op`` for the sizes of ``model``, store settings that are faster than the shipped ones, and return a sentence.

    ``batch`` is the number of sequences or rows of the measured call. ``tell`` is called with one line for each candidate.
    """
    sizes, variant = _sizes(op, model)
    call = _CALLS[op](dtype, device, model, batch)
    try:
        call()
        case = cases.case(op, integers=False, **variant)
        found, before, after = search(op, dtype, device, sizes, case, call, tell)
    except BackendError as error:
        return f"not measured, because {str(error).partition(': ')[2].rstrip('.')}"
    if not found:
        return f"the shipped settings are the fastest ({before:.3g} ms)"
    tuning.store(device, {tuning.call_key(op, dtype, sizes): found})
    return f"{before / after:.2f} times as fast ({before:.3g} ms to {after:.3g} ms), stored"


def search(
    op: str,
    dtype: torch.dtype,
    device: torch.device,
    sizes: dict[str, int],
    case: cases.Case,
    call: Callable[[], object],
    tell: Tell,
) -> tuple[dict[str, Any], float, float]:
    """Return the best settings as plain values, and the milliseconds of ``call`` before and after.

    The settings are empty if the shipped ones are best. The search tries the rows of a tile first, and then the warps and
    stages of one group of kernels after the other. It measures only candidates that are within the tolerances.
    """
    make = import_module("lares_fast.kernels._launch").Choice
    best, truth = make(), case.truth(dtype)
    with tuning.forced(op, best):
        shipped = case.results("triton", dtype, device)
        before = least = milliseconds(call)

    def candidates() -> Iterator[Any]:
        for rows in tuning.rows(op, sizes):
            yield make(rows)
        for group in tuning.KERNELS[op]:
            for how in tuning.launches(dtype, tuning.capability(device)):
                yield make(best.rows, {**best.kernels, **dict.fromkeys(group, how)})

    for choice in candidates():
        with tuning.forced(op, choice):
            began = time.monotonic()
            fault = fault_of(case, dtype, device, shipped, truth)
            took = least if fault else milliseconds(call)
        tell(f"{op} {choice}: {fault or f'{took:.3g} ms'} ({time.monotonic() - began:.0f} s)")
        if took * _GAIN < least:
            best, least = choice, took
    return ({"rows": best.rows, "kernels": best.kernels} if best != make() else {}), before, least


def fault_of(
    case: cases.Case, dtype: torch.dtype, device: torch.device, shipped: cases.Results, truth: cases.Results
) -> str | None:
    """Return what is wrong with the current launch settings, or ``None``. Their twin is the result of the shipped settings."""
    try:
        found, again = (case.results("triton", dtype, device) for _ in range(2))
    except Exception as error:
        if not self_test.can_fall_back(error):
            raise
        return f"cannot be compiled or loaded ({type(error).__name__})"
    verdicts = judge("forward", found.forward, shipped.forward, truth.forward)
    verdicts += judge("gradient", found.gradients, shipped.gradients, truth.gradients)
    fault = next((verdict.fault for verdict in verdicts if verdict.fault), None)
    if fault is None and not all(torch.equal(found.exact[name], expected) for name, expected in truth.exact.items()):
        fault = "an integer result differs"
    return fault or (None if same_bits(found, again) else "two calls gave different bits")


def milliseconds(call: Callable[[], object]) -> float:
    """Return the median time of 20 calls on the GPU, after 3 calls that are not counted."""
    times = []
    for turn in range(23):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        if turn >= 3:
            times.append(start.elapsed_time(end))
    return sorted(times)[len(times) // 2]


def _sizes(op: str, model: LARESConfig) -> tuple[dict[str, int], dict[str, Any]]:
    """Return the sizes under which settings are stored, and the variant of the test case."""
    width, heads, longest = model.hidden_size, model.n_heads, model.max_len
    if op == "attention":
        return {"width": width // heads, "longest": longest}, {"width": width // heads, "short": longest <= 16}
    if op == "linear_cross_entropy":
        return {"width": width}, {"width": width}
    sizes = {"width": width, "heads": heads, "inner": model.inner_size}
    return {**sizes, "longest": longest}, {**sizes, "adapter": model.adapter}


# The calls that are measured: forward and backward of each op. Each builder takes the dtype, the device, the model and the
# number of sequences or rows.


def _random(*shape: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.randn(shape, device=device).to(dtype).requires_grad_()


def _sequences(model: LARESConfig, batch: int, device: torch.device) -> tuple[Tensor, Draw]:
    """Return offsets and dropout masks of ``batch`` sequences of ``max_len`` items."""
    return model.max_len * torch.arange(batch + 1, device=device), Draw((1, 2), torch.arange(batch, device=device))


def _attention(dtype: torch.dtype, device: torch.device, model: LARESConfig, batch: int) -> Callable[[], object]:
    heads = model.n_heads
    shape = (batch * model.max_len, heads, model.hidden_size // heads)
    query, key, value = (_random(*shape, dtype=dtype, device=device) for _ in range(3))
    offsets, draw = _sequences(model, batch, device)
    how: dict[str, Any] = {"draw": draw, "dropout": model.dropout, "backend": "triton"}
    return lambda: _with_gradients(ops.attention(query, key, value, offsets, model.max_len, **how), (query, key, value))


def _linear_cross_entropy(dtype: torch.dtype, device: torch.device, model: LARESConfig, batch: int) -> Callable[[], object]:
    hidden, items = (_random(rows, model.hidden_size, dtype=dtype, device=device) for rows in (batch, _ITEMS))
    target = torch.arange(batch, device=device) % _ITEMS
    return lambda: _with_gradients(ops.target_logprob(hidden, items, target, backend="triton"), (hidden, items))


def _recurrence(dtype: torch.dtype, device: torch.device, model: LARESConfig, batch: int) -> Callable[[], object]:
    h, pre = (_random(batch * model.max_len, model.hidden_size, dtype=dtype, device=device) for _ in range(2))
    weights = [x.detach().to(device, dtype).requires_grad_() for x in reference.Recurrence(model).parameters()]
    offsets, draw = _sequences(model, batch, device)
    how: dict[str, Any] = {"n_heads": model.n_heads, "adapter": model.adapter, "depth": model.mean_depth, "draw": draw}
    how |= {"dropout": model.dropout, "attention_dropout": model.attention_dropout, "longest": model.max_len}
    return lambda: _with_gradients(ops.recurrence(h, offsets, weights, pre=pre, backend="triton", **how), (h, pre, *weights))


def _with_gradients(out: Tensor, leaves: tuple[Tensor, ...]) -> object:
    return torch.autograd.grad(out, leaves, torch.ones_like(out))


_CALLS: dict[str, Callable[[torch.dtype, torch.device, LARESConfig, int], Callable[[], object]]] = {
    "attention": _attention,
    "linear_cross_entropy": _linear_cross_entropy,
    "recurrence": _recurrence,
}
