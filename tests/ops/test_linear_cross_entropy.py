"""``ops.linear_cross_entropy`` and ``ops.target_logprob``: tolerances, ranks, contracts with compilers, and errors."""

import pytest
import torch

from lares_fast import ops, reference
from lares_fast._errors import BackendError, InputError
from lares_fast.ops._catalog_calls import LogprobBackwardCall, LogprobCall
from tests.support.catalog_cases import BACKENDS
from tests.support.softmax_cases import (
    case,
    check,
    check_a_row_that_is_not_finite,
    check_ascending_scores,
    check_batched_rank,
    check_bf16,
    check_gradient_of_one_argument,
    check_infinities_and_nan,
    check_large_logits,
    check_no_rows,
    check_rank,
    check_saturated,
    run,
)

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

# One less, equal and one more than a panel, a tile of 96 items, and parts of the catalog.
COUNTS = [1, 2, 11, 12, 13, 23, 24, 25, 47, 48, 49, 95, 96, 97, 1025, 3001]
ROWS = [1, 2, 3, 4, 5, 7, 8, 9, 191, 192, 193]


@pytest.fixture(params=BACKENDS)
def backend(request):
    return request.param


@pytest.mark.parametrize("N", COUNTS)
def test_every_number_of_items(N, backend):
    check("target_logprob", *case(9, N, 17), backend=backend)


@pytest.mark.parametrize("M", ROWS)
def test_every_number_of_rows(M, backend):
    check("target_logprob", *case(M, 130, 8), backend=backend)


@pytest.mark.parametrize("D", [1, 3, 16, 17, 64, 65, 128, 256])
def test_every_width(D, backend):
    check("target_logprob", *case(21, 200, D, size=D**-0.5), backend=backend)


def test_more_rows_than_share_a_buffer(backend):
    check("target_logprob", *case(4100, 60, 4), backend=backend)


@pytest.mark.parametrize("J", [(), (2,)], ids=str)
def test_operands_in_bf16(J, backend):
    check_bf16(backend, J)


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("scale", [1.0, 1 / 0.07, 1e-3])
@pytest.mark.parametrize("skip_pad", [False, True])
def test_reductions(reduction, scale, skip_pad, backend):
    hidden, items, target, grad = case(37, 1500, 32, skip_pad=skip_pad)
    hidden, items = torch.nn.functional.normalize(hidden), torch.nn.functional.normalize(items)
    check(
        "linear_cross_entropy",
        hidden,
        items,
        target,
        grad,
        backend=backend,
        reduction=reduction,
        scale=scale,
        skip_pad=skip_pad,
    )


def test_leading_dimensions(backend):
    hidden, items, target, grad = case(24, 300, 16)
    check("target_logprob", hidden.reshape(2, 3, 4, 16), items, target.reshape(2, 3, 4), grad.reshape(2, 3, 4), backend=backend)


@pytest.mark.parametrize(("J", "M", "N"), [(1, 5, 30), (2, 1, 1), (2, 9, 1500), (4, 33, 33), (3, 192, 97)])
@pytest.mark.parametrize("skip_pad", [False, True])
def test_batched(J, M, N, skip_pad, backend):
    N += skip_pad
    check("target_logprob", *case(M, N, 24, J=(J,), skip_pad=skip_pad), backend=backend, scale=0.5, skip_pad=skip_pad)


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_reductions_over_catalogs(reduction, backend):
    hidden, items, target, grad = case(12, 40, 8, J=(3,))
    check("linear_cross_entropy", hidden, items, target, grad, backend=backend, reduction=reduction)


def test_no_catalogs(backend):
    hidden, items = torch.empty(0, 3, 4, requires_grad=True), torch.empty(0, 7, 4, requires_grad=True)
    logprob, rank = ops.target_logprob_and_rank(hidden, items, torch.empty(0, 3, dtype=torch.int64), backend=backend)
    assert logprob.shape == rank.shape == (0, 3)
    logprob.sum().backward()
    assert hidden.grad.shape == (0, 3, 4) and items.grad.shape == (0, 7, 4)


def test_uniform_over_many_items(backend):
    """A single fp32 sum over a large catalog drifts most when all terms are equal."""
    items = (torch.arange(4) - 1.5)[torch.arange(200_000) % 4][:, None].contiguous()
    check(
        "target_logprob", torch.tensor([[1.0], [0.1]]), items, torch.tensor([0, 7]), torch.tensor([1.0, -2.0]), backend=backend
    )


@pytest.mark.parametrize("sign", [1, -1])
def test_large_logits(sign, backend):
    check_large_logits(sign, backend)


@pytest.mark.parametrize("gap", [4.0, 12.0, 20.0])
def test_saturated(gap, backend):
    check_saturated(gap, backend)


