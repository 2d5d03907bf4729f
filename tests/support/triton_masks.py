"""Compare Triton's masks with _random.py, in a separate process: TRITON_INTERPRET must be set before Triton is imported."""

import os

os.environ["TRITON_INTERPRET"] = "1"

import torch
import triton
import triton.language as tl
from lares_fast.kernels import _random as masks

from lares_fast import _random


@triton.jit
def hidden_kernel(out, rows, key, threshold, site, step, layer, L: tl.constexpr, D: tl.constexpr):
    position = tl.arange(0, L)
    row = tl.full((L,), tl.load(rows + tl.program_id(0)), tl.int32)
    for column in tl.static_range(0, D, 64):
        keep = masks.keep_hidden(key, threshold, site, step, layer, row, position, column, L)
        at = (tl.program_id(0) * L + position)[:, None] * D + column + tl.arange(0, 64)[None, :]
        tl.store(out + at, keep)


@triton.jit
def attention_kernel(out, rows, key, threshold, step, layer, H: tl.constexpr, L: tl.constexpr):
    batch, head = tl.program_id(0), tl.program_id(1)
    keep = masks.keep_attention(key, threshold, step, layer, tl.load(rows + batch), head, 0, 0, L, L)
    at = ((batch * H + head) * L + tl.arange(0, L))[:, None] * L + tl.arange(0, L)[None, :]
    tl.store(out + at, keep)


key = _random.fold(_random.root_key(3), 4)
packed = key[0] + (key[1] << 32)
rows = torch.tensor([0, 5, 70000], dtype=torch.int32)
for L, D, threshold in ((32, 128, 32768), (16, 64, 6554)):
    hidden = torch.zeros(3, L, D, dtype=torch.bool)
    hidden_kernel[(3,)](hidden, rows, packed, threshold, 2, 7, 1, L, D)
    expected = _random.keep_hidden(key, threshold, site=2, step=7, layer=1, rows=rows.long(), length=L, width=D)
    assert torch.equal(hidden, expected), "hidden masks differ"
    attention = torch.zeros(3, 2, L, L, dtype=torch.bool)
    attention_kernel[(3, 2)](attention, rows, packed, threshold, 7, 1, 2, L)
    expected = _random.keep_attention(key, threshold, step=7, layer=1, rows=rows.long(), heads=2, length=L)
    assert torch.equal(attention, expected), "attention masks differ"
print("equal")
