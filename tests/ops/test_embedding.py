"""``ops.embedding``: tolerances of the result and every gradient, dropout, launches, what compilers need, and errors.

The Triton kernels run in the interpreter (``-m interpreted``), which checks every address and fills new outputs with NaN.
"""

import itertools

import pytest
import torch
from torch.nn import functional as F

from lares_fast import _dispatch, explain, ops, reference
from lares_fast._errors import BackendError, InputError
from lares_fast._random import SITE_INPUT, Draw, keep_hidden, seed_of
from lares_fast.ops._embedding_call import EmbeddingCall
from lares_fast.ops.embedding import build_call
from tests.support import oracle
from tests.support.catalog_cases import needs_native
from tests.support.fake_device import NoScalarReads
from tests.support.launches import counted

KEY = (5, 2**32 - 7)
N = 41
NAMES = ("item_table", "position_table", "weight", "bias")

# lengths, L, D, dtype, dropout. These are pairs and not all combinations; a tile has 32 rows of 64 columns.
CASES = [
    ([1], 1, 64, torch.float32, 0.2),
    ([1, 1, 1], 1, 64, torch.float32, 0.0),
    ([20, 0, 11, 1], 20, 64, torch.float32, 0.5),
    ([20, 12], 20, 128, torch.float32, 0.2),
    ([33], 50, 64, torch.float32, 0.0),
    ([7, 20, 3], 20, 48, torch.float32, 0.2),
    ([9, 1], 20, 100, torch.float32, 0.2),
    ([5, 4], 5, 256, torch.float32, 0.2),
    ([3, 2], 300, 7, torch.float32, 0.2),
    ([20, 1, 12], 20, 64, torch.bfloat16, 0.2),
    ([20, 13], 20, 128, torch.bfloat16, 0.0),
    ([4, 9], 20, 64, torch.float16, 0.2),
]
IDS = [f"{lengths} L{L} D{D} {str(dtype)[6:]} p{p}" for lengths, L, D, dtype, p in CASES]


def offsets_of(lengths):
    return torch.tensor([0, *lengths]).cumsum(0)


def items_of(rows):
    """Return items that repeat, in no order."""
    return 1 + torch.arange(rows) * 17 % 23 * 11 % (N - 1)


def draw_of(lengths):
    return Draw(KEY, torch.arange(len(lengths)) + 70_000)


def leaves_of(L, D, dtype):
    """Return the tables, the weight and the bias."""
    return [torch.randn(shape).to(dtype) for shape in ((N, D), (L, D), (D,), (D,))]


def differentiate(call, leaves, grad, dtype=None):
    """Return {out} and the gradients by name of ``call(*leaves)`` on copies in ``dtype``."""
    leaves = [x.detach().to(dtype or x.dtype, copy=True).requires_grad_() for x in leaves]
    out = call(*leaves)
    out.backward(grad.to(out.dtype))
    return {"out": out.detach()}, {name: leaf.grad for name, leaf in zip(NAMES, leaves, strict=True)}


def check(lengths, L, D, dtype, p, backend, prepare=lambda x: x):
    """Check that ``backend`` stays within the tolerances; return its results."""
    where = items_of(sum(lengths)), offsets_of(lengths)
    leaves, grad = leaves_of(L, D, dtype), torch.randn(sum(lengths), D).to(dtype)
    how = {"draw": draw_of(lengths), "dropout": p}
    expected = lambda *x: reference.embedding(*where, *x, **how)  # noqa: E731
    truth, twin = differentiate(expected, leaves, grad, torch.float64), differentiate(expected, leaves, grad)
    result = differentiate(lambda *x: ops.embedding(*where, *map(prepare, x), **how, backend=backend), leaves, grad)
    for kind, *three in zip(("forward", "gradient"), result, twin, truth, strict=True):
        oracle.check(kind, *three)
    return result


