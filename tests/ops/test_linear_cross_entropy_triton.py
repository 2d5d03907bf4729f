"""``ops.target_logprob`` where half precision or a GPU goes wrong first: tiny gradients, and targets that are no items.

On a GPU nobody reads a target's value before the kernels do, so these tests call what stands behind the op's checks.
"""

import pytest
import torch

from lares_fast import _dispatch, ops, reference
from tests.support import oracle


@pytest.fixture
def memory(monkeypatch):
    from tests.support import triton_interpreter

    with triton_interpreter.interpreted(monkeypatch) as memory:
        yield memory


def gradients(function, hidden, items, target, upstream, **options):
    hidden, items = (x.clone().requires_grad_() for x in (hidden, items))
    function(hidden, items, target, **options).backward(upstream.to(hidden.dtype))
    return {"hidden": hidden.grad, "items": items.grad}


def tiny(backend, dtype):
    """The mean over many rows: half precision holds no probability times its gradient, but their sums."""
    M, N, D = 256, 1000, 16
    hidden, items = (torch.randn(M, D) * 0.05 + 0.1).to(dtype), (torch.randn(N, D) + 0.5).to(dtype)
    target, upstream = torch.arange(M) % 3, torch.full((M,), 2.0**-16)
    # What is below half of the smallest number is rounded to none.
    assert 2.0**-16 / N < 2.0**-25
    how = {"hidden": hidden, "items": items, "target": target, "upstream": upstream}
    result = gradients(ops.target_logprob, **how, backend=backend)
    twin = gradients(reference.target_logprob, **how)
    truth = gradients(reference.target_logprob, **{**how, "hidden": hidden.double(), "items": items.double()})
    oracle.check("gradient", result, twin, truth)
    # Among the rows that are no targets the law sees little; here is what a lost product would leave of them.
    rest, wanted = result["items"][3:].double(), truth["items"][3:]
    assert (rest - wanted).abs().max() <= 2.0**-24 + 0.05 * wanted.abs().max() < 0.5 * wanted.abs().max()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_tiny_gradients_reach_the_items(dtype):
    tiny("reference", dtype)


@pytest.mark.interpreted
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_tiny_gradients_reach_the_items_by_the_kernels(dtype, memory):
    tiny("triton", dtype)


@pytest.mark.interpreted
@pytest.mark.parametrize("size", [2.0**-8, 1.0, 2.0**12])
def test_gradients_of_very_different_sizes(size, memory):
    """The largest of them sets the unit in which all are multiplied."""
    hidden, items, target = torch.randn(40, 16).half(), torch.randn(70, 16).half(), torch.arange(40)
    upstream = torch.randn(40) * size
    upstream[3] = 0
    how = {"hidden": hidden, "items": items, "target": target, "upstream": upstream}
    result = gradients(ops.target_logprob, **how, backend="triton")
    twin = gradients(reference.target_logprob, **how)
    truth = gradients(reference.target_logprob, **{**how, "hidden": hidden.double(), "items": items.double()})
    oracle.check("gradient", result, twin, truth)
    assert not result["hidden"][3].any()


# No item of the softmax, with row 0 left out of it.
WRONG = [0, -1, 90, 91, 2**31, -(2**31), 2**40, 2**63 - 1, -(2**63)]


def wrong_targets(backend, dtype):
    hidden, items = torch.randn(len(WRONG) + 4, 24).to(dtype), torch.randn(90, 24).to(dtype)
    target = torch.tensor([1, *WRONG, 89, 7, 8])
    right = torch.ones(len(target), dtype=torch.bool)
    right[1 : len(WRONG) + 1] = False
    ties = "order" if backend == "triton" else None
    logprob, rank, lse = _dispatch.run("linear_cross_entropy", backend, hidden, items, target, 1.0, True, ties, None)
    assert torch.equal(logprob.isnan(), ~right) and torch.equal(lse.isnan(), ~right)
    with torch.no_grad():
        wanted, places = ops.target_logprob_and_rank(hidden[right], items, target[right], skip_pad=True, backend="reference")
    torch.testing.assert_close(logprob[right], wanted, rtol=0.02, atol=0.02)
    if rank is not None:
        assert torch.equal(rank[right], places)
        assert (rank[~right] == len(items) - 1).all()
    gradient = (torch.ones_like(logprob), lse, (True, True))
    d_hidden, d_items = _dispatch.run("linear_cross_entropy", backend, hidden, items, target, 1.0, True, None, gradient)
    assert d_hidden[~right].isnan().all() and d_hidden[right].isfinite().all()
    assert d_items[1:].isnan().all() and not d_items[0].any()


def test_a_target_that_is_no_item_gives_nan():
    wrong_targets("reference", torch.float32)


@pytest.mark.interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_target_that_is_no_item_is_not_read(dtype, memory):
    """Every address is checked against the tensors."""
    wrong_targets("triton", dtype)
