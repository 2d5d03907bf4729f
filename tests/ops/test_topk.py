"""``ops.topk``: every backend against the reference and a sort, its contract with compilers, and its errors."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lares_fast import _dispatch, explain, ops, reference
from lares_fast._errors import BackendError, InputError
from lares_fast.ops._catalog_calls import TopkCall
from tests.support import oracle
from tests.support.catalog_cases import BACKENDS, csr, integers, needs_native, plant

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


@pytest.fixture(params=BACKENDS)
def backend(request):
    return request.param


def by_sorting(query, items, k, bias=None, lists=None):
    """Return ids by (score descending, id ascending), and -1 where no item is left. Exact on integers."""
    scores = query.double() @ items.double().T + (0 if bias is None else bias.double())
    rows = []
    for b, row in enumerate(scores.tolist()):
        gone = set() if lists is None else set(lists[b])
        order = sorted((i for i in range(len(row)) if i not in gone), key=lambda i: (-row[i], i))[:k]
        rows.append(order + [-1] * (k - len(order)))
    return torch.tensor(rows)


@pytest.mark.parametrize(("B", "N", "D", "k"), [
    (1, 1, 1, 1), (1, 7, 3, 7), (3, 15, 2, 4), (5, 16, 4, 16), (8, 17, 8, 5), (9, 257, 5, 100), (2, 1000, 64, 10), (0, 5, 3, 2),
])  # fmt: skip
@pytest.mark.parametrize("with_bias", [False, True])
def test_massed_ties_are_exact(B, N, D, k, with_bias, backend):
    check_exactly(B, N, D, k, with_bias, backend)


def check_exactly(B, N, D, k, with_bias, backend):
    query, items, bias = integers(B, D), integers(N, D), integers(N) if with_bias else None
    lists = [torch.randint(0, N, (n % 6,)).tolist() for n in range(B)]
    scores, ids = ops.topk(query, items, k, bias=bias, exclude=csr(lists), backend=backend)
    assert scores.shape == ids.shape == (B, k)
    assert ids.dtype == torch.int64
    if B:
        expected = by_sorting(query, items, k, bias, lists)
        assert torch.equal(ids, expected)
        all_scores = query @ items.T + (0 if bias is None else bias)
        own = torch.where(expected < 0, -torch.inf, all_scores.gather(1, expected.clamp(min=0)))
        assert torch.equal(scores, own)


def reversed_ids(run):
    def wrong(call):
        bias = None if call.bias is None else call.bias.flip(0)
        scores, ids = run(replace(call, items=call.items.flip(0), bias=bias, exclude=None))
        return scores, len(call.items) - 1 - ids

    return wrong


def first_half_unseen(run):
    def wrong(call):
        count = len(call.items)
        return run(replace(call, items=call.items * (torch.arange(count) >= count // 2)[:, None]))

    return wrong


PLANTED = {
    "ties by descending id": reversed_ids,
    "exclusion ignored": lambda run: lambda call: run(replace(call, exclude=None)),
    "bias ignored": lambda run: lambda call: run(replace(call, bias=None)),
    "first half unseen": first_half_unseen,
    "best left out": lambda run: lambda call: [x[:, 1:] for x in run(replace(call, k=call.k + 1))],
}


@needs_native
@pytest.mark.parametrize("bug", PLANTED)
def test_a_planted_bug_is_caught(bug, monkeypatch):
    check_exactly(9, 257, 5, 100, True, "native")
    plant(monkeypatch, "topk", "native", PLANTED[bug])
    with pytest.raises(AssertionError):
        check_exactly(9, 257, 5, 100, True, "native")


@pytest.mark.parametrize(("N", "D", "k"), [(300, 64, 10), (1000, 50, 100), (40000, 16, 7)])
def test_gaussian(N, D, k, backend):
    query, items = torch.randn(33, D), torch.randn(N, D)
    scores, ids = ops.topk(query, items, k, backend=backend)
    oracle.check_topk(scores, ids, query.double() @ items.double().T, k)


def test_a_prefix_is_a_smaller_k(backend):
    query, items = integers(6, 4), integers(90, 4)
    scores, ids = ops.topk(query, items, 90, backend=backend)
    for k in (1, 2, 17, 89):
        shorter = ops.topk(query, items, k, backend=backend)
        assert torch.equal(shorter[0], scores[:, :k])
        assert torch.equal(shorter[1], ids[:, :k])


def test_batch_size_does_not_enter(backend):
    query, items = integers(37, 16), integers(500, 16)
    whole = ops.topk(query, items, 20, backend=backend)
    for size in (1, 5, 36):
        parts = [ops.topk(part, items, 20, backend=backend) for part in query.split(size)]
        assert torch.equal(torch.cat([ids for _, ids in parts]), whole[1])


def test_nothing_left(backend):
    scores, ids = ops.topk(torch.ones(1, 2), torch.ones(3, 2), 2, exclude=csr([[2, 0, 1, 1]]), backend=backend)
    assert ids.tolist() == [[-1, -1]]
    assert scores.tolist() == [[-torch.inf, -torch.inf]]


def test_nan_and_infinity(backend):
    items = torch.tensor([[torch.nan], [1.0], [-torch.inf], [torch.inf], [2.0]])
    scores, ids = ops.topk(torch.ones(1, 1), items, 5, backend=backend)
    assert ids.tolist() == [[3, 4, 1, 0, 2]]
    assert scores.tolist() == [[torch.inf, 2, 1, -torch.inf, -torch.inf]]
    assert ops.topk(torch.ones(1, 1), items, 5, exclude=csr([[3]]), backend=backend)[1].tolist() == [[4, 1, 0, 2, -1]]


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 9), st.integers(1, 70), st.integers(1, 9), st.data())
def test_backends_agree_on_integers(B, N, D, data):
    k = data.draw(st.integers(1, N))
    lists = [data.draw(st.lists(st.integers(0, N - 1), max_size=5)) for _ in range(B)]
    query, items = integers(B, D), integers(N, D)
    expected = reference.topk(query, items, k, exclude=csr(lists))
    scores, ids = ops.topk(query, items, k, exclude=csr(lists))
    assert torch.equal(ids, expected[1])
    assert torch.equal(scores, expected[0])


def test_reference_takes_other_dtypes():
    query, items = integers(4, 3).double(), integers(9, 3).double()
    scores, ids = ops.topk(query, items, 3)
    assert scores.dtype == torch.float64
    assert torch.equal(ids, by_sorting(query, items, 3))


def test_any_strides(backend):
    query, items, bias = integers(6, 8), integers(50, 8), integers(1)
    expected = by_sorting(query, items, 9, bias.repeat(50))
    strided = (query.repeat_interleave(2, 1)[:, ::2], items.T.contiguous().T)
    assert torch.equal(ops.topk(*strided, 9, bias=bias.expand(50), backend=backend)[1], expected)


def test_opcheck_and_compile(backend):
    query, items = integers(4, 3), integers(9, 3)
    lists = csr([[1], [], [2, 2], [8]])
    torch.library.opcheck(
        torch.ops.lares_fast.topk, TopkCall.build(query, items, 3, exclude=lists, backend=backend).arguments()
    )
    compiled = torch.compile(lambda q, i: ops.topk(q, i, 3)[1] + 1, fullgraph=True, backend="aot_eager")
    with ops.backend(backend):
        before = _dispatch.calls["topk", backend]
        assert torch.equal(compiled(query, items), ops.topk(query, items, 3)[1] + 1)
        assert _dispatch.calls["topk", backend] == before + 2


def test_has_no_gradient():
    query, items = torch.randn(2, 3, requires_grad=True), torch.randn(5, 3)
    scores, _ = ops.topk(query, items, 2)
    with pytest.raises(NotImplementedError, match="topk has no gradient"):
        scores.sum().backward()


@pytest.mark.parametrize(("change", "message"), [
    ({"query": torch.ones(3)}, "query must be a floating-point"),
    ({"query": [[1.0]]}, "query must be a dense tensor, but got list"),
    ({"query": torch.ones(2, 3, device="meta")}, "on meta like query, but got .* on cpu"),
    ({"items": torch.ones(5, 3, device="meta")}, "on cpu like query, but got .* on meta"),
    ({"items": torch.ones(5, 3).to_sparse()}, r"items must be a dense tensor, but got torch\.sparse_coo"),
    ({"bias": [1.0] * 5}, "bias must be a dense tensor, but got list"),
    ({"exclude": ([0, 0, 1], torch.tensor([1]))}, "exclude offsets must be a dense tensor, but got list"),
    ({"exclude": (torch.tensor([0, 0, 1], device="meta"), torch.tensor([1]))}, "exclude offsets must be 1-D .* on cpu"),
    ({"k": -(2**70)}, "k must be an integer of 64 bits"),
    ({"query": torch.ones(2, 3, dtype=torch.int64)}, "query must be a floating-point"),
    ({"items": torch.ones(5, 4)}, r"items must be \[N, 3\]"),
    ({"items": torch.ones(5, 3).double()}, "items must be torch.float32"),
    ({"items": torch.ones(0, 3)}, "k must be in 1..0"),
    ({"k": 0}, "k must be in 1..5"),
    ({"k": 6}, "k must be in 1..5"),
    ({"bias": torch.ones(4)}, "bias must be torch.float32"),
    ({"exclude": torch.zeros(2, 3)}, "exclude must be a pair .* but got Tensor"),
    ({"exclude": (torch.tensor([0, 1]), torch.tensor([1]))}, r"offsets must have B \+ 1 = 3"),
    ({"exclude": (torch.tensor([0, 2, 1]), torch.tensor([1]))}, "offsets must rise"),
    ({"exclude": (torch.tensor([0, 0, 2]), torch.tensor([1]))}, "offsets must rise"),
    ({"exclude": (torch.tensor([0, 0, 1]), torch.tensor([5]))}, r"exclude ids must be in 0\.\.4"),
    ({"exclude": (torch.tensor([0, 0, 1]), torch.tensor([-1]))}, r"exclude ids must be in 0\.\.4"),
    ({"exclude": (torch.tensor([0, 0, 1]), torch.tensor([1.0]))}, r"exclude ids must be 1-D torch\.int64"),
    ({"backend": "fast"}, "backend must be one of"),
])  # fmt: skip
def test_bad_arguments(change, message):
    arguments = {"query": torch.ones(2, 3), "items": torch.ones(5, 3), "k": 2, **change}
    with pytest.raises(InputError, match=message):
        ops.topk(arguments.pop("query"), arguments.pop("items"), arguments.pop("k"), **arguments)


class TestDispatch:
    query, items = torch.ones(2, 3), torch.ones(5, 3)

    def test_calls_are_counted_where_they_ran(self, backend):
        before = _dispatch.calls["topk", backend]
        ops.topk(self.query, self.items, 2, backend=backend)
        assert _dispatch.calls["topk", backend] == before + 1

    def test_argument_beats_context_beats_environment(self, monkeypatch):
        monkeypatch.setenv("LARES_FAST_BACKEND", "triton")
        with pytest.raises(BackendError, match="topk has no backend 'triton'; it has: cuda, native, reference"):
            ops.topk(self.query, self.items, 2)
        with ops.backend("reference"):
            ops.topk(self.query, self.items, 2)
            with pytest.raises(BackendError, match="cannot run on the backend 'cuda': it runs on CUDA devices"):
                ops.topk(self.query, self.items, 2, backend="cuda")

    def test_bad_environment(self, monkeypatch):
        monkeypatch.setenv("LARES_FAST_BACKEND", "gpu")
        with pytest.raises(InputError, match="LARES_FAST_BACKEND must be one of"):
            ops.topk(self.query, self.items, 2)

    def test_an_empty_variable_is_as_none(self, monkeypatch):
        monkeypatch.setenv("LARES_FAST_BACKEND", "")
        before = _dispatch.calls["topk", "native"] + _dispatch.calls["topk", "reference"]
        ops.topk(self.query, self.items, 2)
        assert _dispatch.calls["topk", "native"] + _dispatch.calls["topk", "reference"] == before + 1

    def test_a_backend_asked_for_by_name_does_not_fall_back(self):
        with pytest.raises(BackendError, match="cannot run on the backend 'native': it takes float32"):
            ops.topk(self.query.double(), self.items.double(), 2, backend="native")

    def test_explain(self):
        text = explain("topk", self.query.double(), self.items.double(), 2)
        assert text.splitlines()[0] == "topk: reference"
        assert "cannot run: it takes float32" in text
        with pytest.raises(InputError, match=r"op must be one of .*topk, but got 'sort'"):
            explain("sort")
