"""``ops.attention``: tolerances of the result and every gradient, dropout, what compilers need, and errors.

The Triton kernels run in the interpreter (``-m interpreted``), which checks every address and fills new outputs with NaN.
"""

import pytest
import torch
from torch.nn import functional as F

from lares_fast import _dispatch, explain, ops, reference
from lares_fast._errors import BackendError, InputError
from lares_fast._random import Draw
from lares_fast.ops.attention import build_call
from lares_fast.reference.attention import packed_logsumexp
from tests.support import oracle
from tests.support.fake_device import NoScalarReads

KEY = (5, 2**32 - 7)
STEP, LAYER = 3, 1

# lengths, H, D/H, dtype, dropout. These are pairs and not all combinations; 63..65 and 128 are near the edges of tiles.
CASES = [
    ([1], 1, 16, torch.float32, 0.2),
    ([2, 0, 20], 2, 16, torch.float32, 0.0),
    ([49, 50], 1, 32, torch.float32, 0.2),
    ([63, 1], 1, 64, torch.float32, 0.5),
    ([64], 1, 24, torch.float32, 0.2),
    ([65, 2], 1, 64, torch.float32, 0.0),
    ([128], 1, 32, torch.float32, 0.2),
    ([20], 1, 128, torch.float32, 0.2),
    ([1, 2, 20], 2, 16, torch.bfloat16, 0.2),
    ([50, 63], 1, 64, torch.bfloat16, 0.2),
    ([64, 0], 1, 40, torch.bfloat16, 0.0),
    ([49], 1, 128, torch.bfloat16, 0.2),
    ([65], 2, 32, torch.bfloat16, 0.5),
    ([128], 1, 64, torch.bfloat16, 0.0),
    ([20, 50, 3], 1, 32, torch.float16, 0.2),
    ([65], 1, 16, torch.float16, 0.0),
    ([64, 63], 1, 64, torch.float16, 0.2),
]  # fmt: skip
NAMES = [f"{lengths} H{H} E{E} {str(dtype)[6:]} p{p}" for lengths, H, E, dtype, p in CASES]


def offsets_of(lengths):
    return torch.tensor([0, *lengths]).cumsum(0)


def inputs_of(lengths, H, E, dtype):
    """Return query, key, value and an upstream gradient that is not uniform."""
    return [torch.randn(sum(lengths), H, E).to(dtype) for _ in range(4)]


def draw_of(lengths):
    return Draw(KEY, torch.arange(len(lengths)) + 70_000)


def differentiate(call, inputs, dtype=None):
    """Return {out}, {dq, dk, dv} of ``call(query, key, value)`` on copies in ``dtype``."""
    *leaves, grad = (x.detach().to(dtype or x.dtype, copy=True) for x in inputs)
    for leaf in leaves:
        leaf.requires_grad_()
    out = call(*leaves)
    out.backward(grad)
    gradients = zip(("dq", "dk", "dv"), leaves, strict=True)
    return {"out": out.detach()}, {name: leaf.grad for name, leaf in gradients}


def check(lengths, H, E, dtype, p, backend, prepare=lambda x: x):
    """Check that ``backend`` stays within the tolerances; return its results."""
    inputs = inputs_of(lengths, H, E, dtype)
    where = offsets_of(lengths), max(lengths)
    how = {"draw": draw_of(lengths), "dropout": p, "step": STEP, "layer": LAYER}
    expected = lambda *x: reference.packed_attention(*x, *where, **how)  # noqa: E731
    truth, twin = differentiate(expected, inputs, torch.float64), differentiate(expected, inputs)
    prepared = lambda *x: ops.attention(*map(prepare, x), *where, **how, backend=backend)  # noqa: E731
    result = differentiate(prepared, inputs)
    for kind, *three in zip(("forward", "gradient"), result, twin, truth, strict=True):
        oracle.check(kind, *three)
    return result


@pytest.mark.parametrize("case", CASES, ids=NAMES)
def test_reference(case):
    check(*case, "reference")


@pytest.mark.interpreted
@pytest.mark.parametrize("case", CASES, ids=NAMES)
def test_triton(case, monkeypatch):
    from tests.support import triton_interpreter

    with triton_interpreter.interpreted(monkeypatch) as memory:
        check(*case, "triton")
    assert memory.launches == 3


