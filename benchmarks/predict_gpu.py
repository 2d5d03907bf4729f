"""Predictions, not measurements: launches and memory traffic of the GPU kernels against eager PyTorch, and rooflines.

    python -m benchmarks.predict_gpu > docs/kernels/predictions.md

Eager PyTorch is counted by a dispatch hook on tensors without storage: each operation that computes is a launch, reads its
operands and writes its results once. Kernels are counted at the launch wrapper: a launch moves each of its tensors once. An op
without Triton kernels is given one launch that moves its inputs and outputs once.
"""

import importlib
import math
import sys
from dataclasses import dataclass
from unittest import mock

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from lares_fast import LARESConfig, _dispatch, ops, reference
from lares_fast.ops import _triton

aten = torch.ops.aten
PRODUCTS = {aten.mm.default, aten.addmm.default, aten.bmm.default, aten.baddbmm.default}
# No views by their schema, but nothing is computed.
FREE = ("empty", "new_empty", "_unsafe_view", "detach")
# Seconds that one launch keeps the host, and the share of the tensor cores' peak that small products in one program may reach.
LAUNCH = 5e-6
SHARE = 0.2


@dataclass(frozen=True)
class Gpu:
    """Peak in bf16, and bandwidth, by data sheet."""

    name: str
    flops: float
    bandwidth: float


GPUS = (Gpu("A100", 312e12, 2.04e12), Gpu("H100", 990e12, 3.35e12), Gpu("B200", 2250e12, 8.0e12))


@dataclass(frozen=True)
class Cost:
    """What one call takes."""

    launches: int
    bytes: int
    flops: int = 0

    def seconds(self, gpu, share=1.0):
        """The longest of launching, moving and multiplying."""
        return max(self.launches * LAUNCH, self.bytes / gpu.bandwidth, self.flops / (gpu.flops * share))


class Count(TorchDispatchMode):
    """Launches, bytes and operations of what runs within."""

    def __init__(self):
        super().__init__()
        self.launches = self.bytes = self.flops = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        results = tensors(out)
        free = function.is_view or function._schema.name.removeprefix("aten::").startswith(FREE)
        if results and not free:
            self.launches += 1
            self.bytes += moved([*tensors((args, kwargs)), *results])
            if function in PRODUCTS:
                self.flops += 2 * results[0].numel() * tensors(args)[-1].shape[-2]
        return out

    def cost(self):
        return Cost(self.launches, self.bytes, self.flops)


def tensors(tree):
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]


def moved(found):
    """Bytes of tensors that are moved once; what is expanded is read once."""
    return sum(min(x.numel() * x.element_size(), x.untyped_storage().nbytes()) for x in found)


def eager(call):
    """The cost of ``call()`` on meta tensors.

    The reference computes scores of half precision in fp32, which an eager model would not do and is not charged for.
    """
    attention = importlib.import_module("lares_fast.reference.attention")
    with mock.patch.object(attention, "_scores", scores), Count() as count:
        call()
    return count.cost()


def scores(query, key, mask):
    """Those of attention, in the dtype of ``query``."""
    return query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1]) + mask


def fused(call, flops):
    """The cost of the Triton launches of ``call()`` on CPU tensors; nothing is compiled or run."""
    from lares_fast.kernels._launch import stand_in

    launches = []
    token = stand_in.set(lambda kernel, programs, arguments, options: launches.append(moved(tensors(arguments))))
    try:
        with _triton.anywhere():
            call()
    finally:
        stand_in.reset(token)
    return Cost(len(launches), sum(launches), flops)


def has_triton(op):
    return any(backend.name == "triton" for backend in _dispatch._TABLE[op])


