"""Encoding for serving: the padded reference against the model users build, which skips padding."""

import pytest
import torch
from cases import models, sequences

B, L, T = 256, 20, 4


@pytest.mark.parametrize("kind", ["short", "full"])
def test_encode(compare, kind):
    slow, fast = (model.eval() for model in models())
    batch = sequences(kind, B, L)

    @torch.no_grad()
    def run(model):
        return model.encode(*batch, num_steps=T)

    torch.testing.assert_close(run(fast), run(slow), rtol=1e-4, atol=1e-5)
    candidates = {"reference, padded": lambda: run(slow), "lares_fast": lambda: run(fast)}
    compare("encode", f"{kind} B{B} L{L} T{T} 2+2 layers D64", candidates, "states equal to 1e-5", rounds=7)
