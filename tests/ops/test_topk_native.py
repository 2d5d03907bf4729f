"""The native backend of ``topk`` against a sort in NumPy: exact order, exact bits, and no input that ends the process."""

import contextlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lares_fast import _native
from lares_fast._errors import InputError
from tests.support.catalog_cases import native_topk, needs_native, same, whole_numbers

pytestmark = needs_native


def order(scores, k, excluded=()):
    """Return scores and ids for one query, by score descending, then id ascending."""
    scores = np.where(np.isnan(scores), -np.inf, scores)
    ids = [i for i in range(len(scores)) if i not in set(excluded)]
    ids = sorted(ids, key=lambda i: (-scores[i], i))[:k]
    missing = k - len(ids)
    return [*scores[ids], *[-np.inf] * missing], [*ids, *[-1] * missing]


def oracle(query, items, k, bias=None, exclude=None):
    with np.errstate(invalid="ignore"):
        scores = query.numpy() @ items.numpy().T
        if bias is not None:
            scores = scores + bias.numpy()
    rows = []
    for b, row in enumerate(scores):
        offsets, ids = (None, None) if exclude is None else exclude
        rows.append(order(row, k, [] if offsets is None else ids[offsets[b] : offsets[b + 1]].tolist()))
    return (
        torch.tensor([row[0] for row in rows], dtype=torch.float32).reshape(-1, k),
        torch.tensor([row[1] for row in rows], dtype=torch.int64).reshape(-1, k),
    )


@pytest.mark.parametrize(
    ("batch", "count", "width"), [(1, 1, 1), (3, 15, 4), (2, 16, 1), (5, 17, 8), (130, 700, 8), (3, 5000, 64)]
)
@pytest.mark.parametrize("longest", [None, 0, 30])
def test_topk_is_the_total_order(batch, count, width, longest):
    query, items, bias, exclude = whole_numbers(count, batch, count, width, longest=longest, with_bias=longest is not None)
    for k in sorted({1, min(7, count), count}):
        same(native_topk(query, items, k, bias=bias, exclude=exclude, threads=2), oracle(query, items, k, bias, exclude))


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_topk_on_drawn_sizes(data):
    batch, count, width = (data.draw(st.integers(low, high)) for low, high in ((0, 9), (1, 80), (1, 9)))
    query, items, bias, exclude = whole_numbers(
        data.draw(st.integers(0, 2**32)), batch, count, width,
        values=data.draw(st.sampled_from([0, 1, 50])), with_bias=data.draw(st.booleans()),
        longest=data.draw(st.sampled_from([None, 0, 3, 200])),
    )  # fmt: skip
    k = data.draw(st.integers(1, count))
    threads = data.draw(st.integers(1, 3))
    same(native_topk(query, items, k, bias=bias, exclude=exclude, threads=threads), oracle(query, items, k, bias, exclude))


def test_topk_ranks_nan_as_minus_infinity_and_zero_as_zero():
    nan, inf = float("nan"), float("inf")
    scores = [nan, -inf, 0.0, -0.0, inf, nan, inf, -1.0, 0.0]
    got = native_topk(torch.ones(1, 1), torch.tensor(scores).unsqueeze(1), len(scores))
    assert got[1].tolist() == [[4, 6, 2, 3, 8, 7, 0, 1, 5]]
    assert got[0].tolist() == [[inf, inf, 0, 0, 0, -1, -inf, -inf, -inf]]
    got = native_topk(torch.ones(1, 1), torch.zeros(9, 1), 4, bias=torch.tensor(scores))
    assert got[1].tolist() == [[4, 6, 2, 3]]
    assert native_topk(torch.full((1, 1), nan), torch.ones(40, 1), 3)[1].tolist() == [[0, 1, 2]]


def test_topk_with_every_item_excluded_gives_none():
    query, items, _, _ = whole_numbers(0, 2, 40, 4)
    exclude = torch.tensor([0, 80, 80]), torch.arange(40).flip(0).repeat(2)
    scores, ids = native_topk(query, items, 5, exclude=exclude)
    assert ids[0].tolist() == [-1] * 5 and scores[0].tolist() == [-float("inf")] * 5
    same((scores[1:], ids[1:]), oracle(query[1:], items, 5))


def test_topk_of_ascending_scores():
    items = torch.arange(3000.0).unsqueeze(1)
    assert native_topk(torch.ones(1, 1), items, 100)[1].tolist() == [list(range(2999, 2899, -1))]


def test_topk_of_an_empty_batch():
    scores, ids = native_topk(
        torch.empty(0, 8), torch.ones(5, 8), 3, exclude=(torch.zeros(1, dtype=torch.int64), torch.empty(0, dtype=torch.int64))
    )
    assert scores.shape == ids.shape == (0, 3)