@pytest.mark.interpreted
def test_triton_takes_any_strides_and_leaves_the_surroundings_alone(monkeypatch):
    from tests.support import triton_interpreter

    checks = []

    def guarded(x):
        inner, untouched = triton_interpreter.between_guards(x)
        checks.append(untouched)
        return x + (inner - x).detach()

    def strided(x):
        return torch.stack((x, x), dim=-1)[..., 1]

    def off_by_an_element(x):
        return torch.cat((x.new_zeros(1), x.flatten()))[1:].view_as(x)

    with triton_interpreter.interpreted(monkeypatch):
        for prepare in (guarded, strided, off_by_an_element):
            check([33, 20], 2, 16, torch.float32, 0.2, "triton", prepare)
    assert len(checks) == 3
    assert all(untouched() for untouched in checks)


@pytest.mark.interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_order_of_programs_changes_no_bit(dtype, monkeypatch):
    from tests.support import triton_interpreter

    def bits(order):
        torch.manual_seed(1)
        with triton_interpreter.interpreted(monkeypatch, order):
            return check([40, 20, 33], 2, 16, dtype, 0.2, "triton")

    first = bits(None)
    for order in (lambda n: range(n - 1, -1, -1), lambda n: torch.randperm(n).tolist()):
        for mine, other in zip(first, bits(order), strict=True):
            assert all(torch.equal(mine[name], other[name]) for name in mine)


@pytest.mark.interpreted
def test_the_saved_statistics_are_shared_by_backends(monkeypatch):
    """A backward may run on another backend than its forward."""
    from tests.support import triton_interpreter

    query, key, value, _ = inputs_of([40, 20], 2, 16, torch.float32)
    arguments = (query, key, value, offsets_of([40, 20]), 40)
    with triton_interpreter.interpreted(monkeypatch):
        _, lse = torch.ops.lares_fast.attention(*build_call(*arguments, backend="triton").arguments())
    _, expected = torch.ops.lares_fast.attention(*build_call(*arguments, backend="reference").arguments())
    truth = packed_logsumexp(query.double(), key.double(), offsets_of([40, 20]), 40)
    oracle.check("forward", {"lse": lse}, {"lse": expected}, {"lse": truth})


PLANTED = {
    "wrong mask column": ("_tiles", "key[None, :] <= query[:, None]", "key[None, :] <= query[:, None] + 1"),
    "unwritten tile": ("attention", "* H * tiles if P else 0", "* H * tiles - 1 if P else 0"),
    "off-by-one offset": ("attention", "start, first, tl.where(valid", "start, first + 1, tl.where(valid"),
    "off-by-one length": ("attention", "lse, mask=row < length", "lse, mask=row <= length"),
    "wrong dropout site": ("_random", "_SITE_ATTENTION = tl.constexpr(3)", "_SITE_ATTENTION = tl.constexpr(2)"),
    "wrong dropout place": ("attention", "head, begin, start, S)", "head, start, begin, S)"),
    "sum not rescaled": ("attention", "total = total * shrink +", "total = total +"),
    "keys' gradient unscaled": ("attention", "dk * (scale / LOG2E)", "dk"),
    "dropped weights in dV forgotten": ("attention", "weight = p * factor", "weight = p"),
}


@pytest.mark.interpreted
@pytest.mark.parametrize("bug", PLANTED)
def test_a_planted_bug_is_caught(bug, monkeypatch, tmp_path):
    from triton.runtime.errors import InterpreterError

    from tests.support import triton_interpreter

    triton_interpreter.plant(monkeypatch, tmp_path, ("_random", "_tiles", "attention"), *PLANTED[bug])
    with triton_interpreter.interpreted(monkeypatch), pytest.raises((AssertionError, InterpreterError)):
        check([20, 60], 1, 16, torch.float32, 0.2, "triton")


@pytest.mark.interpreted
def test_no_rows_launch_nothing(monkeypatch):
    from tests.support import triton_interpreter

    with triton_interpreter.interpreted(monkeypatch) as memory:
        for lengths in ([], [0, 0]):
            query = torch.empty(0, 2, 16, requires_grad=True)
            out = ops.attention(query, query, query, offsets_of(lengths), 5, backend="triton")
            out.sum().backward()
            assert out.shape == query.grad.shape == (0, 2, 16)
    assert memory.launches == 0


