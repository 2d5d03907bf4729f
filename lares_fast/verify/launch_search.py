"""``lares-fast tune``: measure on this GPU how the Triton kernels of a model's sizes are launched best."""

from __future__ import annotations

import time
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from lares_fast import ops, reference
from lares_fast._errors import BackendError, InputError
from lares_fast._random import Draw
from lares_fast.cli.console import notice
from lares_fast.cli.settings import build
from lares_fast.config import LARESConfig
from lares_fast.train.config import RunConfig
from lares_fast.verify import cases, self_test, tuning
from lares_fast.verify.comparison import DTYPES, equal, ops_with_triton
from lares_fast.verify.tolerance import judge

# A choice that is less faster than this is not worth other bits.
_GAIN = 1.03
_ITEMS = 20_000


def add_arguments(parser: ArgumentParser) -> None:
    """The arguments of ``tune``."""
    parser.add_argument("--config", metavar="FILE", help="YAML file or preset whose model and batch size are measured")
    parser.add_argument("--hidden-size", type=int, metavar="D", help="instead of the configuration's")
    parser.add_argument("--heads", type=int, metavar="H", help="instead of the configuration's")
    parser.add_argument("--longest", type=int, metavar="L", help="items of a sequence, instead of the configuration's max_len")
    parser.add_argument("--op", action="append", choices=ops_with_triton(), help="this op alone; may be given again")
    parser.add_argument(
        "--dtype", action="append", choices=list(DTYPES), help="may be given again (default: float32 and bfloat16)"
    )
    parser.add_argument("--clear", action="store_true", help="remove what was found, and launch as shipped again")


def command(arguments: Namespace) -> int:
    """Run ``tune``."""
    if arguments.clear:
        print("removed what was found" if tuning.clear() else "nothing was found before")
        return 0
    if not torch.cuda.is_available():
        raise InputError("tune measures kernels on a GPU, and torch sees none: run it on the machine that has the GPU.")
    config = RunConfig() if arguments.config is None else build(arguments.config)
    flags = {"hidden_size": arguments.hidden_size, "n_heads": arguments.heads, "max_len": arguments.longest}
    given = {name: value for name, value in flags.items() if value is not None}
    model = replace(LARESConfig(n_items=2, **config.model), **given)
    device = torch.device("cuda", torch.cuda.current_device())
    for op in arguments.op or ops_with_triton():
        for dtype in arguments.dtype or ["float32", "bfloat16"]:
            print(f"{op} {dtype}: {tune(op, DTYPES[dtype], device, model, config.spt.batch_size)}", flush=True)
    return 0


def tune(op: str, dtype: torch.dtype, device: torch.device, model: LARESConfig, batch: int) -> str:
    """Measure ``op`` and store what is faster than what is shipped; the result in words."""
    sizes, variant = _sizes(op, model)
    call = _CALLS[op](dtype, device, model, batch)
    try:
        call()
        found, before, after = search(op, dtype, device, sizes, cases.case(op, integers=False, **variant), call)
    except BackendError as error:
        return f"not measured, because {str(error).partition(': ')[2].rstrip('.')}"
    if not found:
        return f"as shipped ({before:.3g} ms)"
    tuning.keep(device, {tuning.call_key(op, dtype, sizes): found})
    return f"{before / after:.2f} times as fast ({before:.3g} ms to {after:.3g} ms), stored"


def search(
    op: str, dtype: torch.dtype, device: torch.device, sizes: dict[str, int], case: cases.Case, call: Callable[[], object]
) -> tuple[dict[str, Any], float, float]:
    """(the best choice as plain values, empty for the shipped one; milliseconds of ``call`` as shipped; and with it).

    Rows of a tile first, then how the kernels are launched, one after the other. Only what obeys the law is measured.
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
            fault = _fault(case, dtype, device, shipped, truth)
            took = least if fault else milliseconds(call)
        notice(f"{op} {choice}: {fault or f'{took:.3g} ms'} ({time.monotonic() - began:.0f} s)")
        if took * _GAIN < least:
            best, least = choice, took
    return ({"rows": best.rows, "kernels": best.kernels} if best != make() else {}), before, least


def _fault(
    case: cases.Case, dtype: torch.dtype, device: torch.device, shipped: cases.Results, truth: cases.Results
) -> str | None:
    """What is wrong with the kernels as they are launched now; their twin is the shipped configuration."""
    try:
        found, again = (case.results("triton", dtype, device) for _ in range(2))
    except Exception as error:
        if not self_test.can_fall_back(error):
            raise
        return f"not compiled or loaded ({type(error).__name__})"
    verdicts = judge("forward", found.forward, shipped.forward, truth.forward)
    verdicts += judge("gradient", found.gradients, shipped.gradients, truth.gradients)
    fault = next((verdict.fault for verdict in verdicts if verdict.fault), None)
    if fault is None and not all(torch.equal(found.exact[name], want) for name, want in truth.exact.items()):
        fault = "a whole number is another"
    return fault or (None if equal(found, again) else "two calls gave two answers")


def milliseconds(call: Callable[[], object]) -> float:
    """The median of 20 calls on the GPU, after 3 that are not counted."""
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
    """(the sizes by which a choice is found, the variant of the case)."""
    width, heads, longest = model.hidden_size, model.n_heads, model.max_len
    if op == "attention":
        return {"width": width // heads, "longest": longest}, {"width": width // heads, "short": longest <= 16}
    if op == "linear_cross_entropy":
        return {"width": width}, {"width": width}
    sizes = {"width": width, "heads": heads, "inner": model.inner_size}
    return {**sizes, "longest": longest}, {**sizes, "adapter": model.adapter}


def _random(*shape: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.randn(shape, device=device).to(dtype).requires_grad_()


def _sequences(model: LARESConfig, batch: int, device: torch.device) -> tuple[Tensor, Draw]:
    """Offsets and masks of ``batch`` full sequences."""
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
