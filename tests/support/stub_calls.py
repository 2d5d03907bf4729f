"""Launch kernels with Triton's own launcher on a libcuda that needs no GPU. test_stub.py imports this in a separate process."""

import os

import torch
from lares_fast.kernels import _launch, _recurrence_backward
from triton.compiler import CompiledKernel

from lares_fast import ops
from lares_fast._errors import BackendError
from lares_fast._random import Draw
from lares_fast.ops import _triton
from lares_fast.verify import tuning

_triton.obstacle = lambda tensor: None
LOG = os.environ["STUB_LOG"]
H, E = 2, 32


def call(B, longest, lengths, dtype=torch.bfloat16, p=0.2):
    """Return the launches of one forward and backward."""
    open(LOG, "w").close()
    offsets = torch.cat((torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)))
    query = torch.zeros(int(offsets[-1]), H, E, dtype=dtype, requires_grad=True)
    out = ops.attention(query, query, query, offsets, longest, draw=Draw((1, 2), torch.arange(B)), dropout=p, backend="triton")
    out.backward(torch.zeros_like(out))
    return [line.split() for line in open(LOG).read().splitlines()]


names = ["attention_forward", "attention_backward_query", "attention_backward_key_value"]
variants = set()
for longest in range(1, 258):
    launches = call(1, longest, torch.tensor([longest]))
    S = 16 if longest <= 16 else 32
    assert [x[0] for x in launches] == names, launches
    assert {(int(x[2]), int(x[3])) for x in launches} == {(H * -(-longest // S), 1)}, (longest, launches)
    variants |= {x[1] for x in launches}
# There are tiles of 16 and of 32 rows.
assert len(variants) == 2 * len(names), len(variants)

for B in (1, 7, 2048, 70_000):
    launches = call(B, 3, torch.ones(B, dtype=torch.int64))
    assert {int(x[2]) for x in launches} == {B * H}, (B, launches)
    variants |= {x[1] for x in launches}
assert len(variants) == 2 * len(names), "the batch compiled a variant"

assert call(0, 5, torch.zeros(0, dtype=torch.int64)) == []
assert call(3, 5, torch.zeros(3, dtype=torch.int64)) == []

for dtype in (torch.float16, torch.float32):
    assert [x[0] for x in call(7, 200, torch.full((7,), 200), dtype, p=0.0)] == names


def catalog_call(M, N, D=64):
    """Return the launches of one forward with rank and one backward."""
    open(LOG, "w").close()
    hidden, items = (torch.zeros(n, D, dtype=torch.bfloat16, requires_grad=True) for n in (M, N))
    logprob, _ = ops.target_logprob_and_rank(hidden, items, torch.zeros(M, dtype=torch.int64), backend="triton")
    logprob.sum().backward()
    return [line.split() for line in open(LOG).read().splitlines()]


S = 32
variants = set()
for M, N in ((1, 1), (1, 12_101), (7, 33), (2048, 12_101), (70_000, 31)):
    launches = catalog_call(M, N)
    rows, tiles = -(-M // S), -(-N // S)
    most = max(1, min(tiles // 8, 1024 // rows))
    parts = -(-tiles // -(-tiles // most))
    expected = ["target_score", "softmax_forward", "target_score", "softmax_backward_hidden", "softmax_backward_items"]
    assert [x[0] for x in launches] == expected, launches
    assert [int(x[2]) for x in launches] == [rows, rows * parts, rows, rows * parts, tiles], (M, N, launches)
    variants |= {x[1] for x in launches}
assert len(variants) == 4, "the sizes compiled variants"
# Without rows, the gradient of the items is still written.
assert [x[0] for x in catalog_call(0, 100)] == ["softmax_backward_items"]


def recurrence_call(lengths, longest, depth=1, train=False, D=64):
    """Return the launches of one call; with ``train`` also of its backward."""
    open(LOG, "w").close()
    offsets = torch.cat((torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)))
    shapes = [(D,)] * 2 + [*[(D, D), (D,)] * 4, (D,), (D,), (D, D), (D,), (D, D), (D,), (D,), (D,)]
    weights = [torch.zeros(shape, dtype=torch.bfloat16, requires_grad=train) for shape in shapes]
    h = torch.zeros(int(offsets[-1]), D, dtype=torch.bfloat16)
    draw = Draw((1, 2), torch.arange(len(lengths))) if train else None
    how = {"draw": draw, "dropout": 0.2, "longest": longest, "backend": "triton"}
    out = ops.recurrence(h, offsets, weights, n_heads=2, pre=h, depth=depth, **how)
    if train:
        out.backward(torch.zeros_like(out))
    return [line.split() for line in open(LOG).read().splitlines()]


def most_tiles(B, P, longest):
    return min(B, 2 * (P + 3 * B) // (64 if longest <= 64 else 128) + 1)


variants = set()
for longest in range(1, 129):
    ((name, variant, programs, *_),) = recurrence_call(torch.full((3,), longest), longest)
    assert name == "recurrence_forward"
    assert int(programs) == most_tiles(3, 3 * longest, longest), longest
    variants.add(variant)
# There are tiles of 64 and of 128 rows.
assert len(variants) == 2, variants
for B in (1, 7, 2048, 70_000):
    ((name, variant, programs, *_),) = recurrence_call(torch.full((B,), 3), 20, depth=4)
    assert int(programs) == most_tiles(B, 3 * B, 20), B
    variants.add(variant)
assert len(variants) == 2, "the batch compiled a variant"
for longest in (129, 200):
    try:
        recurrence_call(torch.full((2,), longest), longest)
    except BackendError as error:
        assert f"sequences of up to 128 rows in torch.bfloat16, and longest is {longest}" in str(error)
    else:
        raise AssertionError(longest)
assert recurrence_call(torch.zeros(0, dtype=torch.int64), 5, train=True) == []

half = ["weight_gradient"] * 2 + ["input_gradient"]
step = ["recurrence_forward", "feed_half_backward", *half, "attention_half_backward", *half, "join_backward"]
for T in (1, 3):
    launches = recurrence_call(torch.tensor([5, 7]), 7, T, train=True)
    assert [x[0] for x in launches] == ["recurrence_forward", *step * T]
    variants = {x[1] for x in launches}
# One forward saves states and the other the inputs of the halves; the matrices of products have three shapes.
for B, longest in ((1, 1), (1, 20), (1, 64), (7, 50), (2048, 3), (70_000, 1)):
    launches = recurrence_call(torch.full((B,), longest), longest, train=True)
    assert [x[0] for x in launches] == ["recurrence_forward", *step], launches
    tiles = most_tiles(B, B * longest, longest)
    ours = ("recurrence_forward", "feed_half_backward", "attention_half_backward")
    assert {int(x[2]) for x in launches if x[0] in ours} == {tiles}, (B, longest, launches)
    assert {x[1] for x in launches} <= variants, "the sizes compiled a variant"


def tuned(op, choice, expected, call):
    """Check that ``call`` launches each kernel with the threads in ``choice``, and other kernels with their usual threads."""
    before = [int(x[4]) for x in call()]
    with tuning.forced(op, choice):
        launches = call()
    assert [x[0] for x in launches] == list(expected), launches
    for x, threads in zip(launches, before, strict=True):
        assert int(x[4]) == 32 * choice.kernels[x[0]][0] if x[0] in choice.kernels else threads, launches
    return launches


length = torch.tensor([100])
every = {"attention_forward": (4, 2), "attention_backward_query": (1, 3)}
for rows in (16, 64):
    launches = tuned("attention", _launch.Choice(rows, every), names, lambda: call(1, 100, length))
    assert {int(x[2]) for x in launches} == {H * -(-100 // rows)}, launches
catalog_kernels = dict.fromkeys(tuning.KERNELS["linear_cross_entropy"][0], (4, 3))
order = ["target_score", "softmax_forward", "target_score", "softmax_backward_hidden", "softmax_backward_items"]
launches = tuned("linear_cross_entropy", _launch.Choice(16, catalog_kernels), order, lambda: catalog_call(100, 50))
assert int(launches[-1][2]) == -(-50 // 16)
few = {"recurrence_forward": (8, 2), "weight_gradient": (1, 1)}
launches = tuned(
    "recurrence", _launch.Choice(128, few), ["recurrence_forward", *step],
    lambda: recurrence_call(torch.full((40,), 20), 20, train=True),
)  # fmt: skip
assert int(launches[0][2]) == most_tiles(40, 800, 128), launches


# The short way gives a kernel what Triton gives it, except for the hooks of profilers.
given, original = [], CompiledKernel.run


def recorded_run(compiled):
    def recorded(*arguments):
        given.append([x.data_ptr() if isinstance(x, torch.Tensor) else x for x in arguments])
        return original.fget(compiled)(*arguments)

    return recorded


CompiledKernel.run = property(recorded_run)
_launch._ran.clear()
x = {dtype: torch.ones(64, 64, dtype=dtype) for dtype in (torch.float32, torch.bfloat16)}
slots, depth = torch.zeros(1, 5000), torch.ones(64, dtype=torch.int64)
for dtype, place, rows in ((torch.float32, 0, 32), (torch.bfloat16, 16, 64), (torch.float32, 2**31, 2**40)):
    arguments = (x[dtype], x[dtype], depth, slots, place, -1, 64, 3, slots.stride(0), rows)
    for _ in range(2):
        constants = {"M": 64, "N": 64, "STRIDE": 64, "warps": 4, "maxnreg": 255}
        _launch.launch(_recurrence_backward.weight_gradient, 1, *arguments, **constants)
    usual, short = given
    given.clear()
    assert [*usual[:6], *usual[9:]] == [*short[:6], *short[9:]], (usual, short)
    assert short[6:9] == [None] * 3
assert len([way for way in _launch._ran.values() if way is not None]) == 3
CompiledKernel.run = original

print("launched as planned")
