"""benchmarks/predict_gpu.py counts correctly, and the fused recurrence reaches its targets for launches and bytes."""

from pathlib import Path

import torch

from benchmarks import predict_gpu


def test_the_hook_counts_launches_bytes_and_operations():
    a, b = torch.empty(4, 8, device="meta"), torch.empty(8, 3, device="meta")
    cost = predict_gpu.eager(lambda: (a @ b).view(3, 4).relu())
    assert (cost.launches, cost.flops) == (2, 2 * 4 * 8 * 3)
    assert cost.bytes == 4 * (32 + 24 + 12 + 12 + 12)
    expanded = predict_gpu.eager(lambda: a + b[:1, :1].expand(4, 8))
    assert expanded.bytes == 4 * (32 + 24 + 32)


def test_kernels_are_counted_at_the_wrapper():
    _, fast = predict_gpu.attention(2, 10, 2, 16)
    P, H, E = 20, 2, 16
    block, row = P * H * E * 2, P * H * 4
    # Forward: q k v out lse. Backward: q k v out lse dout dq delta, and q k v lse dout delta dk dv. Each launch has offsets.
    assert fast.launches == 3
    assert fast.bytes == (4 * block + row) + (6 * block + 2 * row) + (6 * block + 2 * row) + 3 * 3 * 8


def test_targets_of_the_recurrence():
    slow, fast = predict_gpu.recurrence(64, 50, 8, 2, 64, 256)
    assert slow.launches >= 150 * fast.launches
    assert slow.bytes >= 40 * fast.bytes
    one_layer, fast = predict_gpu.recurrence(64, 50, 8, 1, 64, 256)
    assert one_layer.launches == 8 * 23
    assert one_layer.bytes >= 40 * fast.bytes


def test_the_page_is_what_the_program_prints():
    page = Path(__file__).parent.parent / "docs" / "kernels" / "predictions.md"
    assert page.read_text().splitlines() == predict_gpu.page()