@pytest.mark.interpreted
def test_triton_never_waits_for_the_device(monkeypatch):
    from tests.support import triton_interpreter

    *tensors, grad = inputs_of([20, 3], 1, 16, torch.float32)
    call = build_call(*tensors, offsets_of([20, 3]), 20, draw=Draw(KEY, torch.arange(2)), dropout=0.2)
    with triton_interpreter.interpreted(monkeypatch), NoScalarReads():
        out, lse = _dispatch.run("attention", "triton", call)
        _dispatch.run("attention", "triton", call, (out, lse, grad))


def test_the_reference_is_attention_of_each_sequence():
    lengths = [7, 0, 1, 12]
    query, key, value, _ = inputs_of(lengths, 3, 8, torch.float64)
    parts = zip(*(x.transpose(0, 1).split(lengths, dim=1) for x in (query, key, value)), strict=True)
    expected = torch.cat([F.scaled_dot_product_attention(*part, is_causal=True) for part in parts], dim=1).transpose(0, 1)
    torch.testing.assert_close(ops.attention(query, key, value, offsets_of(lengths), 12), expected)


def test_packing_changes_no_dropped_probability():
    """A sequence has the masks of its row in any padded batch."""
    lengths, H, E = [5, 9], 2, 8
    query, key, value, _ = inputs_of(lengths, H, E, torch.float64)
    draw = draw_of(lengths)
    packed = ops.attention(query, key, value, offsets_of(lengths), 9, draw=draw, dropout=0.5, step=STEP, layer=LAYER)
    for b, (q, k, v) in enumerate(zip(*(x.split(lengths) for x in (query, key, value)), strict=True)):
        one = Draw(KEY, draw.rows[b : b + 1])
        mask = reference.attention_mask(torch.ones(1, lengths[b]), torch.float64)
        q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
        alone = reference.attention(q, k, v, mask, draw=one, dropout=0.5, step=STEP, layer=LAYER)
        torch.testing.assert_close(packed.split(lengths)[b], alone[0].transpose(0, 1))


def test_gradients_of_the_reference_by_finite_differences():
    inputs = [x.requires_grad_() for x in inputs_of([3, 0, 2], 2, 4, torch.float64)[:3]]
    call = lambda *x: ops.attention(*x, offsets_of([3, 0, 2]), 3, draw=draw_of([3, 0, 2]), dropout=0.3)  # noqa: E731
    assert torch.autograd.gradcheck(call, inputs)


def test_opcheck_and_compile():
    query, key, value, grad = (x.requires_grad_() for x in inputs_of([4, 2], 2, 16, torch.float32))
    offsets, rows = offsets_of([4, 2]), torch.arange(2)
    call = build_call(query, key, value, offsets, 4, draw=Draw(KEY, rows), dropout=0.2, step=1, backend="reference")
    arguments = call.arguments()
    torch.library.opcheck(torch.ops.lares_fast.attention, arguments)
    out, lse = (x.detach() for x in torch.ops.lares_fast.attention(*arguments))
    plain = (*(x.detach() for x in (query, key, value)), *arguments[3:], out, lse, grad.detach())
    torch.library.opcheck(torch.ops.lares_fast.attention_backward, plain)

    def step(*x):
        return ops.attention(*x, offsets, 4, draw=Draw(KEY, rows), dropout=0.2) * 2

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    eager, traced = (differentiate(f, (query, key, value, grad)) for f in (step, compiled))
    for mine, other in zip(eager, traced, strict=True):
        assert all(torch.equal(mine[name], other[name]) for name in mine)


def test_is_differentiated_once():
    query = torch.randn(3, 1, 16, requires_grad=True)
    out = ops.attention(query, query, query, offsets_of([3]), 3)
    (gradient,) = torch.autograd.grad(out.square().sum(), query, create_graph=True)
    with pytest.raises(NotImplementedError, match="attention can be differentiated once"):
        gradient.sum().backward()