@pytest.mark.parametrize("case", CASES, ids=IDS)
@pytest.mark.parametrize("backend", ["reference", pytest.param("native", marks=needs_native)])
def test_torch(case, backend):
    check(*case, backend)


@pytest.mark.interpreted
@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_triton(case, monkeypatch):
    from tests.support import triton_interpreter

    with triton_interpreter.interpreted(monkeypatch) as memory:
        check(*case, "triton")
    assert memory.launches == 3


@pytest.mark.interpreted
def test_many_rows_share_few_programs(monkeypatch):
    """A program of the backward has several tiles, and the last program has fewer; two loads cover all partial sums."""
    from lares_fast.kernels import embedding as kernels

    from tests.support import triton_interpreter

    monkeypatch.setattr(kernels, "MOST_PARTS", 3)
    monkeypatch.setattr(kernels, "SUMMED", 2)
    with triton_interpreter.interpreted(monkeypatch):
        check([20, 20, 20, 20, 20, 20, 20, 1, 20, 20, 0, 7], 20, 64, torch.float32, 0.2, "triton")


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
            check([20, 13], 20, 64, torch.float32, 0.2, "triton", prepare)
    assert len(checks) == 4
    assert all(untouched() for untouched in checks)


@pytest.mark.interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_order_of_programs_changes_no_bit(dtype, monkeypatch):
    from tests.support import triton_interpreter

    def bits(order):
        torch.manual_seed(1)
        with triton_interpreter.interpreted(monkeypatch, order):
            return check([20, 9, 20, 20], 20, 64, dtype, 0.2, "triton")

    first = bits(None)
    for order in (lambda n: range(n - 1, -1, -1), lambda n: torch.randperm(n).tolist()):
        for mine, other in zip(first, bits(order), strict=True):
            assert all(torch.equal(mine[name], other[name]) for name in mine)


# Kernel file, source, and the wrong source.
PLANTED = {
    "wrong dropout site": ("embedding", "_SITE_INPUT = tl.constexpr(0)", "_SITE_INPUT = tl.constexpr(1)"),
    "wrong column of the mask": ("_random", "(keep, (0, 1, 5, 4, 2, 3))", "(keep, (0, 1, 4, 5, 2, 3))"),
    "position of the batch": ("_packed", "position = row - begin", "position = row - tl.load(OFFSETS)"),
    "search ends early": ("_packed", "return max(0, sequences - 1).bit_length()", "return max(0, sequences - 2).bit_length()"),
    "not centred": ("embedding", "x -= (tl.sum(x, 1) / D)[:, None]\n    x = tl", "x = tl"),
    "empty columns counted": ("embedding", "x = tl.where(inside, x, 0.0)", "x = x"),
    "gradient's mean forgotten": ("embedding", "dx -= (tl.sum(dx, 1) / D)[:, None] + x", "dx -= x"),
    "gradient's slope forgotten": ("embedding", "+ x * (tl.sum(dx * x, 1) / D)[:, None]", ""),
    "gradient not dropped": ("embedding", "dout *= _dropout_factor", "dout += 0 * _dropout_factor"),
    "last tile lost": ("embedding", "for tile in range(tiles)", "for tile in range(tiles - 1)"),
    "last position lost": ("embedding", "(L + 2) * cdiv(D, COLUMNS)", "(L + 1) * cdiv(D, COLUMNS)"),
    "next sequence counted": ("embedding", "(row < tl.load(OFFSETS + sequence + 1,", "(row <= tl.load(OFFSETS + sequence + 1,"),
    "wrong item": ("embedding", "tl.store(PLACES + row, item,", "tl.store(PLACES + row, item * 0 + 1,"),
}


@pytest.mark.interpreted
@pytest.mark.parametrize("bug", PLANTED)
def test_a_planted_bug_is_caught(bug, monkeypatch, tmp_path):
    from triton.runtime.errors import InterpreterError

    from tests.support import triton_interpreter

    triton_interpreter.plant(monkeypatch, tmp_path, ("_random", "_packed", "embedding"), *PLANTED[bug])
    with triton_interpreter.interpreted(monkeypatch), pytest.raises((AssertionError, InterpreterError)):
        check([11, 20, 9], 20, 40, torch.float32, 0.2, "triton")


