"""Calls of the softmax over a catalog, and checks that the tests of several backends share."""

import torch

from lares_fast import _dispatch, ops, reference
from tests.support import oracle
from tests.support.catalog_cases import integers


def case(M, N, D, *, J=(), skip_pad=False, size=1.0):
    """Return (hidden, items, target, upstream gradient); with ``J``, such as (3,), that many catalogs."""
    hidden, items = torch.randn(*J, M, D), torch.randn(*J, N, D) * size
    return hidden, items, torch.randint(int(skip_pad), N, (*J, M)), torch.randn(*J, M)


def run(function, hidden, items, target, grad, **options):
    """Return the value and the gradients of ``function`` for the upstream gradient ``grad``, cut to the value's shape."""
    hidden, items = hidden.clone().requires_grad_(), items.clone().requires_grad_()
    value = function(hidden, items, target, **options)
    value.backward(grad if value.dim() else grad.flatten()[0])
    return {"value": value.detach()}, {"hidden": hidden.grad, "items": items.grad}


def check(function, hidden, items, target, grad, **options):
    """Check ``ops.function`` against ``reference.function``, value and gradients, by the tolerances."""
    backend = options.pop("backend")
    oracles = getattr(reference, function)
    truth = run(oracles, hidden.double(), items.double(), target, grad.double(), **options)
    twin = run(oracles, hidden, items, target, grad, **options)
    before = _dispatch.calls.copy()
    result = run(getattr(ops, function), hidden, items, target, grad, **options, backend=backend)
    both = ("linear_cross_entropy", "linear_cross_entropy_backward")
    assert _dispatch.calls - before == dict.fromkeys(((op, backend) for op in both), 1)
    for kind, values in zip(("forward", "gradient"), zip(result, twin, truth, strict=True), strict=True):
        oracle.check(kind, *values)


def check_bf16(backend, J=(), M=33, N=130, D=64):
    """Check operands that are rounded to bf16, by the tolerances of bf16. Results and gradients are fp32."""
    hidden, items, target, grad = case(M, N, D, J=J)
    how = {"skip_pad": True, "scale": 0.5}
    narrow, target = (hidden.bfloat16(), items.bfloat16()), target.clamp(min=1)
    truth = run(reference.target_logprob, *(x.double() for x in narrow), target, grad.double(), **how)
    twin = run(reference.target_logprob, *narrow, target, grad.bfloat16(), **how)
    result = run(ops.target_logprob, hidden, items, target, grad, **how, bf16=True, backend=backend)
    for values in (*result[0].values(), *result[1].values()):
        assert values.dtype == torch.float32
    # The log-probabilities are not rounded: they keep the tolerance of fp32.
    exact = run(reference.target_logprob, *(x.float() for x in narrow), target, grad, **how)
    oracle.check("forward", result[0], exact[0], truth[0])
    in_bf16 = {name: x.bfloat16() for name, x in result[1].items()}
    oracle.check("gradient", in_bf16, twin[1], truth[1])
    plain = run(ops.target_logprob, hidden, items, target, grad, **how, backend=backend)
    assert not torch.equal(plain[0]["value"], result[0]["value"])
    _, rank = ops.target_logprob_and_rank(hidden, items, target, **how, bf16=True, backend=backend)
    assert torch.equal(rank, reference.target_logprob_and_rank(*(x.float() for x in narrow), target, **how)[1])


def check_large_logits(sign, backend):
    """Check scores that are exact and reach several hundred. The target has the highest or the lowest one."""
    hidden, items = integers(40, 16) * 4, integers(700, 16) * 8
    scores = sign * (hidden @ items.T)
    check("target_logprob", hidden, items, scores.argmax(1), torch.randn(40), backend=backend)


def check_saturated(gap, backend):
    """Check targets with 1 - p(target) = exp(-gap). Neither log p nor the gradient of the target may round it to 0."""
    items = torch.zeros(50, 3)
    items[7, 0] = gap
    hidden = torch.tensor([[1.0, 0.5, 0.0]]).repeat(5, 1)
    check("target_logprob", hidden, items, torch.full((5,), 7), torch.randn(5), backend=backend)
    logprob = ops.target_logprob(hidden, items, torch.full((5,), 7), backend=backend)
    truth = -torch.log1p(49 * torch.exp(torch.tensor(-gap).double())).expand(5)
    torch.testing.assert_close(logprob.double(), truth, rtol=1e-6, atol=0)


