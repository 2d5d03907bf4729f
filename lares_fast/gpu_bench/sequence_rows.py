"""Rows of the ops that work on packed sequences: ``attention`` and ``recurrence``."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lares_fast import LARESConfig, ops, reference
from lares_fast.gpu_bench import cases, packed_torch
from lares_fast.gpu_bench.candidates import (
    BF16,
    BOUND,
    FP32,
    OURS,
    Candidates,
    Result,
    in_fp64,
    near,
    upstream,
    with_gradients,
)
from lares_fast.gpu_bench.machine import Call, Machine

D = 64


def _sequences(machine: Machine, B: int, longest: int, kind: str) -> tuple[Tensor, Tensor]:
    """Return lengths [B] and offsets [B + 1]."""
    lengths = cases.lengths(kind, machine.batch(B), longest)
    return lengths, torch.cat((torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)))


def attention(machine: Machine, B: int, longest: int, kind: str) -> Result:
    """Time ``attention`` of two heads with its gradients, in bf16."""
    heads, width, dtype = 2, 32, FP32 if machine.rehearse else BF16
    lengths, offsets = _sequences(machine, B, longest, kind)
    P, on_device = int(offsets[-1]), offsets.to(machine.device)
    real = (torch.arange(longest) < lengths[:, None]).to(machine.device)
    packed = [torch.randn(P, heads, width, device=machine.device).to(dtype).requires_grad_() for _ in range(3)]

    def pad(x: Tensor) -> Tensor:
        padded = x.new_zeros(len(lengths), longest, heads, width)
        padded[real] = x.detach()
        return padded.transpose(1, 2).contiguous()

    def flat(found: tuple[Tensor, ...]) -> list[Tensor]:
        # Compare tokens only, because padding is not part of the result.
        return [x.transpose(1, 2)[real] for x in found]

    def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    def ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return ops.attention(q, k, v, on_device, longest, backend=machine.backend("triton"))

    padded = [pad(x).requires_grad_() for x in packed]
    grad = pad(upstream(packed[0]))
    exact = [x.detach().double().requires_grad_() for x in padded]
    out = sdpa(*exact)
    check = near(flat((out, *torch.autograd.grad(out, exact, grad.double()))), BOUND[dtype])
    row = Candidates(machine)

    def rival() -> tuple[Tensor, ...]:
        out = sdpa(*padded)
        return out.detach(), *torch.autograd.grad(out, padded, grad)

    row.add("SDPA, padded before", rival, lambda found: check(flat(found)))
    if not machine.rehearse:
        try:
            from torch.nn.attention.varlen import varlen_attn
        except ImportError as error:
            row.left_out["flash, packed"] = str(error)
        else:
            short = on_device.to(torch.int32)

            def flash(q: Tensor, k: Tensor, v: Tensor) -> Any:
                return varlen_attn(q, k, v, short, short, longest, longest, window_size=(-1, 0))

            row.add("flash, packed", with_gradients(flash, packed), check)
    row.add(OURS, with_gradients(ours, packed), check)
    row.add_captured(OURS, check)
    # The forward reads three tensors and writes one. The backward reads five and writes three.
    return row.result({"bytes": 12 * P * heads * width * 2})


def recurrence(machine: Machine, B: int, longest: int, kind: str, dtype: torch.dtype, T: int, *, gradients: bool) -> Result:
    """Time T steps of ``recurrence`` with two layers, from the weights in ``dtype``."""
    rounded, layers = dtype == BF16, 2
    dtype = FP32 if machine.rehearse else dtype
    config = LARESConfig(n_items=2, max_len=longest, n_core_layers=layers)
    torch.manual_seed(0)
    weights = [
        w.detach().to(machine.device, dtype).requires_grad_(gradients) for w in reference.Recurrence(config).parameters()
    ]
    lengths, offsets = _sequences(machine, B, longest, kind)
    P, offsets, lengths_on_device = int(offsets[-1]), offsets.to(machine.device), lengths.to(machine.device)
    h, pre = (torch.randn(P, D, device=machine.device).to(dtype).requires_grad_(gradients) for _ in range(2))
    leaves = [h, pre, *weights]
    plan = [group.to(machine.device, dtype) for group in packed_torch.buckets(lengths)]

    def ours(backend: str, h: Tensor, pre: Tensor, *weights: Tensor, bf16: bool = False) -> Tensor:
        how: dict[str, Any] = {"n_heads": 2, "depth": T, "longest": longest, "backend": machine.backend(backend), "bf16": bf16}
        return ops.recurrence(h, offsets, list(weights), pre=pre, **how)

    def packed(sdpa: bool, h: Tensor, pre: Tensor, *weights: Tensor) -> Tensor:
        return packed_torch.recurrence(h, pre, lengths_on_device, plan, weights, 2, T, 0.0, sdpa=sdpa)

    def truth(h: Tensor, pre: Tensor, *weights: Tensor) -> Tensor:
        depth = torch.full((len(lengths),), T, device=machine.device)
        return reference.recurrence(h, offsets, list(weights), n_heads=2, pre=pre, depth=depth)

    def run(call: Callable[..., Tensor], leaves: list[Tensor]) -> Call:
        return with_gradients(call, leaves) if gradients else lambda: call(*leaves)

    expected = in_fp64(truth, leaves) if gradients else (truth(*(x.double() for x in leaves)),)
    # Gradients of weights are sums over all tokens, so their bound is larger.
    bounds = {FP32: 1e-3, BF16: 2e-1} if gradients else {each: 2 * BOUND[each] for each in (FP32, BF16)}
    check, row = near(expected, bounds[dtype]), Candidates(machine)
    with torch.set_grad_enabled(gradients):
        row.add("packed torch, SDPA", run(partial(packed, True), leaves), check)
        row.add("packed torch, softmax", run(partial(packed, False), leaves), check)
        row.add_captured("packed torch, SDPA", check)
        row.add(OURS, run(partial(ours, "triton"), leaves), check)
        row.add_captured(OURS, check)
        if rounded:
            # The way of training: weights and states in fp32, products in bf16.
            masters = [x.detach().float().requires_grad_(gradients) for x in leaves]
            name, check = f"{OURS}, fp32 masters", near(expected, bounds[BF16])
            row.add(name, run(partial(ours, "triton", bf16=True), masters), check)
            row.add_captured(name, check)
        row.add(f"{OURS}, layers", run(partial(ours, "layers"), leaves), check)
        times = 4 if gradients else 1
        flops = times * P * T * layers * 2 * (4 * D * D + 2 * D * config.inner_size)
        moved = times * (2 * P + len(lengths)) * D * h.element_size()
        return row.result({"fp32" if dtype == FP32 else "bf16": flops, "bytes": moved})