def recurrence(B, L, T, layers, D, inner, dtype=torch.bfloat16):
    """(eager, fused) of T steps of the core-block for inference."""
    config = LARESConfig(n_items=2, hidden_size=D, n_heads=2, inner_size=inner, n_core_layers=layers)
    with torch.device("meta"):
        block = reference.Recurrence(config).to(dtype).requires_grad_(False)
        h, pre = torch.empty(2, B, L, D, dtype=dtype)
        mask = torch.empty(B, 1, L, L, dtype=dtype)

    def steps():
        state = h
        for step in range(1, T + 1):
            state = block.core(block.norm(block.adapter(state, pre)), mask, draw=None, step=step)

    slow = eager(steps)
    # Tiles are multiples of 16 rows.
    flops = slow.flops * -(-L // 16) * 16 // L
    if not has_triton("recurrence"):
        weights = sum(moved([weight]) for weight in block.parameters())
        return slow, Cost(1, weights + (2 * B * L + B) * D * dtype.itemsize, flops)
    packed = torch.zeros(B * L, D, dtype=dtype)
    offsets = torch.arange(0, B * L + 1, L)
    weights = [torch.zeros(weight.shape, dtype=dtype) for weight in block.parameters()]
    how = {"n_heads": 2, "pre": packed, "depth": T, "longest": L, "backend": "triton"}
    call = lambda: ops.recurrence(packed, offsets, weights, **how)  # noqa: E731
    return slow, fused(call, flops)


def attention(B, L, H, E, dtype=torch.bfloat16):
    """(eager, fused), forward and backward."""
    with torch.device("meta"):
        q, k, v = (torch.empty(B, H, L, E, dtype=dtype, requires_grad=True) for _ in range(3))
        mask = torch.empty(B, 1, L, L, dtype=dtype)

    def padded():
        out = reference.attention(q, k, v, mask, draw=None, dropout=0.0, step=0, layer=0)
        out.backward(torch.empty_like(out))

    slow = eager(padded)
    leaves = [torch.zeros(B * L, H, E, dtype=dtype, requires_grad=True) for _ in range(3)]
    grad, offsets = torch.zeros(B * L, H, E, dtype=dtype), torch.arange(0, B * L + 1, L)

    def packed():
        ops.attention(*leaves, offsets, L, backend="triton").backward(grad)

    # The scores are computed again in both passes of the backward.
    return slow, fused(packed, slow.flops * 9 // 6)


def linear_cross_entropy(M, N, D, dtype=torch.bfloat16):
    """(eager, fused), forward and backward."""

    def call(device, run):
        hidden, items = (torch.zeros(n, D, dtype=dtype, device=device, requires_grad=True) for n in (M, N))
        run(hidden, items, torch.zeros(M, dtype=torch.int64, device=device)).backward()

    slow = eager(lambda: call("meta", reference.linear_cross_entropy))
    run = lambda *x: ops.linear_cross_entropy(*x, backend="triton")  # noqa: E731
    return slow, fused(lambda: call("cpu", run), slow.flops * 5 // 3)


CASES = {
    "recurrence, B 256 L 50 T 8, 1 layer, D 64": lambda: recurrence(256, 50, 8, 1, 64, 256),
    "recurrence, B 256 L 50 T 8, 2 layers, D 64": lambda: recurrence(256, 50, 8, 2, 64, 256),
    "recurrence, B 2048 L 50 T 8, 2 layers, D 64": lambda: recurrence(2048, 50, 8, 2, 64, 256),
    "recurrence, B 2048 L 50 T 8, 2 layers, D 128": lambda: recurrence(2048, 50, 8, 2, 128, 256),
    "attention and gradients, B 2048 L 50 H 2 D/H 32": lambda: attention(2048, 50, 2, 32),
    "linear_cross_entropy and gradients, M 2048 N 12,101 D 64": lambda: linear_cross_entropy(2048, 12_101, 64),
}


def page():
    """The table, with what it assumes."""
    recurrence_by = "counted at the launch wrapper" if has_triton("recurrence") else "one launch by construction: no kernel yet"
    lines = [
        "# Predictions",
        "",
        "**Calculated on a machine without a GPU; nothing here was measured.**",
        "",
        "```",
        "python -m benchmarks.predict_gpu > docs/kernels/predictions.md",
        "```",
        "",
        "| in bf16 | launches | ratio | MB of HBM | ratio | ms on " + " | ms on ".join(gpu.name for gpu in GPUS) + " |",
        "|---|---|---|---|---|" + "---|" * len(GPUS),
    ]
    for name, case in CASES.items():
        slow, fast = case()
        times = [f"{1e3 * slow.seconds(gpu):.2f} / {1e3 * fast.seconds(gpu, SHARE):.2f}" for gpu in GPUS]
        lines.append(
            f"| {name} | {slow.launches} / {fast.launches} | {slow.launches / fast.launches:.0f} | "
            f"{slow.bytes / 1e6:.1f} / {fast.bytes / 1e6:.1f} | {slow.bytes / fast.bytes:.1f} | {' | '.join(times)} |"
        )
    sheets = ", ".join(f"{gpu.name} {gpu.flops / 1e12:.0f} TFLOP/s and {gpu.bandwidth / 1e12:.2f} TB/s" for gpu in GPUS)
    return [
        *lines,
        "",
        "Each cell is eager PyTorch (the padded reference, without dropout) / kernels. It assumes:",
        "- eager: every operation that computes is one launch, reads its operands and writes its results once;",
        "- kernels: a launch moves each tensor that it is given once; what programs read again comes from the L2 cache.",
        f"  PyTorch's own operations around the launches are not counted. The recurrence: {recurrence_by};",
        f"- a time is the longest of launches x {1e6 * LAUNCH:g} us, bytes / bandwidth, and operations / peak, of which",
        f"  kernels are given {SHARE:.0%} for their small products; tiles are padded to 16 rows;",
        f"- data sheets: {sheets}.",
    ]


if __name__ == "__main__":
    sys.stdout.write("\n".join(page()) + "\n")
