"""Rows of the ops that work on packed sequences: ``attention`` and ``recurrence``."""

import torch
from torch.nn import functional as F

from benchmarks import cases, packed_torch
from benchmarks.gpu.measurement import BF16, BOUND, FP32, Row, in_fp64, near, upstream, with_gradients
from lares_fast import LARESConfig, ops, reference

D = 64


def sequences(machine, B, longest, kind):
    """Return lengths [B] and offsets [B + 1]."""
    lengths = cases.lengths(kind, *(machine.small(B)), longest)
    return lengths, torch.cat((torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)))


def attention(machine, B, longest, kind):
    heads, width, dtype = 2, 32, FP32 if machine.rehearse else BF16
    lengths, offsets = sequences(machine, B, longest, kind)
    P, on_device = int(offsets[-1]), offsets.to(machine.device)
    real = (torch.arange(longest) < lengths[:, None]).to(machine.device)
    packed = [torch.randn(P, heads, width, device=machine.device).to(dtype).requires_grad_() for _ in range(3)]

    def pad(x):
        padded = x.new_zeros(len(lengths), longest, heads, width)
        padded[real] = x.detach()
        return padded.transpose(1, 2).contiguous()

    padded = [pad(x).requires_grad_() for x in packed]
    grad = pad(upstream(packed[0]))
    sdpa = lambda *x: F.scaled_dot_product_attention(*x, is_causal=True)  # noqa: E731
    # Compare tokens only, because padding is not part of the result.
    flat = lambda found: [x.transpose(1, 2)[real] for x in found]  # noqa: E731
    exact = [x.detach().double().requires_grad_() for x in padded]
    out = sdpa(*exact)
    check = near(flat([out, *torch.autograd.grad(out, exact, grad.double())]), BOUND[dtype])
    ours = lambda *x: ops.attention(*x, on_device, longest, backend=machine.backend("triton"))  # noqa: E731
    row = Row(machine)

    def rival():
        out = sdpa(*padded)
        return out, *torch.autograd.grad(out, padded, grad)

    row.add("SDPA, padded before", rival, lambda found: check(flat(found)))
    if not machine.rehearse:
        try:
            from torch.nn.attention.varlen import varlen_attn
        except ImportError as error:
            row.facts["left_out"]["flash, packed"] = str(error)
        else:
            short = on_device.to(torch.int32)
            flash = lambda *x: varlen_attn(*x, short, short, longest, longest, window_size=(-1, 0))  # noqa: E731
            row.add("flash, packed", with_gradients(flash, packed), check)
    row.add("ours", with_gradients(ours, packed), check)
    row.add_captured("ours", check)
    # The forward reads three tensors and writes one. The backward reads five and writes three.
    return row.result(12 * P * heads * width * 2 / machine.copy)


def recurrence(machine, B, longest, kind, dtype, T, gradients):
    dtype, layers = FP32 if machine.rehearse else dtype, 2
    config = LARESConfig(n_items=2, max_len=longest, n_core_layers=layers)
    torch.manual_seed(0)
    weights = [
        w.detach().to(machine.device, dtype).requires_grad_(gradients) for w in reference.Recurrence(config).parameters()
    ]
    lengths, offsets = sequences(machine, B, longest, kind)
    P, offsets, lengths_on_device = int(offsets[-1]), offsets.to(machine.device), lengths.to(machine.device)
    h, pre = (torch.randn(P, D, device=machine.device).to(dtype).requires_grad_(gradients) for _ in range(2))
    leaves = [h, pre, *weights]
    plan = [tuple(x.to(machine.device) for x in part) for part in packed_torch.buckets(lengths)]
    plan = [(index, real, mask.to(dtype)) for index, real, mask in plan]

    def ours(backend):
        how = {"n_heads": 2, "depth": T, "longest": longest, "backend": machine.backend(backend)}
        return lambda h, pre, *weights: ops.recurrence(h, offsets, list(weights), pre=pre, **how)

    def packed(sdpa):
        given = (lengths_on_device, plan)
        return lambda h, pre, *weights: packed_torch.recurrence(h, pre, *given, list(weights), 2, T, 0.0, sdpa=sdpa)

    def truth(h, pre, *weights):
        depth = torch.full((len(lengths),), T, device=machine.device)
        return reference.recurrence(h, offsets, list(weights), n_heads=2, pre=pre, depth=depth)

    def run(call):
        return with_gradients(call, leaves) if gradients else lambda: call(*leaves)

    expected = in_fp64(truth, leaves) if gradients else [truth(*(x.double() for x in leaves))]
    # Gradients of weights are sums over all tokens, so their bound is larger.
    check, row = near(expected, (1e-3 if dtype == FP32 else 2e-1) if gradients else 2 * BOUND[dtype]), Row(machine)
    with torch.set_grad_enabled(gradients):
        row.add("packed torch, SDPA", run(packed(True)), check)
        row.add("packed torch, softmax", run(packed(False)), check)
        row.add("ours", run(ours("triton")), check)
        row.add("ours, layers", run(ours("layers")), check)
        for name in ("packed torch, SDPA", "ours"):
            row.add_captured(name, check)
        times = 4 if gradients else 1
        flops = times * P * T * layers * 2 * (4 * D * D + 2 * D * config.inner_size)
        moved = times * (2 * P + len(lengths)) * D * h.element_size()
        return row.result(max(flops / machine.peak["fp32" if dtype == FP32 else "bf16"], moved / machine.copy))