def test_ascending_scores(backend):
    check_ascending_scores(backend)


@pytest.mark.parametrize("ties", ["order", "strict"])
@pytest.mark.parametrize("skip_pad", [False, True])
@pytest.mark.parametrize("N", [2, 25, 700, 2000])
def test_rank_is_that_of_target_rank(ties, skip_pad, N, backend):
    check_rank(ties, skip_pad, N, backend)


@pytest.mark.parametrize("ties", ["order", "strict"])
@pytest.mark.parametrize(("skip_pad", "N"), [(True, 2), (False, 25), (True, 700)])
def test_rank_in_catalogs_and_of_the_first_rows(ties, skip_pad, N, backend):
    check_batched_rank(ties, skip_pad, N, backend)


def test_equal_scores_earn_nothing(backend):
    hidden, items = torch.randn(64, 64), torch.randn(1, 64).expand(500, 64)
    target = torch.arange(64) + 100
    assert torch.equal(ops.target_logprob_and_rank(hidden, items, target, backend=backend)[1], target)
    assert not ops.target_logprob_and_rank(hidden, items, target, ties="strict", backend=backend)[1].any()


def test_shapes_with_rank(backend):
    hidden, items, target, _ = case(12, 40, 8)
    logprob, rank = ops.target_logprob_and_rank(
        hidden.reshape(3, 4, 8).requires_grad_(), items, target.reshape(3, 4), backend=backend
    )
    assert logprob.shape == rank.shape == (3, 4)
    assert rank.dtype == torch.int64
    assert not rank.requires_grad
    logprob.sum().backward()


def test_infinities_and_nan(backend):
    check_infinities_and_nan(backend)


def test_a_row_that_is_not_finite_spoils_the_gradients(backend):
    check_a_row_that_is_not_finite(backend)


def test_no_rows(backend):
    check_no_rows(backend)


@pytest.mark.parametrize("which", [0, 1])
def test_gradient_of_one_argument(which, backend):
    check_gradient_of_one_argument(which, backend)


