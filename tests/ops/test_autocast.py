"""The caller's autocast changes no op: results, their dtypes and gradients stay as they are."""

import pytest
import torch

from lares_fast import LARESConfig, _dispatch, ops, reference
from lares_fast._errors import BackendError
from lares_fast._random import Draw

B, D, H, N, P = 3, 32, 2, 70, 9
OFFSETS = torch.tensor([0, 4, 5, 9])
DRAW = Draw((1, 2), torch.arange(B))
TARGET = torch.tensor([1, 69, 5])
EXCLUDE = (torch.tensor([0, 1, 1, 2]), torch.tensor([3, 4]))
SHAPES = [tuple(x.shape) for x in reference.Recurrence(LARESConfig(n_items=9, hidden_size=D, inner_size=D)).parameters()]


def recurrence(backend, h, pre, *weights):
    how = {"n_heads": H, "pre": pre, "depth": 2, "draw": DRAW, "dropout": 0.2, "longest": 4}
    return ops.recurrence(h, OFFSETS, list(weights), backend=backend, **how)


# Public op -> (its name in the table of backends, call, shapes of its leaves).
CATALOG = ((B, D), (N, D))
CALLS = {
    "attention": (
        "attention",
        lambda backend, *x: ops.attention(*x, OFFSETS, 4, draw=DRAW, dropout=0.2, backend=backend),
        [(P, H, D // H)] * 3,
    ),
    "embedding": (
        "embedding",
        lambda backend, *x: ops.embedding(TARGET.repeat(3), OFFSETS, *x, draw=DRAW, dropout=0.2, backend=backend),
        [(N, D), (4, D), (D,), (D,)]),
    "initial_state": (
        "initial_state", lambda backend, _: ops.initial_state(DRAW, OFFSETS, P, D, backend=backend), [(1,)]),
    "recurrence": ("recurrence", recurrence, [(P, D), (P, D), *SHAPES]),
    "linear_cross_entropy": (
        "linear_cross_entropy", lambda backend, *x: ops.linear_cross_entropy(*x, TARGET, backend=backend), CATALOG),
    "target_logprob": ("linear_cross_entropy", lambda backend, *x: ops.target_logprob(*x, TARGET, backend=backend), CATALOG),
    "target_logprob_and_rank": (
        "linear_cross_entropy", lambda backend, *x: ops.target_logprob_and_rank(*x, TARGET, backend=backend)[0], CATALOG),
    "topk": ("topk", lambda backend, *x: ops.topk(*x, 5, backend=backend)[0], CATALOG),
    "target_rank": ("target_rank", lambda backend, *x: ops.target_rank(*x, TARGET, backend=backend), CATALOG),
    "target_ranks": (
        "target_rank",
        lambda backend, *x: ops.target_ranks(*x, TARGET, EXCLUDE, backend=backend)[1],
        CATALOG),
}  # fmt: skip


def test_every_op_is_tried():
    assert set(CALLS) == {name for name in ops.__all__ if name not in ("CatalogIndex", "backend", "explain")}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", CALLS)
def test_autocast_changes_no_op(name, dtype):
    stem, call, shapes = CALLS[name]
    torch.manual_seed(0)
    leaves = [torch.randn(shape, dtype=dtype).requires_grad_() for shape in shapes]
    ran = []
    for backend in (candidate.name for candidate in _dispatch._TABLE[stem]):
        try:
            expected = call(backend, *leaves)
        except BackendError:
            continue
        ran.append(backend)
        with torch.autocast("cpu", torch.bfloat16):
            found = call(backend, *leaves)
        assert found.dtype == expected.dtype
        assert torch.equal(found, expected)
        if stem in ("initial_state", "topk", "target_rank"):
            continue
        wanted = torch.autograd.grad(expected.sum(), leaves)
        outside = torch.autograd.grad(found.sum(), leaves)
        with torch.autocast("cpu", torch.bfloat16):
            again = torch.autograd.grad(call(backend, *leaves).sum(), leaves)
        for gradients in (outside, again):
            assert all(torch.equal(ours, theirs) for ours, theirs in zip(gradients, wanted, strict=True))
    assert "reference" in ran