@pytest.mark.interpreted
def test_no_rows_launch_nothing_in_the_forward(monkeypatch):
    from tests.support import triton_interpreter

    with triton_interpreter.interpreted(monkeypatch) as memory:
        for lengths in ([], [0, 0]):
            leaves = [x.requires_grad_() for x in leaves_of(5, 64, torch.float32)]
            out = ops.embedding(items_of(0), offsets_of(lengths), *leaves, backend="triton")
            launches = memory.launches
            out.sum().backward()
            assert out.shape == (0, 64)
            assert all(not leaf.grad.any() for leaf in leaves)
    assert launches == 1


@pytest.mark.interpreted
def test_triton_never_waits_for_the_device(monkeypatch):
    from tests.support import triton_interpreter

    call = call_of([20, 3])
    with triton_interpreter.interpreted(monkeypatch), NoScalarReads():
        _dispatch.run("embedding", "triton", call)
        _dispatch.run("embedding", "triton", call, torch.randn(23, 64))


def call_of(lengths, **changes):
    """Return a call with dropout, whose seed is a tensor that the caller made."""
    draw = Draw(seed_of(KEY, torch.device("cpu")), torch.arange(len(lengths)))
    how = {"draw": draw, "dropout": 0.2, **changes}
    return build_call(items_of(sum(lengths)), offsets_of(lengths), *leaves_of(20, 64, torch.float32), **how)


def test_launches():
    """The forward is one launch, and the backward is three: two kernels and one operation of PyTorch."""
    call, grad = call_of([20, 3]), torch.randn(23, 64)
    with counted() as launches:
        _dispatch.run("embedding", "triton", call)
    assert launches == {"embedding_forward": 1}
    with counted() as launches:
        _dispatch.run("embedding", "triton", call, grad)
    names = ("embedding_backward_rows", "embedding_backward_sums", "aten.embedding_dense_backward.default")
    assert launches == dict.fromkeys(names, 1)


HUGE, LOW = 2**62, -(2**63)


@pytest.mark.interpreted
@pytest.mark.parametrize("offsets", [
    [0, 5, 40, 45, 60], [3, 5, 20, 25, 40], [0, 5, 20, 25, 30], [0, 5, 20, 25, HUGE], [LOW, 5, 20, 25, 40],
    [0, 20, 5, 25, 40], [0, HUGE, LOW, -1, 40], [LOW] * 5, [HUGE] * 5, [2**63 - 1] * 5, [0] * 5, [40, 30, 20, 10, 0],
], ids=str)  # fmt: skip
def test_wrong_offsets_stay_within_the_tensors(offsets, monkeypatch):
    """Rows outside of every sequence, and at positions that are not in the table, are NaN. So are the norm's gradients.

    If an offset is below the one before, a row may be finite, because a sequence may hold it.
    """
    from tests.support import triton_interpreter

    call = call_of([5, 15, 5, 15])
    wrong = EmbeddingCall(*{**vars(call), "offsets": torch.tensor(offsets)}.values())
    with triton_interpreter.interpreted(monkeypatch):
        out, _ = _dispatch.run("embedding", "triton", wrong)
        _, _, *norm = _dispatch.run("embedding", "triton", wrong, torch.ones(40, 64))
    inside = torch.zeros(40, dtype=torch.bool)
    if offsets == sorted(offsets):
        for begin, end in itertools.pairwise(offsets):
            if end <= 40:
                inside[max(0, begin) : max(0, min(end, begin + 20))] = True
        assert out[inside].isfinite().all()
        assert out[~inside].isnan().all()
        assert not inside.all()
    for gradient in norm:
        assert gradient.isnan().all() == (~out.isfinite()).any()


