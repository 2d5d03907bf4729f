"""Launch kernels with Triton's own launcher on a libcuda that needs no GPU. test_stub.py imports this in a separate process."""

import os

import torch
from lares_fast.kernels import _launch, _recurrence_weights
from triton.compiler import CompiledKernel

from lares_fast import ops
from lares_fast._errors import BackendError
from lares_fast._random import Draw
from lares_fast.ops import _triton
from lares_fast.ops._pack import pack
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


def pack_call(S, P, B):
    """Return the launches of one batch that is packed from a log."""
    open(LOG, "w").close()
    pack(torch.ones(300, dtype=torch.int32), torch.zeros(S, dtype=torch.int64), torch.arange(S + 1), P, B)
    return [line.split() for line in open(LOG).read().splitlines()]


variants = set()
for S, P, B in ((1, 1, 1), (257, 5000, 13), (70_000, 600_000, 1024)):
    ((name, variant, programs, *_),) = pack_call(S, P, B)
    assert (name, int(programs)) == ("pack", -(-P // 256) + -(-B // 256))
    variants.add(variant)
assert len(variants) == 1, "a size compiled a variant"


def catalog_call(M, N, D=64, J=()):
    """Return the launches of one forward with rank and one backward."""
    open(LOG, "w").close()
    hidden, items = (torch.zeros(*J, n, D, dtype=torch.bfloat16, requires_grad=True) for n in (M, N))
    logprob, _ = ops.target_logprob_and_rank(hidden, items, torch.zeros(*J, M, dtype=torch.int64), backend="triton")
    logprob.sum().backward()
    return [line.split() for line in open(LOG).read().splitlines()]


def catalog_launches(M, N, J=1, S=32, D=64):
    """Return the expected (kernel, programs) of :func:`catalog_call`."""
    rows, tiles = -(-M // S), -(-N // S)
    most = max(1, min(tiles // 8, 1024 // (J * rows)))
    parts = -(-tiles // -(-tiles // most))
    merge = [("merge_gradients", J * -(-M * D // 256))] if parts > 1 else []
    return [
        ("softmax_forward", J * rows * parts), ("merge_sums", J * -(-M // 16)), ("prepare_backward", J * rows),
        ("softmax_backward_hidden", J * rows * parts), *merge, ("softmax_backward_items", J * tiles),
    ]  # fmt: skip


variants = set()
for M, N, J in ((1, 1, 1), (1, 12_101, 1), (7, 33, 1), (2048, 12_101, 1), (70_000, 31, 1), (1024, 1024, 4), (20, 700, 2)):
    launches = catalog_call(M, N, J=(J,) if J > 1 else ())
    assert [(x[0], int(x[2])) for x in launches] == catalog_launches(M, N, J), (M, N, J, launches)
    variants |= {x[1] for x in launches}
# The gradient of the rows is stored as one part of several in fp32, or as it is.
assert len(variants) == 7, "the sizes compiled variants"
# Without rows, the gradient of the items is still written.
assert [x[0] for x in catalog_call(0, 100)] == ["softmax_backward_items"]


def recurrence_call(lengths, longest, depth=1, train=False, dtype=torch.bfloat16, **how):
    """Return the launches of one call of two layers; with ``train`` also of its backward."""
    open(LOG, "w").close()
    D, offsets = 64, torch.cat((torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)))
    layer = [*[(D, D), (D,)] * 4, (D,), (D,), (D, D), (D,), (D, D), (D,), (D,), (D,)]
    weights = [torch.zeros(shape, dtype=dtype, requires_grad=train) for shape in [(D,)] * 2 + layer * 2]
    h = torch.zeros(int(offsets[-1]), D, dtype=dtype)
    draw = Draw((1, 2), torch.arange(len(lengths))) if train else None
    how |= {"draw": draw, "dropout": 0.2, "longest": longest, "backend": "triton"}
    out = ops.recurrence(h, offsets, weights, n_heads=2, pre=h, depth=depth, **how)
    if train:
        out.backward(torch.zeros_like(out))
    return [line.split() for line in open(LOG).read().splitlines()]


def most_tiles(B, P, longest):
    return min(B, 2 * (P + 4 * B) // (64 if longest <= 64 else 128) + -(-B // 128))


forward = ["plan", "recurrence_forward"]
variants = set()
for longest in range(1, 129):
    launches = recurrence_call(torch.full((3,), longest), longest)
    assert [x[0] for x in launches] == forward, launches
    assert [int(x[2]) for x in launches] == [1, most_tiles(3, 3 * longest, longest)], (longest, launches)
    variants |= {x[1] for x in launches}
# There are tiles of 64 and of 128 rows.
assert len(variants) == 4, variants
for B in (1, 7, 2048, 70_000):
    launches = recurrence_call(torch.full((B,), 3), 20, depth=4)
    assert [int(x[2]) for x in launches] == [1, most_tiles(B, 3 * B, 20)], B
    variants |= {x[1] for x in launches}
# A depth for each sequence and a bound on depths compile nothing.
variants |= {x[1] for x in recurrence_call(torch.tensor([5, 7]), 7, torch.tensor([1, 2]), deepest=1000)}
assert len(variants) == 4, "the batch compiled a variant"
for longest in (129, 200):
    try:
        recurrence_call(torch.full((2,), longest), longest)
    except BackendError as error:
        assert f"sequences of up to 128 rows in torch.bfloat16, and longest is {longest}" in str(error)
    else:
        raise AssertionError(longest)
assert recurrence_call(torch.zeros(0, dtype=torch.int64), 5, train=True) == []

step = ["step_backward", "weight_gradients"]
for T in (1, 5):
    launches = recurrence_call(torch.tensor([5, 7]), 7, T, train=True)
    assert [x[0] for x in launches] == [*forward, *step * T, "collect_gradients"]
    variants = {x[1] for x in launches}
assert len(variants) == 5
for B, longest in ((1, 1), (1, 20), (1, 64), (7, 50), (2048, 3), (70_000, 1)):
    launches = recurrence_call(torch.full((B,), longest), longest, train=True)
    assert [x[0] for x in launches] == [*forward, *step, "collect_gradients"], launches
    programs = {x[0]: int(x[2]) for x in launches}
    tiles = most_tiles(B, B * longest, longest)
    assert programs["recurrence_forward"] == programs["step_backward"] == tiles, (B, longest, launches)
    # A layer has 6 matrices, each with one tile of its gradient.
    assert programs["weight_gradients"] == 12 * min(-(-B * longest // 128), -(-1024 // 12)), (B, longest, launches)
    assert {x[1] for x in launches} <= variants, "the sizes compiled a variant"
# Products in bf16 have as many warps for tensors in fp32 as for tensors in bf16.
plain, rounded = (
    {x[0]: int(x[4]) for x in recurrence_call(torch.tensor([5, 7]), 7, train=True, dtype=dtype, bf16=dtype == torch.float32)}
    for dtype in (torch.bfloat16, torch.float32)
)
assert plain == rounded, (plain, rounded)


def packed_call(P, S, D=64, L=20, p=0.2, dtype=torch.float32):
    """Return the launches of h0, and of one forward and backward of the embedding, of S sequences of equal lengths."""
    open(LOG, "w").close()
    offsets = P // max(1, S) * torch.arange(S + 1)
    draw = Draw(torch.tensor([7]), torch.arange(S))
    ops.initial_state(draw, offsets, P, D, backend="triton")
    tables = [torch.zeros(size, dtype=dtype, requires_grad=True) for size in ((100, D), (L, D), (D,), (D,))]
    items = torch.ones(P, dtype=torch.int64)
    ops.embedding(items, offsets, *tables, draw=draw, dropout=p, backend="triton").sum().backward()
    return [line.split() for line in open(LOG).read().splitlines()]


packed_names = ["initial_state", "embedding_forward", "embedding_backward_rows", "embedding_backward_sums"]
variants = set()
for P, S in ((1, 1), (7, 7), (33, 3), (20_480, 1024), (70_000, 70_000)):
    launches = packed_call(P, S)
    tiles = -(-P // 32)
    parts = -(-tiles // -(-tiles // 512))
    assert [x[0] for x in launches] == packed_names, launches
    assert [int(x[2]) for x in launches] == [tiles, tiles, parts, 22 * 4], (P, launches)
    variants |= {x[1] for x in launches}
assert len(variants) == len(packed_names), "the sizes compiled variants"
for L in (1, 300):
    *_, sums = packed_call(3, 3, L=L)
    assert sums[1] in variants, "the number of positions compiled a variant"
    assert int(sums[2]) == 4 * (L + 2)
assert [x[0] for x in packed_call(40, 2, 100, p=0.0, dtype=torch.bfloat16)] == packed_names
# Without rows, the gradients of the positions and of the norm are still written.
assert [x[0] for x in packed_call(0, 0)] == packed_names[3:]


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
order = [name for name, _ in catalog_launches(100, 50, S=16)]
launches = tuned("linear_cross_entropy", _launch.Choice(16, catalog_kernels), order, lambda: catalog_call(100, 50))
assert int(launches[-1][2]) == -(-50 // 16)
few = {"recurrence_forward": (8, 2), "weight_gradients": (1, 1)}
launches = tuned(
    "recurrence", _launch.Choice(128, few), [*forward, *step, "collect_gradients"],
    lambda: recurrence_call(torch.full((40,), 20), 20, train=True),
)  # fmt: skip
assert int(launches[1][2]) == most_tiles(40, 800, 128), launches


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
    arguments = (x[dtype], depth, depth, slots, 64, place, -1, 1, rows, 3, slots.stride(0))
    for _ in range(2):
        constants = {"D": 64, "INNER": 64, "warps": 4, "maxnreg": 255}
        _launch.launch(_recurrence_weights.weight_gradients, 1, *arguments, **constants)
    usual, short = given
    given.clear()
    assert [*usual[:6], *usual[9:]] == [*short[:6], *short[9:]], (usual, short)
    assert short[6:9] == [None] * 3
assert len([way for way in _launch._ran.values() if way is not None]) == 3
CompiledKernel.run = original

print("launched as planned")
