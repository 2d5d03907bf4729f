"""Time encoding for serving: the public model against padded and packed PyTorch."""

import pytest
import torch

import lares_fast
from lares_fast import LARESConfig
from lares_fast.gpu_bench import cases
from lares_fast.gpu_bench.official import OfficialLARES
from lares_fast.gpu_bench.packed_model import PackedLARES
from lares_fast.sequences import Sequences

B, L, T = 256, 50, 4


@pytest.mark.large
@pytest.mark.parametrize("kind", ["mean 8.75", "full"])
def test_encode(compare, kind):
    """Time one batch. The other models get h0 as an argument. lares_fast draws it within the measured time."""
    torch.manual_seed(0)
    ours = lares_fast.LARES(LARESConfig(n_items=cases.N, max_len=L, n_pre_layers=1, n_core_layers=1)).eval()
    eager, softmax, sdpa = (
        build(ours.config)
        for build in (OfficialLARES, lambda c: PackedLARES(c, sdpa=False), lambda c: PackedLARES(c, sdpa=True))
    )
    padded = cases.sequences(kind, B, L)
    packed = Sequences.from_padded(*padded)
    state = ours.initial_state(ours._default_draw(B), L)
    compiled = torch.compile(eager.encode)
    candidates = {
        "eager, padded": lambda: eager.encode(*padded, T, state)[:, -1],
        "torch.compile, padded": lambda: compiled(*padded, T, state)[:, -1],
        "packed torch, softmax": lambda: softmax.encode(*padded, T, state)[:, -1],
        "packed torch, SDPA": lambda: sdpa.encode(*padded, T, state)[:, -1],
        "lares_fast": lambda: ours.encode(*packed, num_steps=T),
    }
    rounded = lares_fast.LARES(ours.config, bf16=True)
    for model in (eager, softmax, sdpa, rounded):
        model.eval().load_state_dict(ours.state_dict())
    with torch.no_grad():
        expected = candidates["eager, padded"]()
        for run in candidates.values():
            torch.testing.assert_close(run(), expected, rtol=1e-4, atol=1e-5)
        candidates["lares_fast, bf16"] = lambda: rounded.encode(*packed, num_steps=T)
        torch.testing.assert_close(candidates["lares_fast, bf16"](), expected, rtol=0, atol=0.1)
        lengths = f"all lengths {L}" if kind == "full" else f"lengths of {kind}"
        shape = f"B {B}, {lengths}, T {T}, 1+1 layers, D 64"
        compare("encode", shape, candidates, "states equal to 1e-5, in bf16 to .1", warm_up=3)
