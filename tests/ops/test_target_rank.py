"""``ops.target_rank``: every backend against the reference and a sort, its agreement with ``topk``, and its errors."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lares_fast import _dispatch, explain, ops, reference
from lares_fast._errors import BackendError, InputError
from lares_fast.ops._catalog_calls import TargetRankCall
from tests.support.catalog_cases import BACKENDS, CATALOGS, catalog, csr, integers, native_ranks, needs_native, plant

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


@pytest.fixture(params=BACKENDS)
def backend(request):
    return request.param


def by_counting(query, items, target, *, bias=None, lists=None, ties="order"):
    """Count item by item. Exact on integers."""
    scores = query.double() @ items.double().T + (0 if bias is None else bias.double())
    ranks = []
    for b, (row, t) in enumerate(zip(scores.tolist(), target.tolist(), strict=True)):
        gone = set() if lists is None else set(lists[b])
        ranks.append(sum(
            j != t and j not in gone and (s > row[t] or (ties == "order" and s == row[t] and j < t)) for j, s in enumerate(row)
        ))  # fmt: skip
    return torch.tensor(ranks, dtype=torch.int64)


def check_exactly(B, N, D, backend):
    """Compare with a count, with and without bias, for both ties. The lists are unsorted, repeat and hold the target."""
    query, items, bias, target = integers(B, D), integers(N, D), integers(N), torch.randint(0, N, (B,))
    lists = [[*torch.randint(0, N, (n % 7,)).tolist() * 2, t] for n, t in enumerate(target.tolist())]
    for ties in ("order", "strict"):
        for extra in ({}, {"bias": bias}):
            expected = by_counting(query, items, target, ties=ties, **extra)
            kept = by_counting(query, items, target, ties=ties, lists=lists, **extra)
            found = ops.target_rank(query, items, target, ties=ties, backend=backend, **extra)
            assert found.dtype == torch.int64
            assert torch.equal(found, expected)
            excluded = ops.target_rank(query, items, target, exclude=csr(lists), ties=ties, backend=backend, **extra)
            assert torch.equal(excluded, kept)
            both = ops.target_ranks(query, items, target, csr(lists), ties=ties, backend=backend, **extra)
            assert torch.equal(both[0], expected)
            assert torch.equal(both[1], kept)


# A panel has 12, 24 or 48 items and a tile of queries 4 or 8 rows, depending on the SIMD level.
@pytest.mark.parametrize("N", [1, 2, 11, 12, 13, 23, 24, 25, 47, 48, 49, 257])
@pytest.mark.parametrize(("B", "D"), [(1, 1), (3, 4), (9, 5)])
def test_massed_ties_are_exact(B, N, D, backend):
    check_exactly(B, N, D, backend)


@pytest.mark.parametrize(("B", "N", "D"), [(0, 5, 3), (0, 0, 3), (5, 60, 0), (2, 40_000, 3), (1030, 50, 2)])
def test_edges(B, N, D, backend):
    if N == 0:
        assert ops.target_rank(integers(0, D), integers(0, D), torch.empty(0, dtype=torch.int64), backend=backend).shape == (0,)
    else:
        check_exactly(B, N, D, backend)


def ties_to_the_larger_id(run):
    def wrong(call):
        last = len(call.items) - 1
        exclude = None if call.exclude is None else (call.exclude.offsets, last - call.exclude.ids)
        bias = None if call.bias is None else call.bias.flip(0)
        return run(replace(call, items=call.items.flip(0), target=last - call.target, bias=bias, exclude=exclude))

    return wrong


def repeats_count_twice(run):
    def wrong(call):
        of_all, of_kept = run(call)
        return of_all, of_kept if call.exclude is None else 2 * of_kept - of_all

    return wrong


def last_item_unseen(run):
    def wrong(call):
        seen = int(call.target.max()) + 1
        bias = None if call.bias is None else call.bias[:seen]
        return run(replace(call, items=call.items[:seen], bias=bias, exclude=None))

    return wrong


PLANTED = {
    "ties favour the target": lambda run: lambda call: run(replace(call, ties="strict")),
    "ties go to the larger id": ties_to_the_larger_id,
    "a repeated exclusion counts twice": repeats_count_twice,
    "exclusion ignored": lambda run: lambda call: run(replace(call, exclude=None)),
    "bias ignored": lambda run: lambda call: run(replace(call, bias=None)),
    "the last item unseen": last_item_unseen,
    "counted from one": lambda run: lambda call: [rank + 1 for rank in run(call)],
}


@needs_native
@pytest.mark.parametrize("bug", PLANTED)
def test_a_planted_bug_is_caught(bug, monkeypatch):
    check_exactly(9, 257, 5, "native")
    plant(monkeypatch, "target_rank", "native", PLANTED[bug])
    with pytest.raises(AssertionError):
        check_exactly(9, 257, 5, "native")


@pytest.mark.parametrize(("N", "D"), [(1000, 64), (40_000, 17)])
def test_gaussian(N, D, backend):
    query, items, target = torch.randn(33, D), torch.randn(N, D), torch.randint(0, N, (33,))
    scores = query.double() @ items.double().T
    own, rounding = scores.gather(1, target[:, None]), 1e-5 * scores.abs().max()
    rank = ops.target_rank(query, items, target, backend=backend)
    assert ((scores > own + rounding).sum(1) <= rank).all()
    assert (rank <= (scores > own - rounding).sum(1)).all()


@pytest.mark.parametrize("D", [1, 7, 64, 129])
def test_scores_that_are_all_equal_earn_no_credit(D, backend):
    """The rank is the number of items with a smaller id that are left, whatever the rounding of a score is."""
    N = 300
    query, items, target = torch.randn(50, D), torch.randn(1, D).repeat(N, 1), torch.arange(50) * 6
    lists = [torch.randint(0, N, (n % 9,)).tolist() for n in range(50)]
    assert torch.equal(ops.target_rank(query, items, target, backend=backend), target)
    left = [t - len({i for i in gone if i < t}) for t, gone in zip(target.tolist(), lists, strict=True)]
    assert ops.target_rank(query, items, target, exclude=csr(lists), backend=backend).tolist() == left
    assert not ops.target_rank(query, items, target, ties="strict", backend=backend).any()


def test_a_target_scored_in_another_order_outranks_itself():
    """On the data of the test above, such a target does outrank itself."""
    query, row, target = torch.randn(50, 64), torch.randn(1, 64), torch.arange(50) * 6
    scores = (query @ row.repeat(320, 1).T)[:, :300]
    own = (query * row).sum(1)
    rank = (scores > own[:, None]).sum(1) + ((scores == own[:, None]) & (torch.arange(300) < target[:, None])).sum(1)
    assert not torch.equal(rank, target)


@pytest.mark.parametrize("score", [0.0, 1e-40, -1e-40, 1.17549435e-38, 3e38, torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize("flush", [False, True])
def test_ties_at_every_kind_of_number(score, flush, backend):
    if not torch.set_flush_denormal(flush):
        pytest.skip("this CPU cannot read subnormal numbers as zeros")
    try:
        target, bias = torch.tensor([0, 5, 100, 199]), torch.full((200,), score)
        if score == 0:
            bias[::3] = -0.0
        rank = ops.target_rank(torch.zeros(4, 2), torch.zeros(200, 2), target, bias=bias, backend=backend)
        assert torch.equal(rank, target)
    finally:
        torch.set_flush_denormal(False)


def test_nan_and_infinity(backend):
    items = torch.tensor([[torch.nan], [1.0], [-torch.inf], [torch.inf], [2.0]])
    query, target = torch.ones(5, 1), torch.arange(5)
    assert ops.target_rank(query, items, target, backend=backend).tolist() == [3, 2, 4, 0, 1]
    assert ops.target_rank(query, items, target, ties="strict", backend=backend).tolist() == [3, 2, 3, 0, 1]
    exclude = csr([[3, 0, 3]] * 5)
    assert ops.target_rank(query, items, target, exclude=exclude, backend=backend).tolist() == [2, 1, 2, 0, 0]
    assert ops.target_rank(torch.full((5, 1), torch.nan), items, target, backend=backend).tolist() == [0, 1, 2, 3, 4]


@needs_native
@pytest.mark.parametrize("kind", CATALOGS)
def test_the_place_in_topk_is_the_rank(kind):
    """This holds for any data, because both ops compute scores with the same bits."""
    N = 500
    query, items = catalog(kind, N, 19)
    target = torch.randint(0, N, (len(query),))
    target[:3] = torch.tensor([0, N - 1, 61])
    lists = [[i for i in torch.randint(0, N, (30,)).tolist() if i != t] for t in target.tolist()]
    for exclude in (None, csr(lists)):
        _, ids = ops.topk(query, items, N, exclude=exclude, backend="native")
        place = (ids == target[:, None]).int().argmax(1)
        assert torch.equal(ops.target_rank(query, items, target, exclude=exclude, backend="native"), place)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 9), st.integers(1, 70), st.integers(0, 9), st.sampled_from(["order", "strict"]), st.data())
def test_backends_agree_on_integers(B, N, D, ties, data):
    lists = [data.draw(st.lists(st.integers(0, N - 1), max_size=5)) for _ in range(B)]
    query, items, target = integers(B, D), integers(N, D), torch.randint(0, N, (B,))
    expected = reference.target_rank(query, items, target, exclude=csr(lists), ties=ties)
    assert torch.equal(ops.target_rank(query, items, target, exclude=csr(lists), ties=ties), expected)


@needs_native
def test_threads_and_batches_do_not_enter():
    query, items, target = torch.randn(37, 16), torch.randn(100_001, 16), torch.randint(0, 100_001, (37,))
    exclude = csr([[1, 2, 3]] * 37)
    one = native_ranks(query, items, target, exclude=exclude, threads=1)
    for threads in (2, 3, 999):
        found = native_ranks(query, items, target, exclude=exclude, threads=threads)
        assert torch.equal(torch.stack(found), torch.stack(one))
    for size in (1, 5, 36):
        parts = [native_ranks(q, items, t)[0] for q, t in zip(query.split(size), target.split(size), strict=True)]
        assert torch.equal(torch.cat(parts), one[0])


def test_any_strides(backend):
    query, items, bias = integers(6, 8), integers(50, 8), integers(1)
    target = torch.arange(12)[::2]
    expected = by_counting(query, items, target, bias=bias.repeat(50))
    strided = (query.repeat_interleave(2, 1)[:, ::2], items.T.contiguous().T, target)
    assert torch.equal(ops.target_rank(*strided, bias=bias.expand(50), backend=backend), expected)


def test_other_dtypes_run_on_the_reference():
    query, items, target = integers(4, 3), integers(9, 3), torch.tensor([0, 3, 8, 8])
    for dtype in (torch.float64, torch.bfloat16):
        rank = ops.target_rank(query.to(dtype), items.to(dtype), target)
        assert torch.equal(rank, by_counting(query, items, target))
    with pytest.raises(BackendError, match="target_rank cannot run on the backend 'native': it takes float32"):
        ops.target_rank(query.double(), items.double(), target, backend="native")
    assert explain("target_rank", query.double(), items.double(), target).splitlines()[0] == "target_rank: reference"


def test_one_pass_gives_both_rankings(backend):
    before = _dispatch.calls["target_rank", backend]
    ops.target_ranks(integers(2, 3), integers(5, 3), torch.tensor([1, 2]), csr([[0], []]), backend=backend)
    assert _dispatch.calls["target_rank", backend] == before + 1


@pytest.mark.parametrize("exclude", [None, csr([[1], [], [2, 2], [8]])])
def test_opcheck_and_compile(exclude, backend):
    query, items, target = integers(4, 3), integers(9, 3), torch.tensor([0, 3, 8, 8])
    call = TargetRankCall.build(query, items, target, exclude=exclude, backend=backend)
    torch.library.opcheck(torch.ops.lares_fast.target_rank, call.arguments())
    compiled = torch.compile(
        lambda q, i: ops.target_rank(q, i, target, exclude=exclude) + 1, fullgraph=True, backend="aot_eager"
    )
    with ops.backend(backend):
        before = _dispatch.calls["target_rank", backend]
        assert torch.equal(compiled(query, items), ops.target_rank(query, items, target, exclude=exclude) + 1)
        assert _dispatch.calls["target_rank", backend] == before + 2


def test_a_rank_has_no_gradient(backend):
    query, items = torch.randn(2, 3, requires_grad=True), torch.randn(5, 3, requires_grad=True)
    bias = torch.randn(5, requires_grad=True)
    assert not ops.target_rank(query, items, torch.tensor([1, 2]), bias=bias, backend=backend).requires_grad


@pytest.mark.parametrize(("change", "message"), [
    ({"query": torch.ones(3)}, r"query must be a floating-point \[B, D\], .* but got torch\.float32 \[3\]"),
    ({"query": torch.ones(2, 3, dtype=torch.int64)}, "query must be a floating-point"),
    ({"query": [[1.0]]}, "query must be a dense tensor, but got list"),
    ({"items": torch.ones(5, 3).to_sparse()}, r"items must be a dense tensor, but got torch\.sparse_coo"),
    ({"items": torch.ones(5, 4)}, r"items must be \[N, 3\]"),
    ({"items": torch.ones(5, 3).double()}, r"items must be torch\.float32"),
    ({"items": torch.ones(5, 3, device="meta")}, "on cpu like query, but got .* on meta"),
    ({"items": torch.ones(0, 3)}, r"target must be in 0\.\.-1"),
    ({"bias": torch.ones(4)}, r"bias must be torch\.float32 \[5\]"),
    ({"target": torch.tensor([1])}, "target must have B = 2 entries like query, but got 1"),
    ({"target": torch.tensor([[1], [2]])}, r"target must be 1-D torch\.int64 on cpu like query, but got torch\.int64 \[2, 1\]"),
    ({"target": torch.tensor([1, 2], dtype=torch.int32)}, r"target must be 1-D torch\.int64"),
    ({"target": torch.tensor([1, 2], device="meta")}, r"target must be 1-D torch\.int64 on cpu .* on meta"),
    ({"target": torch.tensor([1, 5])}, r"target must be in 0\.\.4, but got values in 1\.\.5"),
    ({"target": torch.tensor([-1, 4])}, r"target must be in 0\.\.4, but got values in -1\.\.4"),
    ({"target": [1, 2]}, "target must be a dense tensor, but got list"),
    ({"exclude": torch.zeros(2, 3)}, "exclude must be a pair .* but got Tensor"),
    ({"exclude": (torch.tensor([0, 1]), torch.tensor([1]))}, r"offsets must have B \+ 1 = 3"),
    ({"exclude": (torch.tensor([0, 2, 1]), torch.tensor([1]))}, "offsets must rise"),
    ({"exclude": (torch.tensor([0, 0, 1]), torch.tensor([5]))}, r"exclude ids must be in 0\.\.4"),
    ({"exclude": (torch.tensor([0, 0, 1]), torch.tensor([1.0]))}, r"exclude ids must be 1-D torch\.int64"),
    ({"ties": "mean"}, "ties must be one of order, strict, but got 'mean'"),
    ({"backend": "fast"}, "backend must be one of"),
])  # fmt: skip
def test_bad_arguments(change, message):
    arguments = {"query": torch.ones(2, 3), "items": torch.ones(5, 3), "target": torch.tensor([1, 2]), **change}
    with pytest.raises(InputError, match=message):
        ops.target_rank(arguments.pop("query"), arguments.pop("items"), arguments.pop("target"), **arguments)


@pytest.mark.parametrize(("change", "message"), [
    ({"target": torch.tensor([0, 6])}, r"target must be in 0\.\.5, but got values in 0\.\.6"),
    ({"target": torch.tensor([0, -1])}, r"target must be in 0\.\.5, but got values in -1\.\.0"),
    ({"exclude": (torch.tensor([0, 1, 2]), torch.tensor([0, 6]))}, r"exclude ids must be in 0\.\.5, but got values in 0\.\.6"),
    ({"exclude": (torch.tensor([0, 3, 2]), torch.tensor([0, 1]))}, "exclude offsets must rise from 0 to the number of ids, 2"),
    ({"exclude": (torch.tensor([1, 1, 2]), torch.tensor([0, 1]))}, "exclude offsets must rise from 0 to the number of ids, 2"),
    ({"exclude": (torch.tensor([0, 1, 3]), torch.tensor([0, 1]))}, "exclude offsets must rise from 0 to the number of ids, 2"),
    ({"exclude": (torch.tensor([0, 1, 1]), torch.tensor([0, 1]))}, "exclude offsets must rise from 0 to the number of ids, 2"),
])  # fmt: skip
def test_wrong_values_are_named_by_every_backend(change, message, backend):
    arguments = {"query": torch.ones(2, 4), "items": torch.ones(6, 4), "target": torch.tensor([0, 1]), **change}
    with pytest.raises(InputError, match=message):
        ops.target_rank(**arguments, backend=backend)


@needs_native
def test_no_threads_are_an_error():
    with pytest.raises(InputError, match="threads must be at least 1, but got 0"):
        native_ranks(torch.ones(2, 4), torch.ones(6, 4), torch.tensor([0, 1]), threads=0)
