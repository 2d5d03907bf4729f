"""Keep-masks: torch's bernoulli_, the reference's Philox in PyTorch, the C++ twin."""

import torch

from lares_fast import _native_random, _random

B, L, D, H = 256, 20, 64, 2


def test_hidden_masks(compare):
    rows = torch.arange(B)
    address = {"site": 1, "step": 2, "layer": 0, "rows": rows, "length": L, "width": D}
    tokens = {**address, "rows": rows.repeat_interleave(L), "positions": torch.arange(L).repeat(B)}
    del tokens["length"]
    expected = _random.keep_hidden((1, 2), 32768, **address)
    assert torch.equal(expected, _native_random.keep_hidden((1, 2), 32768, **tokens).view_as(expected))
    buffer = torch.empty(B, L, D)
    candidates = {
        "bernoulli_": lambda: buffer.bernoulli_(0.5),
        "PyTorch Philox": lambda: _random.keep_hidden((1, 2), 32768, **address),
        "C++ Philox": lambda: _native_random.keep_hidden((1, 2), 32768, **tokens),
    }
    compare("random", f"hidden B{B} L{L} D{D}", candidates, "C++ bits equal PyTorch's", rounds=11)


def test_attention_masks(compare):
    rows = torch.arange(B)
    address = {"step": 2, "layer": 0, "rows": rows, "heads": H, "length": L}
    assert torch.equal(
        _random.keep_attention((1, 2), 32768, **address), _native_random.keep_attention((1, 2), 32768, **address)
    )
    buffer = torch.empty(B, H, L, L)
    candidates = {
        "bernoulli_": lambda: buffer.bernoulli_(0.5),
        "PyTorch Philox": lambda: _random.keep_attention((1, 2), 32768, **address),
        "C++ Philox": lambda: _native_random.keep_attention((1, 2), 32768, **address),
    }
    compare("random", f"attention B{B} H{H} L{L}", candidates, "C++ bits equal PyTorch's", rounds=11)