def test_topk_has_the_same_bits_for_every_split_of_the_work():
    torch.manual_seed(0)
    query, items, bias = torch.randn(150, 40), torch.randn(3001, 40), torch.randn(3001)
    whole = native_topk(query, items, 20, bias=bias, threads=1)
    for threads in (2, 4, 999):
        same(native_topk(query, items, 20, bias=bias, threads=threads), whole)
    for size in (1, 2, 7, 63):
        parts = [native_topk(part, items, 20, bias=bias) for part in query.split(size)]
        same((torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts])), whole)
    same(native_topk(query, items, 5, bias=bias), tuple(part[:, :5] for part in whole))


def test_topk_scores_are_close_to_a_wider_sum():
    torch.manual_seed(0)
    query, items = torch.randn(9, 128), torch.randn(500, 128)
    scores, ids = native_topk(query, items, 500)
    truth = (query.double() @ items.double().T).gather(1, ids)
    torch.testing.assert_close(scores.double(), truth, rtol=0, atol=1e-4)


def test_topk_takes_strided_tensors():
    query, items, bias, _ = whole_numbers(3, 6, 50, 8)
    wide = torch.zeros(6, 16)
    wide[:, ::2] = query
    same(native_topk(wide[:, ::2], items.T.contiguous().T, 9, bias=bias.expand(50)), oracle(query, items, 9, bias))


def csr(offsets, ids):
    return torch.tensor(offsets), torch.tensor(ids, dtype=torch.int64)


@pytest.mark.parametrize(
    "change",
    [
        {"k": 0},
        {"k": -1},
        {"k": 2**63},
        {"threads": 0},
        {"query": torch.ones(2)},
        {"query": torch.ones(2, 5)},
        {"query": torch.ones(2, 4, dtype=torch.float64)},
        {"query": torch.ones(2, 4, device="meta")},
        {"query": torch.ones(2, 4).to_sparse()},
        {"query": [[1.0]]},
        {"items": torch.ones(6, 4, dtype=torch.bfloat16)},
        {"bias": torch.ones(5)},
        {"bias": torch.ones(6, 1)},
        {"exclude": csr([0, 1, 2], [0, 6])},
        {"exclude": csr([0, 1, 2], [-1, 0])},
        {"exclude": csr([0, 3, 2], [0, 1])},
        {"exclude": csr([1, 1, 2], [0, 1])},
        {"exclude": csr([-9, 1, 2], [0, 1])},
        {"exclude": csr([0, 1, 3], [0, 1])},
        {"exclude": csr([0, 1], [0])},
        {"exclude": (torch.tensor([0, 0, 0], dtype=torch.int32), torch.empty(0, dtype=torch.int64))},
    ],
    ids=str,
)
def test_topk_refuses(change):
    arguments = {"query": torch.ones(2, 4), "items": torch.ones(6, 4), "k": 2, **change}
    with pytest.raises(InputError):
        native_topk(**arguments)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.one_of(st.integers(-3, 3), st.just(2**62)), min_size=5, max_size=5), st.booleans())
def test_the_module_itself_survives_bad_sizes(sizes, pointers):
    """A valid call stays within these buffers. Every other call raises an error, and no call ends the process."""
    room, ids = torch.zeros(9), torch.zeros(9, dtype=torch.int64)
    at, ids_at = (room.data_ptr(), ids.data_ptr()) if pointers else (0, 0)
    B, N, D, k, threads = sizes
    fits = min(B, N, D) >= 0 and threads >= 1 and (B == 0 or (pointers and max(B, N, D) <= 3))
    call = {"query": at, "items": at, "bias": 0, "exclude_offsets": 0, "exclude_ids": 0}
    call |= {"B": B, "N": N, "D": D, "threads": threads}
    with contextlib.suppress(ValueError):
        _native.load().topk(**call, k=k, scores=at, ids=ids_at)
        assert fits and k >= 1 and (B == 0 or k <= 3)
    with contextlib.suppress(ValueError):
        _native.load().target_rank(**call, target=ids_at, rank=ids_at, rank_of_all=ids_at, ties_by_id=True)
        assert fits and (B == 0 or N > 0)


def test_what_does_not_fit_into_memory_is_an_error():
    huge = torch.zeros(1, 1).expand(2**50, 1)
    with pytest.raises(InputError, match=r"items \[1125899906842624, 1\] does not fit into memory"):
        native_topk(torch.ones(3, 1), huge, 1)
    with pytest.raises(InputError, match=r"the result \[1048576, 1073741824\] does not fit into memory"):
        native_topk(torch.ones(2**20, 1), torch.ones(1, 1).expand(2**30, 1), 2**30)
