"""Predict the launches, the memory traffic and the time of the GPU kernels and of eager PyTorch. Nothing is measured.

    python -m benchmarks.predict_gpu > docs/kernels/predictions.md

A dispatch hook counts eager PyTorch on tensors without storage: each operation that computes is one launch, which reads its
operands and writes its results once. Kernels are counted at the launch wrapper: a launch moves each of its tensors once.
"""

import argparse
import importlib
import math
import sys
from dataclasses import dataclass
from unittest import mock

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from lares_fast import LARESConfig, ops, reference
from lares_fast.ops import _triton

aten = torch.ops.aten
PRODUCTS = {aten.mm.default, aten.addmm.default, aten.bmm.default, aten.baddbmm.default}
# Their schemas do not mark them as views, but they compute nothing.
FREE = ("empty", "new_empty", "_unsafe_view", "detach")
# Seconds of host time for one launch, and the assumed share of the tensor cores' peak for the kernels' small products.
LAUNCH = 5e-6
SHARE = 0.2


@dataclass(frozen=True)
class Gpu:
    """A GPU's peak in bf16 (FLOP/s) and its bandwidth (bytes/s), from its data sheet."""

    name: str
    flops: float
    bandwidth: float


GPUS = (Gpu("A100", 312e12, 2.04e12), Gpu("H100", 990e12, 3.35e12), Gpu("B200", 2250e12, 8.0e12))


@dataclass(frozen=True)
class Cost:
    """The launches, the bytes moved and the operations of one call."""

    launches: int
    bytes: int
    flops: int = 0

    def seconds(self, gpu, share=1.0):
        """Return the longest of the times for launching, moving and multiplying."""
        return max(self.launches * LAUNCH, self.bytes / gpu.bandwidth, self.flops / (gpu.flops * share))


class Count(TorchDispatchMode):
    """Count the launches, bytes and operations of the code in the context."""

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
    """Return the bytes of tensors that are moved once. An expanded tensor counts with the size of its storage."""
    return sum(min(x.numel() * x.element_size(), x.untyped_storage().nbytes()) for x in found)


def eager(call):
    """Return the cost of ``call()`` on meta tensors.

    The reference computes attention scores in fp32 even if the inputs are bf16. An eager model would not. So ``scores`` takes
    the place of that function here.
    """
    attention = importlib.import_module("lares_fast.reference.attention")
    with mock.patch.object(attention, "_scores", scores), Count() as count:
        call()
    return count.cost()


def scores(query, key, mask):
    """Return the attention scores in the dtype of ``query``."""
    return query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1]) + mask


def fused(call, flops):
    """Return the cost of the Triton launches of ``call()`` on CPU tensors. Nothing is compiled or run."""
    from lares_fast.kernels._launch import stand_in

    launches = []
    token = stand_in.set(lambda kernel, programs, arguments, options: launches.append(moved(tensors(arguments))))
    try:
        with _triton.anywhere():
            call()
    finally:
        stand_in.reset(token)
    return Cost(len(launches), sum(launches), flops)


def recurrence(B, L, T, layers, D, inner, dtype=torch.bfloat16):
    """Return (eager, fused) for T steps of the core block, without gradients."""
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
    # The kernel pads tiles to multiples of 16 rows.
    flops = slow.flops * -(-L // 16) * 16 // L
    packed = torch.zeros(B * L, D, dtype=dtype)
    offsets = torch.arange(0, B * L + 1, L)
    weights = [torch.zeros(weight.shape, dtype=dtype) for weight in block.parameters()]
    how = {"n_heads": 2, "pre": packed, "depth": T, "longest": L, "backend": "triton"}
    call = lambda: ops.recurrence(packed, offsets, weights, **how)  # noqa: E731
    return slow, fused(call, flops)


def attention(B, L, H, E, dtype=torch.bfloat16):
    """Return (eager, fused) for forward and backward."""
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

    # Both passes of the backward compute the scores again.
    return slow, fused(packed, slow.flops * 9 // 6)


def linear_cross_entropy(M, N, D, dtype=torch.bfloat16):
    """Return (eager, fused) for forward and backward."""

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
    """Return the lines of docs/kernels/predictions.md: the table and its assumptions."""
    lines = [
        "# Predictions",
        "",
        "**These numbers were calculated on a machine without a GPU. Nothing here was measured.**",
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
        "A cell has two numbers: eager PyTorch (the padded reference, without dropout) / the kernels. The calculation assumes:",
        "",
        "- Eager PyTorch: every operation that computes is one launch. It reads its operands and writes its results once.",
        "- Kernels: a launch moves each of its tensors once. Repeated reads come from the L2 cache. "
        "PyTorch's own operations around the launches are not counted.",
        "  The launches of the recurrence are counted at the launch wrapper.",
        f"- A time is the longest of three: launches x {1e6 * LAUNCH:g} us, bytes / bandwidth, and operations / peak. "
        f"The kernels get {SHARE:.0%} of the peak for their small products. Tiles are padded to 16 rows.",
        f"- Peaks come from data sheets: {sheets}.",
    ]


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    sys.stdout.write("\n".join(page()) + "\n")
