"""``ops.topk``: every backend against the reference and a sort, its contract with compilers, and its errors."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lares_fast import _dispatch, _native, explain, ops, reference
from lares_fast._errors import BackendError, InputError
from tests.support import oracle
from tests.support.catalog_cases import BACKENDS, CATALOGS, catalog, csr, integers

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


@pytest.fixture(params=BACKENDS)
def backend(request):
    return request.param


def by_sorting(query, items, k, bias=None, lists=None):
    """Exact on integers: ids by (score descending, id ascending), -1 where none is left."""
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


def reversed_ids(topk):
    def wrong(query, items, k, *, bias, exclude, index):
        scores, ids = topk(query, items.flip(0), k, bias=None if bias is None else bias.flip(0), exclude=None)
        return scores, len(items) - 1 - ids

    return wrong


PLANTED = {
    "ties by descending id": reversed_ids,
    "exclusion ignored": lambda topk: lambda q, i, k, *, bias, exclude, index: topk(q, i, k, bias=bias, exclude=None),
    "bias ignored": lambda topk: lambda q, i, k, *, bias, exclude, index: topk(q, i, k, bias=None, exclude=exclude),
    "first half unseen": lambda topk: (
        lambda q, i, k, *, bias, exclude, index: topk(
            q, i * (torch.arange(len(i)) >= len(i) // 2)[:, None], k, bias=bias, exclude=exclude
        )
    ),
    "best left out": lambda topk: (
        lambda q, i, k, *, bias, exclude, index: [x[:, 1:] for x in topk(q, i, k + 1, bias=bias, exclude=exclude)]
    ),
}


@pytest.mark.skipif(not _native.available()[0], reason=_native.available()[1])
@pytest.mark.parametrize("bug", PLANTED)
def test_a_planted_bug_is_caught(bug, monkeypatch):
    check_exactly(9, 257, 5, 100, True, "native")
    monkeypatch.setattr(_native, "topk", PLANTED[bug](_native.topk))
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
    offsets, ids = csr([[1], [], [2, 2], [8]])
    torch.library.opcheck(torch.ops.lares_fast.topk, (query, items, 3, None, offsets, ids, [], backend))
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
    ({"k": -(2**70)}, "k must be in 1..5"),
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


@pytest.mark.skipif(not _native.available()[0], reason=_native.available()[1])
class TestCatalogIndex:
    @pytest.mark.parametrize("kind", CATALOGS)
    @pytest.mark.parametrize(("N", "D", "k"), [(300, 16, 300), (66_001, 18, 100)])
    def test_the_answer_is_the_same_bit_for_bit(self, kind, N, D, k):
        query, items = catalog(kind, N, D)
        index = ops.CatalogIndex(items)
        lists = [torch.randint(0, N, (n,)).tolist() for n in range(len(query))]
        for size, exclude in ((21, None), (21, csr(lists)), (1, None)):
            expected = ops.topk(query[:size], items, k, exclude=exclude, backend="native")
            found = ops.topk(query[:size], items, k, exclude=exclude, index=index, backend="native")
            assert torch.equal(found[1], expected[1])
            assert torch.equal(found[0], expected[0])

    @settings(max_examples=40, deadline=None)
    @given(
        seed=st.integers(0, 2**31),
        D=st.sampled_from([1, 2, 3, 5, 16, 63, 64, 65, 130, 257, 512]),
        k=st.sampled_from([1, 7, 100]),
        spread=st.sampled_from([0.0, 1.0, 4.0]),
        size=st.sampled_from([1e-30, 1e-17, 1e-12, 1.0, 1e10, 1e18]),
    )
    def test_the_bound_holds_whatever_the_sizes(self, seed, D, k, spread, size):
        """Dimensions, items and queries of very different sizes, zeros, repeats and a few values that are not finite."""
        generator = torch.Generator().manual_seed(seed)

        def table(rows):
            values = torch.randn(rows, D, generator=generator) * (spread * torch.randn(D, generator=generator)).exp()
            values *= (spread * torch.randn(rows, 1, generator=generator)).exp()
            return values * (torch.rand(rows, 1, generator=generator) > 0.02)

        items, query = table(33_001) * size, table(5)
        items[1000:1200] = items[7]
        for bad in (torch.nan, torch.inf, 3e38):
            items[torch.randint(0, len(items), (1,), generator=generator), 0] = bad
        expected = ops.topk(query, items, k, backend="native")
        found = ops.topk(query, items, k, index=ops.CatalogIndex(items), backend="native")
        assert torch.equal(found[1], expected[1])
        assert torch.equal(found[0], expected[0])

    def test_threads_and_bias_do_not_enter(self):
        query, items = catalog("Gaussian", 66_001, 16)
        tables, bias = ops.CatalogIndex(items).tables(items), torch.randn(66_001)
        for extra in ({}, {"bias": bias}):
            expected = _native.topk(query, items, 50, **extra, threads=1)
            for threads in (1, 2, 3):
                found = _native.topk(query, items, 50, **extra, index=tables, threads=threads)
                assert torch.equal(found[1], expected[1])

    def test_a_residual_left_out_of_the_bound_is_caught(self):
        query, items = catalog("Gaussian", 66_001, 16)
        tables = ops.CatalogIndex(items).tables(items)
        bounds = tables[5]
        if not bounds.numel():
            pytest.skip("this CPU screens nothing")
        expected = _native.topk(query, items, 100)
        bounds[:, 1:] = -1.0
        assert not torch.equal(_native.topk(query, items, 100, index=tables)[1], expected[1])

    def test_a_stale_index_does_not_answer(self):
        items = torch.randn(100, 4)
        index = ops.CatalogIndex(items)
        ops.topk(torch.randn(2, 4), items, 3, index=index)
        items[3] += 1
        with pytest.raises(InputError, match="index is stale, because items changed"):
            ops.topk(torch.randn(2, 4), items, 3, index=index)
        for other in (items.clone(), items[1:]):
            with pytest.raises(InputError, match="index was built from another tensor"):
                ops.topk(torch.randn(2, 4), other, 3, index=index)

    def test_a_view_sees_changes_of_its_base(self):
        table = torch.nn.Parameter(torch.randn(100, 4))
        index = ops.CatalogIndex(table[1:])
        ops.topk(torch.randn(2, 4), table[1:], 3, index=index)
        with torch.no_grad():
            table.add_(1)
        with pytest.raises(InputError, match="stale"):
            ops.topk(torch.randn(2, 4), table[1:], 3, index=index)

    @pytest.mark.parametrize("items", [
        torch.ones(3), torch.ones(3, 4).double(), torch.ones(4, 3).T, torch.ones(1, 4).expand(3, 4),
        torch.ones(3, 4, device="meta"),
    ])  # fmt: skip
    def test_bad_items(self, items):
        with pytest.raises(InputError, match=r"items must be a contiguous torch\.float32 \[N, D\] on the CPU"):
            ops.CatalogIndex(items)

    @pytest.mark.parametrize("items", [[[1.0]], torch.ones(3, 4).to_sparse()])
    def test_what_is_no_dense_tensor(self, items):
        with pytest.raises(InputError, match="items must be a dense tensor, but got"):
            ops.CatalogIndex(items)

    @pytest.mark.parametrize(("N", "D"), [(0, 4), (3, 0), (1, 1)])
    def test_the_smallest_catalogs(self, N, D):
        items = torch.ones(N, D)
        index = ops.CatalogIndex(items)
        if N:
            _, ids = ops.topk(torch.ones(2, D), items, N, index=index)
            assert torch.equal(ids, torch.arange(N).expand(2, N))

    @pytest.mark.parametrize("fused", [False, True])
    @pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW, torch.optim.Adagrad])
    def test_a_step_of_an_optimizer_makes_an_index_stale(self, kind, fused):
        """A fused step leaves the version of a parameter as it was; one row alone has a gradient here."""
        items = torch.nn.Parameter(torch.randn(5000, 8))
        optimizer = kind([{"params": [items]}], lr=1.0, fused=fused)
        index, other = ops.CatalogIndex(items.detach()[1:]), ops.CatalogIndex(torch.randn(40, 8))
        items.grad = torch.zeros_like(items)
        items.grad[1234] = 1.0
        optimizer.step()
        query, ours = torch.randn(2, 8), items.detach()[1:]
        with pytest.raises(InputError, match=r"index is stale, because items changed.*call index\.refresh"):
            ops.topk(query, ours, 3, index=index)
        index.refresh()
        assert torch.equal(ops.topk(query, ours, 3, index=index)[1], ops.topk(query, ours, 3)[1])
        ops.topk(query, other._items, 3, index=other)

    @pytest.mark.parametrize("write", [
        lambda items: items.data.mul_(1.5),
        lambda items: items.numpy().__imul__(1.5),
        lambda items: items.untyped_storage().fill_(0),
        lambda items: items.data[::2].fill_(torch.nan),
    ], ids=["data", "numpy", "storage", "nan"])  # fmt: skip
    @pytest.mark.parametrize("count", [1, 255, 257, 5000])
    def test_a_write_past_pytorch_to_the_whole_table_is_seen(self, write, count):
        items = torch.randn(count, 8)
        items[0, 0] = torch.nan
        index = ops.CatalogIndex(items)
        ops.topk(torch.randn(2, 8), items, 1, index=index)
        write(items)
        with pytest.raises(InputError, match="index is stale"):
            ops.topk(torch.randn(2, 8), items, 1, index=index)

    def test_items_that_train_can_be_indexed(self):
        items = torch.randn(50, 4, requires_grad=True)
        scores, _ = ops.topk(torch.randn(2, 4), items, 3, index=ops.CatalogIndex(items))
        with pytest.raises(NotImplementedError, match="topk has no gradient"):
            scores.sum().backward()

    def test_inference_tensors_are_refused(self):
        with torch.inference_mode():
            items = torch.ones(3, 4)
        with pytest.raises(InputError, match="an inference tensor"):
            ops.CatalogIndex(items)


@pytest.mark.skipif(not _native.available()[0], reason=_native.available()[1])
@pytest.mark.parametrize("indexed", [False, True])
@pytest.mark.parametrize("N", [4096, 12_101, 66_001])
def test_a_sample_that_misleads(N, indexed):
    """The panels from which the first threshold is guessed hold all the large scores, too few of them."""
    panel = _native.load().index_shape(N, 4)[0]
    panels = min(2048, N // 12) // panel
    sampled = torch.arange(N) // panel % (N // panel // panels) == 0
    items = torch.randint(-3, 3, (N, 4)).float()
    items[sampled.nonzero().flatten()[:90]] += 50
    query = torch.cat((torch.ones(2, 4), torch.randint(-2, 3, (3, 4)).float()))
    index = ops.CatalogIndex(items) if indexed else None
    lists = csr([range(0, N, 2), [], [], [], []])
    for exclude in (None, lists):
        expected = ops.topk(query, items, 100, exclude=exclude, backend="reference")
        found = ops.topk(query, items, 100, exclude=exclude, index=index, backend="native")
        assert torch.equal(found[1], expected[1])
        assert torch.equal(found[0], expected[0])


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

    def test_a_backend_asked_for_by_name_does_not_fall_back(self):
        with pytest.raises(BackendError, match="cannot run on the backend 'native': it takes float32"):
            ops.topk(self.query.double(), self.items.double(), 2, backend="native")

    def test_explain(self):
        text = explain("topk", self.query.double(), self.items.double(), 2)
        assert text.splitlines()[0] == "topk: reference"
        assert "cannot run: it takes float32" in text
        with pytest.raises(InputError, match=r"op must be one of .*topk, but got 'sort'"):
            explain("sort")
