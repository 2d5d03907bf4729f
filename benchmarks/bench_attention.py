"""Time causal attention of packed sequences against PyTorch's fused kernel on padded sequences, on the CPU and on a GPU."""

import pytest
import torch
from torch.nn import functional as F

from benchmarks import harness
from lares_fast import ops

H, E = 2, 32
CHECK = "results within 1e-5"


def sequences(B, longest, device="cpu", dtype=torch.float32):
    """Return (q, k, v, offsets, mask of real tokens), with the lengths of a typical log: mostly short, some of full length."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(2, longest // 2, (B,), generator=generator)
    lengths[::5] = longest
    offsets = torch.cat((torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)))
    packed = [torch.randn(int(offsets[-1]), H, E, generator=generator).to(device, dtype) for _ in range(3)]
    real = torch.arange(longest) < lengths[:, None]
    return packed, offsets.to(device), real.to(device)


def pad(packed, real):
    padded = packed.new_zeros(*real.shape, H, E)
    padded[real] = packed
    return padded.transpose(1, 2).contiguous()


def forward(call, inputs):
    return lambda: call(*inputs)


def training(call, inputs):
    leaves = [x.clone().requires_grad_() for x in inputs]

    def run():
        out = call(*leaves)
        return torch.autograd.grad(out, leaves, torch.ones_like(out))

    return run


@pytest.mark.parametrize("step", [forward, training])
@pytest.mark.parametrize(("B", "longest"), [(256, 20), (256, 50)])
def test_cpu(compare, B, longest, step):
    packed, offsets, real = sequences(B, longest)
    padded = [pad(x, real) for x in packed]
    sdpa = lambda *x: F.scaled_dot_product_attention(*x, is_causal=True)  # noqa: E731
    ours = lambda *x: ops.attention(*x, offsets, longest, backend="reference")  # noqa: E731
    torch.testing.assert_close(sdpa(*padded).transpose(1, 2)[real], ours(*packed), rtol=1e-5, atol=1e-5)
    candidates = {"SDPA, padded before": step(sdpa, padded), "reference, packed": step(ours, packed)}
    compare("attention", f"{step.__name__} B{B} L{longest} H{H} E{E}", candidates, CHECK)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="the Triton kernels run on a GPU, and this machine has none")
@pytest.mark.parametrize("step", [forward, training])
@pytest.mark.parametrize(("B", "longest"), [(2048, 20), (2048, 50)])
def test_gpu(compare, B, longest, step):
    packed, offsets, real = sequences(B, longest, "cuda", torch.bfloat16)
    padded = [pad(x, real) for x in packed]
    sdpa = lambda *x: F.scaled_dot_product_attention(*x, is_causal=True)  # noqa: E731
    ours = lambda *x: ops.attention(*x, offsets, longest, backend="triton")  # noqa: E731
    torch.testing.assert_close(sdpa(*padded).transpose(1, 2)[real], ours(*packed), rtol=2e-2, atol=2e-2)

    def finished(run):
        def timed():
            run()
            torch.cuda.synchronize()

        return timed

    candidates = {"SDPA, padded before": finished(step(sdpa, padded)), "triton, packed": finished(step(ours, packed))}
    shape = f"{step.__name__} B{B} L{longest} H{H} E{E} bf16"
    compare("attention, wall time", shape, candidates, "results within 2e-2", clock=harness.time.perf_counter)