@pytest.mark.interpreted
@pytest.mark.parametrize("item", [0, N, -1, HUGE, LOW])
def test_a_wrong_item_gives_a_row_of_nan(item, monkeypatch):
    from tests.support import triton_interpreter

    call = call_of([5, 15])
    right = _dispatch.run("embedding", "reference", call)[0]
    call.items[7] = item
    with triton_interpreter.interpreted(monkeypatch):
        out, _ = _dispatch.run("embedding", "triton", call)
        d_items, *others = _dispatch.run("embedding", "triton", call, torch.ones(20, 64))
    assert out[7].isnan().all()
    rest = torch.arange(20) != 7
    torch.testing.assert_close(out[rest], right[rest], rtol=1e-5, atol=1e-5)
    assert d_items[0].isnan().all() and d_items[1:].isfinite().all()
    assert others[0][2].isnan().all() and others[1].isnan().all() and others[2].isnan().all()


@pytest.mark.parametrize("backend", ["reference", pytest.param("native", marks=needs_native)])
def test_the_rows_are_those_of_the_modules(backend):
    """The masks have the bits of docs/numerics.md, and a tensor is as good a key as integers."""
    lengths, D = [7, 0, 1, 12], 64
    items, offsets = items_of(20), offsets_of(lengths)
    item_table, positions, weight, bias = leaves_of(12, D, torch.float32)
    rows = torch.arange(4) * 9
    keep = keep_hidden(KEY, 32768, site=SITE_INPUT, step=0, layer=0, rows=rows, length=12, width=D)
    expected = []
    for b, (begin, end) in enumerate(itertools.pairwise(offsets.tolist())):
        x = F.layer_norm(item_table[items[begin:end]] + positions[: end - begin], (D,), weight, bias, 1e-12)
        expected.append(2 * x * keep[b, : end - begin])
    for key in (KEY, seed_of(KEY, torch.device("cpu"))):
        how = {"draw": Draw(key, rows), "dropout": 0.5, "backend": backend}
        assert torch.equal(ops.embedding(items, offsets, item_table, positions, weight, bias, **how), torch.cat(expected))


@needs_native
def test_a_backward_may_run_on_another_backend():
    call, grad = call_of([20, 3]), torch.randn(23, 64)
    _, saved = _dispatch.run("embedding", "reference", call)
    expected = _dispatch.run("embedding", "reference", call, grad, saved)
    for other in (None, saved):
        for mine, theirs in zip(_dispatch.run("embedding", "native", call, grad, other), expected, strict=True):
            assert torch.equal(mine, theirs)


def test_gradients_of_the_reference_by_finite_differences():
    leaves = [torch.randn(shape, dtype=torch.float64).requires_grad_() for shape in ((6, 3), (4, 3), (3,), (3,))]
    where = torch.tensor([1, 5, 5, 2, 1]), offsets_of([4, 0, 1])
    call = lambda *x: ops.embedding(*where, *x, draw=draw_of([4, 0, 1]), dropout=0.3)  # noqa: E731
    assert torch.autograd.gradcheck(call, leaves)


def test_opcheck_and_compile():
    lengths = [4, 2]
    leaves, grad = [x.requires_grad_() for x in leaves_of(5, 64, torch.float32)], torch.randn(6, 64)
    where, seed = (items_of(6), offsets_of(lengths)), seed_of(KEY, torch.device("cpu"))
    call = build_call(*where, *leaves, draw=Draw(seed, torch.arange(2)), dropout=0.2, backend="reference")
    torch.library.opcheck(torch.ops.lares_fast.embedding, call.arguments())
    _, sums, factors = (x.detach() for x in torch.ops.lares_fast.embedding(*call.arguments()))
    plain = [x.detach() if isinstance(x, torch.Tensor) else x for x in call.arguments()]
    torch.library.opcheck(torch.ops.lares_fast.embedding_backward, (*plain, sums, factors, grad))

    def step(*x):
        return ops.embedding(*where, *x, draw=Draw(seed, torch.arange(2)), dropout=0.2) * 2

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    eager, traced = (differentiate(f, leaves, grad) for f in (step, compiled))
    for mine, other in zip(eager, traced, strict=True):
        assert all(torch.equal(mine[name], other[name]) for name in mine)


