"""``ops.CatalogIndex``: ``topk`` with an index gives the same bits, and a stale index is noticed."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lares_fast import _native, ops
from lares_fast._errors import InputError
from tests.support.catalog_cases import CATALOGS, catalog, csr, native_topk, needs_native


@needs_native
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
        """The values have very different sizes; some are zero, some repeat, and a few are not finite."""
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
            expected = native_topk(query, items, 50, **extra, threads=1)
            for threads in (1, 2, 3):
                found = native_topk(query, items, 50, **extra, index=tables, threads=threads)
                assert torch.equal(found[1], expected[1])

    def test_a_residual_left_out_of_the_bound_is_caught(self):
        query, items = catalog("Gaussian", 66_001, 16)
        tables = ops.CatalogIndex(items).tables(items)
        bounds = tables.bounds
        if not bounds.numel():
            pytest.skip("there is no screening on this CPU")
        expected = native_topk(query, items, 100)
        bounds[:, 1:] = -1.0
        assert not torch.equal(native_topk(query, items, 100, index=tables)[1], expected[1])

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
        """A fused step does not change the version of a parameter. Here only one row has a gradient."""
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

    def test_a_change_by_an_alias_is_seen_by_the_alias(self):
        """``.data`` gives an alias that counts its own changes. Row 1 is not among the compared rows."""
        items = torch.randn(5000, 8)
        index, alias = ops.CatalogIndex(items), items.data
        ops.topk(torch.randn(2, 8), alias, 1, index=index)
        alias[1] += 1
        with pytest.raises(InputError, match="index is stale"):
            ops.topk(torch.randn(2, 8), alias, 1, index=index)

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


@needs_native
@pytest.mark.parametrize("indexed", [False, True])
@pytest.mark.parametrize("N", [4096, 12_101, 66_001])
def test_a_sample_that_misleads(N, indexed):
    """The first threshold is guessed from a few panels. Here these panels hold all large scores, but fewer than k."""
    panel = _native.load().index_shape(N=N, D=4)[0]
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
