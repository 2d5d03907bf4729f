"""Time h0 of packed sequences: PyTorch's trunc_normal_, the reference, and the faster backend of the device."""

import pytest
import torch

from benchmarks import harness
from lares_fast import ops
from lares_fast._random import Draw, seed_of

B, L, D = 1024, 9, 64


def candidates(device, backend):
    """Return the candidates for ``compare``. The numbers of ``backend`` are those of the reference, up to 1e-6."""
    draw, offsets = Draw(seed_of((1, 2), torch.device(device)), torch.arange(B, device=device)), L * torch.arange(B + 1)
    offsets, buffer = offsets.to(device), torch.empty(B * L, D, device=device)
    calls = {
        name: lambda name=name: ops.initial_state(draw, offsets, B * L, D, backend=name) for name in ("reference", backend)
    }
    expected, found = (call() for call in calls.values())
    assert (found - expected).abs().max() <= 1e-6
    return {"trunc_normal_": lambda: torch.nn.init.trunc_normal_(buffer, a=-3, b=3), **calls}


def test_cpu(compare):
    compare("initial_state", f"B{B} L{L} D{D}", candidates("cpu", "native"), "equal bits")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="the Triton kernel runs on a GPU, and this machine has none")
def test_gpu(compare):
    def finished(run):
        def timed():
            run()
            torch.cuda.synchronize()

        return timed

    timed = {name: finished(run) for name, run in candidates("cuda", "triton").items()}
    compare("initial_state, wall time", f"B{B} L{L} D{D}", timed, "numbers within 1e-6", clock=harness.time.perf_counter)