def check_ascending_scores(backend):
    """Check catalogs in which the scores of each panel are far above the scores of the panel before it."""
    items = torch.arange(2000.0)[:, None] * 4
    check("target_logprob", torch.ones(5, 1), items, torch.tensor([0, 3, 1000, 1998, 1999]), torch.randn(5), backend=backend)


def check_rank(ties, skip_pad, N, backend):
    first = int(skip_pad)
    hidden, items, target = integers(30, 5), integers(N, 5), torch.randint(first, N, (30,))
    logprob, rank = ops.target_logprob_and_rank(hidden, items, target, ties=ties, skip_pad=skip_pad, backend=backend)
    assert torch.equal(rank, reference.target_rank(hidden, items[first:], target - first, ties=ties))
    assert torch.equal(rank, reference.target_logprob_and_rank(hidden, items, target, ties=ties, skip_pad=skip_pad)[1])
    assert torch.equal(logprob, ops.target_logprob(hidden, items, target, skip_pad=skip_pad, backend=backend))


def check_batched_rank(ties, skip_pad, N, backend):
    """Check catalogs that differ, and ranks of the first rows only. The log-probabilities keep their bits."""
    first, J, M = int(skip_pad), 3, 20
    hidden, items, target = integers(J, M, 5), integers(J, N, 5), torch.randint(first, N, (J, M))
    how = {"ties": ties, "skip_pad": skip_pad, "backend": backend}
    expected = [
        reference.target_rank(h, x[first:], t - first, ties=ties) for h, x, t in zip(hidden, items, target, strict=True)
    ]
    logprob, rank = ops.target_logprob_and_rank(hidden, items, target, **how)
    assert torch.equal(rank, torch.stack(expected))
    for ranked in (0, 7, M, M + 1, J * M - 1, J * M):
        again, some = ops.target_logprob_and_rank(hidden, items, target, ranked=ranked, **how)
        assert torch.equal(some, rank.flatten()[:ranked]) and torch.equal(again, logprob)
        assert torch.equal(some, reference.target_logprob_and_rank(
            hidden, items, target, ranked=ranked, ties=ties, skip_pad=skip_pad)[1])  # fmt: skip
    alone = {"ties": ties, "skip_pad": skip_pad, "backend": backend, "ranked": 7}
    one, some = ops.target_logprob_and_rank(hidden[1], items[1], target[1], **alone)
    assert torch.equal(some, rank[1, :7])
    assert torch.equal(one, ops.target_logprob(hidden[1], items[1], target[1], skip_pad=skip_pad, backend=backend))


def check_infinities_and_nan(backend):
    hidden = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    items = torch.tensor([[1.0, 1.0], [2.0, 0.0], [torch.inf, 3.0], [-torch.inf, 0.0]])
    for target in range(4):
        scores = torch.stack([(row * items).sum(1) for row in hidden])
        scores[0], scores[1] = torch.tensor([1.0, 2.0, torch.inf, -torch.inf]), torch.nan
        expected = scores[:, target] - scores.logsumexp(1)
        found = ops.target_logprob(hidden, items, torch.full((3,), target), backend=backend)
        expected[1] = torch.nan
        torch.testing.assert_close(found, expected, equal_nan=True)
    minus = torch.tensor([[1.0], [-torch.inf], [2.0]])
    found = ops.target_logprob(torch.ones(3, 1), minus, torch.tensor([0, 1, 2]), backend=backend)
    torch.testing.assert_close(found, torch.tensor([1.0, -torch.inf, 2.0]) - torch.tensor([1.0, 2.0]).logsumexp(0))
    assert ops.target_logprob(torch.ones(1, 1), minus[1:2].repeat(30, 1), torch.tensor([3]), backend=backend).isnan()


def check_a_row_that_is_not_finite(backend):
    hidden, items, target, grad = case(6, 40, 4)
    hidden[2, 1] = torch.nan
    _, gradients = run(ops.target_logprob, hidden, items, target, grad, backend=backend)
    assert gradients["hidden"].isnan().any(1).tolist() == [False, False, True, False, False, False]
    assert gradients["items"].isnan().all()