def test_is_differentiated_once():
    leaves = [x.requires_grad_() for x in leaves_of(3, 8, torch.float32)]
    out = ops.embedding(items_of(3), offsets_of([3]), *leaves)
    (gradient, *_) = torch.autograd.grad(out.square().sum(), leaves, create_graph=True)
    with pytest.raises(NotImplementedError, match="embedding can be differentiated once"):
        gradient.sum().backward()


@pytest.mark.parametrize(("change", "message"), [
    ({"items": torch.ones(6)}, r"items must be \[P\] int64"),
    ({"items": torch.ones(6, 1, dtype=torch.int64)}, r"items must be \[P\] int64"),
    ({"items": torch.tensor([1, 2, 0, 1, 1, 1])}, r"items must be in 1\.\.40"),
    ({"items": torch.tensor([1, 2, N, 1, 1, 1])}, r"items must be in 1\.\.40"),
    ({"offsets": torch.tensor([0, 6], dtype=torch.int32)}, r"offsets must be \[S \+ 1\] int64"),
    ({"offsets": torch.tensor([0])}, "offsets must rise from 0 to 6, the number of items, but has 1 entries"),
    ({"offsets": torch.tensor([0, 5])}, "offsets must rise from 0 to 6"),
    ({"offsets": torch.tensor([0, 4, 3, 6])}, "offsets must rise from 0 to 6"),
    ({"position_table": torch.ones(5, 8)}, "by at most 5, the rows of position_table"),
    ({"position_table": torch.ones(0, 8)}, "position_table must be .* with L at least 1"),
    ({"position_table": torch.ones(6, 7)}, "position_table must be torch.float32"),
    ({"item_table": torch.ones(N, 8, dtype=torch.int64)}, "item_table must be a floating-point"),
    ({"item_table": torch.ones(0, 8)}, "item_table must not be empty"),
    ({"weight": torch.ones(8).double()}, "weight must be torch.float32"),
    ({"bias": torch.ones(9)}, "bias must be torch.float32"),
    ({"dropout": 1.0}, "dropout must be at least 0 and less than 1"),
    ({"draw": Draw(KEY, torch.arange(2))}, r"draw.rows must be torch.int64 \[1\]"),
    ({"draw": Draw(torch.tensor([1, 2]), torch.arange(1)), "dropout": 0.1}, r"draw.key must be two integers or int64 \[1\]"),
    ({"backend": "fast"}, "backend must be one of"),
])  # fmt: skip
def test_bad_arguments(change, message):
    tables = dict(zip(NAMES, (torch.ones(N, 8), torch.ones(6, 8), torch.ones(8), torch.ones(8)), strict=True))
    with pytest.raises(InputError, match=message):
        ops.embedding(**{"items": torch.ones(6, dtype=torch.int64), "offsets": offsets_of([6]), **tables, **change})


@pytest.mark.parametrize(("D", "dtype", "reason"), [
    (64, torch.float32, "it runs on an NVIDIA GPU, and the tensors are on cpu"),
    (64, torch.float64, "it takes float32, float16 and bfloat16, and item_table is torch.float64"),
    (257, torch.float32, "it takes up to 256 columns, and item_table has 257"),
])  # fmt: skip
def test_triton_says_why_not(D, dtype, reason):
    arguments = (items_of(6), offsets_of([6]), *leaves_of(6, D, dtype))
    before = _dispatch.calls["embedding", "triton"]
    assert f"triton     cannot run: {reason}" in explain("embedding", *arguments)
    with pytest.raises(BackendError, match=reason):
        ops.embedding(*arguments, backend="triton")
    ops.embedding(*arguments)
    assert _dispatch.calls["embedding", "triton"] == before