@pytest.mark.parametrize("J", [(), (2,)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_dtypes_run_in_pieces(dtype, J, monkeypatch):
    monkeypatch.setattr(ops._chunked_softmax, "_SCORES", 1)
    hidden, items, target, grad = case(20, 3000, 16, J=J, size=0.3)
    hidden, items, grad = hidden.to(dtype), items.to(dtype), grad.to(dtype)
    if dtype != torch.float64:
        check("target_logprob", hidden, items, target, grad, backend="reference")
        return
    for ours, theirs in zip(
        run(ops.target_logprob, hidden, items, target, grad),
        run(reference.target_logprob, hidden, items, target, grad),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("J", [(), (2,)])
def test_numerical_gradients(J):
    hidden, items, target, _ = case(5, 7, 3, J=J)
    leaves = (hidden.double().requires_grad_(), items.double().requires_grad_())
    for function in (ops.target_logprob, ops.linear_cross_entropy, reference.target_logprob):
        assert torch.autograd.gradcheck(lambda h, x, function=function: function(h, x, target, scale=0.7), leaves)


@pytest.mark.parametrize("J", [(), (2,)])
def test_opcheck(J, backend):
    hidden, items, target, grad = case(5, 30, 8, J=J)
    hidden.requires_grad_(), items.requires_grad_()
    for ties, ranked in ((None, None), ("order", None), ("order", 3)):
        call = LogprobCall.build(hidden, items, target, scale=0.5, ties=ties, ranked=ranked, backend=backend)
        torch.library.opcheck(torch.ops.lares_fast.target_logprob, call.arguments())
    hidden, items = hidden.detach(), items.detach()
    products = hidden.double() @ items.double().mT
    lse = torch.stack((products.amax(-1), (products - products.amax(-1, keepdim=True)).logsumexp(-1)), -1)
    needs = {"need_hidden": True, "need_items": False}
    backward = LogprobBackwardCall.build(hidden, items, target, grad=grad, lse=lse, **needs, backend=backend)
    torch.library.opcheck(torch.ops.lares_fast.target_logprob_backward, backward.arguments())


@pytest.mark.parametrize(("J", "ranked"), [((), None), ((), 2), ((2,), None), ((2,), 7)])
def test_compile(J, ranked, backend):
    hidden, items, target, grad = case(5, 30, 8, J=J)

    def loss(hidden, items, target):
        logprob, rank = ops.target_logprob_and_rank(hidden, items, target, ranked=ranked, backend=backend)
        return logprob * 2 + (rank if ranked is None else rank.sum())

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for ours, theirs in zip(run(compiled, hidden, items, target, grad), run(loss, hidden, items, target, grad), strict=True):
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_second_derivatives_are_refused(backend):
    hidden, items, target, _ = case(5, 30, 8)
    loss = ops.linear_cross_entropy(hidden.requires_grad_(), items, target, backend=backend)
    (gradient,) = torch.autograd.grad(loss, hidden, create_graph=True)
    with pytest.raises(NotImplementedError, match="The gradient of target_logprob has no gradient: for second derivatives use"):
        gradient.sum().backward()


BATCH = {"hidden": torch.ones(2, 4, 3), "items": torch.ones(2, 5, 3)}


@pytest.mark.parametrize(("change", "message"), [
    ({"hidden": torch.ones(2, 3).long()}, "hidden must be a floating-point"),
    ({"hidden": [[1.0]]}, "hidden must be a dense tensor, but got list"),
    ({"hidden": torch.tensor(1.0)}, r"hidden must be a floating-point \[\.\.\., D\]"),
    ({"items": torch.ones(5, 4)}, r"items must be \[N, 3\] like hidden"),
    ({"items": torch.ones(0, 3)}, "with at least 1 row, but got"),
    ({"items": torch.ones(1, 3), "skip_pad": True}, "with at least 2 rows with skip_pad, but got"),
    ({"items": torch.ones(2, 5, 3)}, r"items must be \[N, 3\] like hidden, .* but got \[2, 5, 3\]"),
    ({**BATCH, "items": torch.ones(3, 5, 3)}, r"items must be \[N, 3\] or \[2, N, 3\] like hidden"),
    ({**BATCH, "items": torch.ones(2, 5, 4)}, r"items must be \[N, 3\] or \[2, N, 3\] like hidden"),
    ({**BATCH, "items": torch.ones(2, 0, 3)}, "with at least 1 row, but got"),
    ({**BATCH, "items": torch.ones(5, 3, 2, 2)}, r"items must be \[N, 3\] or \[2, N, 3\] like hidden"),
    (BATCH, r"target must be torch\.int64 \[2, 4\]"),
    ({**BATCH, "target": torch.tensor([[1, 5, 1, 1]] * 2)}, r"target must be in 0\.\.4, but got values in 1\.\.5"),
    ({"items": torch.ones(5, 3).double()}, r"items must be torch\.float32 on cpu like hidden"),
    ({"items": torch.ones(5, 3, device="meta")}, "on cpu like hidden, but got .* on meta"),
    ({"target": torch.tensor([1])}, r"target must be torch\.int64 \[2\]"),
    ({"target": torch.tensor([1.0, 2.0])}, r"target must be torch\.int64 \[2\] .* but got torch\.float32"),
    ({"target": torch.tensor([1, 5])}, r"target must be in 0\.\.4, but got values in 1\.\.5"),
    ({"target": torch.tensor([-1, 1])}, r"target must be in 0\.\.4, but got values in -1\.\.1"),
    ({"target": torch.tensor([0, 1]), "skip_pad": True}, r"target must be in 1\.\.4, but got values in 0\.\.1"),
    ({"scale": 0.0}, "scale must be a positive number"),
    ({"scale": float("nan")}, "scale must be a finite number"),
    ({"reduction": "max"}, "reduction must be one of none, mean, sum, but got 'max'"),
    ({"backend": "fast"}, "backend must be one of"),
])  # fmt: skip
def test_bad_arguments(change, message):
    arguments = {"hidden": torch.ones(2, 3), "items": torch.ones(5, 3), "target": torch.tensor([1, 2]), **change}
    with pytest.raises(InputError, match=message):
        ops.linear_cross_entropy(arguments.pop("hidden"), arguments.pop("items"), arguments.pop("target"), **arguments)


@pytest.mark.parametrize(("ranked", "message"), [
    (-1, r"ranked must be in 0\.\.2, the number of rows, but got -1"), (3, r"ranked must be in 0\.\.2"),
    (1.5, r"ranked must be an integer, but got 1\.5"),
])  # fmt: skip
def test_a_bad_number_of_ranks(ranked, message):
    with pytest.raises(InputError, match=message):
        ops.target_logprob_and_rank(*case(2, 5, 3)[:3], ranked=ranked)


def test_bad_ties_and_backend():
    hidden, items, target, _ = case(2, 5, 3)
    with pytest.raises(InputError, match="ties must be one of order, strict, but got 'id'"):
        ops.target_logprob_and_rank(hidden, items, target, ties="id")
    with pytest.raises(
        BackendError, match=r"cannot run on the backend 'native': it takes float32, and hidden is torch\.float64"
    ):
        ops.target_logprob(hidden.double(), items.double(), target, backend="native")