def check_no_rows(backend):
    hidden, items = torch.empty(0, 4, requires_grad=True), torch.randn(7, 4, requires_grad=True)
    target = torch.empty(0, dtype=torch.int64)
    losses = {r: ops.linear_cross_entropy(hidden, items, target, reduction=r, backend=backend) for r in ("none", "mean", "sum")}
    assert losses["none"].shape == (0,)
    assert losses["mean"].isnan()
    assert losses["sum"] == 0
    losses["sum"].backward()
    assert not items.grad.any()
    batched, items = torch.empty(2, 0, 4, requires_grad=True), torch.randn(2, 7, 4, requires_grad=True)
    logprob, rank = ops.target_logprob_and_rank(batched, items, torch.empty(2, 0, dtype=torch.int64), backend=backend)
    assert logprob.shape == rank.shape == (2, 0)
    logprob.sum().backward()
    assert batched.grad.shape == (2, 0, 4) and not items.grad.any()


def check_gradient_of_one_argument(which, backend):
    hidden, items, target, grad = case(20, 90, 8)
    both = run(ops.target_logprob, hidden, items, target, grad, backend=backend)[1]
    arguments = [hidden, items]
    arguments[which] = arguments[which].clone().requires_grad_()
    ops.target_logprob(*arguments, target, backend=backend).backward(grad)
    assert torch.equal(arguments[which].grad, list(both.values())[which])


def check_triton(J, M, N, D, dtype, skip_pad, scale):
    hidden, items, target, grad = case(M, N, D, J=J, skip_pad=skip_pad, size=D**-0.5)
    inputs = [x.to(dtype) for x in (hidden, items)]
    check("target_logprob", *inputs, target, grad.to(dtype), backend="triton", scale=scale, skip_pad=skip_pad)


def check_far_scores(dtype):
    """Check a last tile that is not full. Places outside of the catalog have score 0, and the power of 300 is infinite."""
    hidden, items, target, grad = case(5, 39, 4, J=(2,))
    hidden[..., 0], items[..., 0] = -300, 1
    check("target_logprob", hidden.to(dtype), items.to(dtype), target, grad.to(dtype), backend="triton")


def check_tiny_distances():
    """Check log-probabilities so near to 0 that 1 + x is rounded to 1, and so near that it has a few digits."""
    for gap in (20.0, 32.0, 60.0):
        items = torch.zeros(50, 3)
        items[7, 0] = gap
        found = ops.target_logprob(torch.tensor([[1.0, 0.5, 0.0]]), items, torch.tensor([7]), backend="triton")
        truth = -torch.log1p(49 * torch.exp(torch.tensor([-gap]).double()))
        torch.testing.assert_close(found.double(), truth, rtol=1e-6, atol=0)


def gradients_of(function, hidden, items, target, upstream, **options):
    hidden, items = (x.clone().requires_grad_() for x in (hidden, items))
    function(hidden, items, target, **options).backward(upstream.to(hidden.dtype))
    return {"hidden": hidden.grad, "items": items.grad}


def check_tiny_gradients(backend, dtype):
    """Check the mean over many rows: half precision holds the sum of (probability times gradient), but not a single term."""
    M, N, D = 256, 1000, 16
    hidden, items = (torch.randn(M, D) * 0.05 + 0.1).to(dtype), (torch.randn(N, D) + 0.5).to(dtype)
    target, upstream = torch.arange(M) % 3, torch.full((M,), 2.0**-16)
    # A value below half of the smallest number is rounded to 0.
    assert 2.0**-16 / N < 2.0**-25
    how = {"hidden": hidden, "items": items, "target": target, "upstream": upstream}
    result = gradients_of(ops.target_logprob, **how, backend=backend)
    twin = gradients_of(reference.target_logprob, **how)
    truth = gradients_of(reference.target_logprob, **{**how, "hidden": hidden.double(), "items": items.double()})
    oracle.check("gradient", result, twin, truth)
    # The tolerances hardly depend on the items that are no targets. A lost product would leave an error of their whole size.
    rest, wanted = result["items"][3:].double(), truth["items"][3:]
    assert (rest - wanted).abs().max() <= 2.0**-24 + 0.05 * wanted.abs().max() < 0.5 * wanted.abs().max()