@pytest.mark.parametrize(("change", "message"), [
    ({"query": torch.ones(6, 32)}, "query must be a floating-point"),
    ({"query": torch.ones(6, 2, 16, dtype=torch.int32)}, "query must be a floating-point"),
    ({"key": torch.ones(5, 2, 16)}, "key must be torch.float32"),
    ({"value": torch.ones(6, 2, 16).double()}, "value must be torch.float32"),
    ({"offsets": torch.tensor([0, 6], dtype=torch.int32)}, r"offsets must be \[B \+ 1\] int64"),
    ({"offsets": torch.tensor([0, 5])}, "offsets must rise from 0 to 6"),
    ({"offsets": torch.tensor([0, 4, 3, 6])}, "offsets must rise from 0 to 6"),
    ({"offsets": torch.tensor([1, 6])}, "offsets must rise from 0 to 6"),
    ({"longest": 5}, "by at most longest = 5"),
    ({"longest": 0}, "longest must be at least 1"),
    ({"dropout": 1.0}, "dropout must be at least 0 and less than 1"),
    ({"draw": Draw(KEY, torch.arange(2))}, r"draw.rows must be torch.int64 \[1\]"),
    ({"backend": "fast"}, "backend must be one of"),
])  # fmt: skip
def test_bad_arguments(change, message):
    query = torch.ones(6, 2, 16)
    arguments = {"query": query, "key": query, "value": query, "offsets": offsets_of([6]), "longest": 6, **change}
    with pytest.raises(InputError, match=message):
        ops.attention(**arguments)


@pytest.mark.parametrize(("query", "longest", "reason"), [
    (torch.ones(6, 2, 16), 6, "it runs on an NVIDIA GPU, and the tensors are on cpu"),
    (torch.ones(6, 2, 16).double(), 6, "it takes float32, float16 and bfloat16, and query is torch.float64"),
    (torch.ones(6, 2, 12), 6, "it takes heads of 16 to 128 columns, a multiple of 8, and they have 12"),
    (torch.ones(6, 2, 16), 513, "it takes sequences of up to 512 rows, and longest is 513"),
])  # fmt: skip
def test_triton_says_why_not(query, longest, reason):
    arguments = (query, query, query, offsets_of([6]), longest)
    before = _dispatch.calls["attention", "triton"]
    assert f"triton     cannot run: {reason}" in explain("attention", *arguments)
    with pytest.raises(BackendError, match=reason):
        ops.attention(*arguments, backend="triton")
    ops.attention(*arguments)
    assert _dispatch.calls["attention", "triton"] == before


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("gap", [1e3, 1e4, 2e4])
def test_the_future_stays_hidden_however_far_scores_lie_apart(gap, dtype):
    """The first row sees itself alone, though its score for the second row is higher by ``gap``."""
    root = gap**0.5
    query = torch.full((2, 1, 16), root / 4, dtype=dtype)
    key = torch.stack([-query[0], query[0]])
    value = torch.tensor([1.0, 9.0], dtype=dtype)[:, None, None].expand(2, 1, 16).contiguous()
    leaves = [x.requires_grad_() for x in (query, key, value)]
    out = ops.attention(*leaves, torch.tensor([0, 2]), 2, backend="reference")
    assert out[:, 0, 0].tolist() == [1.0, 9.0]
    d_value = torch.autograd.grad(out[0].sum(), leaves)[2]
    assert d_value[:, 0, 0].tolist() == [1.0, 0.0]


def test_scores_that_fp16_cannot_hold():
    """Each of 128 products of 30 is far below fp16's largest number, and their sum is above it."""
    query = torch.full((3, 1, 128), 30.0, dtype=torch.float16)
    value = torch.arange(3, dtype=torch.float16)[:, None, None].expand(3, 1, 128).contiguous()
    leaves = [x.clone().requires_grad_() for x in (query, query, value)]
    out = ops.attention(*leaves, torch.tensor([0, 3]), 3, backend="reference")
    assert out[:, 0, 0].tolist() == [0.0, 0.5, 1.0]
    assert all(x.isfinite().all() for x in torch.autograd.grad(out.sum(), leaves))


def test_memory_is_taken_for_the_lengths_there_are():
    """Memory is not taken for sequences of the length ``longest``, whose scores would fill any memory."""
    query, key, value, _ = inputs_of([3, 1], 2, 16, torch.float32)
    out, wide = (ops.attention(query, key, value, offsets_of([3, 1]), longest) for longest in (3, 2**31))
    assert torch.equal(out, wide)


@pytest.mark.parametrize("name", ["step", "layer"])
@pytest.mark.parametrize("value", [-1, 2**16])
def test_an_address_that_has_no_room(name, value):
    query, key, value_, _ = inputs_of([3], 2, 16, torch.float32)
    with pytest.raises(InputError, match=rf"{name} must be in 0\.\.65535"):
        ops.attention(query, key, value_, offsets_of([3]), 3, **{name: value})
