"""The Triton kernels of ``linear_cross_entropy`` under the interpreter: every address is checked, and outputs begin as NaN.

The tests cover tolerances, ranks, the order of programs, planted bugs, tiny gradients in half precision, and targets that are
no items. On a GPU the value of a target is not read before the kernels run.
"""

import pytest
import torch

from lares_fast import _dispatch, ops, reference
from lares_fast._errors import BackendError
from lares_fast.ops import _triton
from lares_fast.ops._catalog_calls import LogprobBackwardCall, LogprobCall
from tests.support import oracle
from tests.support.catalog_cases import integers
from tests.support.softmax_cases import (
    case,
    check,
    check_a_row_that_is_not_finite,
    check_ascending_scores,
    check_batched_rank,
    check_bf16,
    check_far_scores,
    check_gradient_of_one_argument,
    check_infinities_and_nan,
    check_large_logits,
    check_no_rows,
    check_rank,
    check_saturated,
    check_tiny_distances,
    check_tiny_gradients,
    check_triton,
    gradients_of,
    run,
)

# J, M, N, D, dtype, skip_pad, scale. A tile has 16, 32 or 64 rows, depending on the bytes of a row.
# A part has at least 8 tiles.
TRITON = [
    ((), 1, 1, 1, torch.float32, False, 1.0),
    ((), 5, 63, 17, torch.float32, False, 0.5),
    ((), 64, 65, 16, torch.float32, True, 1 / 0.07),
    ((), 33, 600, 64, torch.float32, True, 1.0),
    ((), 15, 257, 130, torch.float32, False, 1.0),
    ((), 17, 300, 256, torch.bfloat16, True, 1.0),
    ((), 65, 64, 32, torch.bfloat16, False, 0.5),
    ((), 31, 129, 64, torch.bfloat16, True, 1.0),
    ((), 32, 520, 24, torch.float16, False, 1.0),
    ((), 2, 2, 8, torch.float16, True, 1.0),
    ((1,), 7, 40, 16, torch.float32, False, 1.0),
    ((2,), 1, 1, 8, torch.float32, False, 1.0),
    ((2,), 1, 2, 8, torch.bfloat16, True, 1.0),
    ((3,), 37, 37, 40, torch.float32, False, 1 / 0.07),
    ((4,), 33, 130, 64, torch.bfloat16, False, 1 / 0.07),
    ((2,), 65, 1100, 16, torch.float16, True, 0.5),
    ((2,), 33, 600, 64, torch.float32, True, 1.0),
]


@pytest.fixture
def interpreted(monkeypatch):
    from tests.support import triton_interpreter

    with triton_interpreter.interpreted(monkeypatch) as memory:
        yield memory


@pytest.mark.interpreted
@pytest.mark.usefixtures("interpreted")
class TestTriton:
    """The source of the kernels runs on the CPU. Every address is checked, and outputs begin as NaN."""

    @pytest.mark.parametrize("arguments", TRITON, ids=str)
    def test_law(self, arguments):
        check_triton(*arguments)

    @pytest.mark.parametrize("ties", ["order", "strict"])
    @pytest.mark.parametrize("skip_pad", [False, True])
    @pytest.mark.parametrize("N", [2, 65, 700])
    def test_rank(self, ties, skip_pad, N):
        check_rank(ties, skip_pad, N, "triton")

    @pytest.mark.parametrize(("ties", "skip_pad", "N"), [("order", True, 700), ("strict", False, 65)])
    def test_rank_in_catalogs_and_of_the_first_rows(self, ties, skip_pad, N):
        check_batched_rank(ties, skip_pad, N, "triton")

    @pytest.mark.parametrize("J", [(), (2,)], ids=str)
    def test_operands_in_bf16(self, J):
        check_bf16("triton", J)

    def test_rank_in_bf16(self):
        """The scores are exact in bf16 products and fp32 sums, and many of them are equal."""
        hidden, items, target = integers(30, 5).bfloat16(), integers(300, 5).bfloat16(), torch.randint(0, 300, (30,))
        rank = ops.target_logprob_and_rank(hidden, items, target, backend="triton")[1]
        assert torch.equal(rank, reference.target_rank(hidden.float(), items.float(), target))

    @pytest.mark.parametrize("gap", [4.0, 20.0])
    def test_saturated(self, gap):
        check_saturated(gap, "triton")

    def test_large_logits(self):
        check_large_logits(1, "triton")

    def test_ascending_scores(self):
        check_ascending_scores("triton")

    def test_uniform_over_many_items(self, monkeypatch):
        kernels = _triton.kernels("linear_cross_entropy")
        # With one part the sums are as long as possible.
        monkeypatch.setattr(kernels, "PROGRAMS", 1)
        items = torch.zeros(20_000, 4)
        check("target_logprob", torch.ones(2, 4), items, torch.tensor([0, 7]), torch.tensor([1.0, -2.0]), backend="triton")

    def test_infinities_and_nan(self):
        check_infinities_and_nan("triton")

    def test_a_row_that_is_not_finite_spoils_the_gradients(self):
        check_a_row_that_is_not_finite("triton")

    @pytest.mark.parametrize("which", [0, 1])
    def test_gradient_of_one_argument(self, which):
        check_gradient_of_one_argument(which, "triton")

    def test_no_rows(self):
        check_no_rows("triton")

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_one_part_needs_no_sum(self, dtype, monkeypatch):
        monkeypatch.setattr(_triton.kernels("linear_cross_entropy"), "PROGRAMS", 1)
        check_triton((2,), 37, 700, 16, dtype, True, 1.0)

    def test_many_parts(self, monkeypatch):
        """More parts than the kernels that merge them load at once."""
        kernels = _triton.kernels("linear_cross_entropy")
        monkeypatch.setattr(kernels, "SHORTEST_PART", 1)
        monkeypatch.setitem(kernels.SUMS, "P", 4)
        monkeypatch.setitem(kernels.GRADIENTS, "P", 2)
        check_triton((2,), 37, 330, 40, torch.float32, False, 1.0)
        check_batched_rank("order", True, 390, "triton")

    def test_tiny_distances(self):
        check_tiny_distances()

    @pytest.mark.parametrize("J", [(), (2,)])
    def test_one_gradient_for_all_rows(self, J):
        """The gradient of a sum is one number, which is not repeated in memory."""
        hidden, items, target, _ = case(37, 300, 16, J=J)
        one, all_rows = torch.tensor(0.75).expand(target.shape), torch.full(target.shape, 0.75)
        found = [run(ops.target_logprob, hidden, items, target, grad, backend="triton") for grad in (one, all_rows)]
        for name in ("hidden", "items"):
            assert torch.equal(found[0][1][name], found[1][1][name])

    def test_catalogs_are_independent(self):
        """A row that is not finite spoils the gradients of its own catalog only."""
        hidden, items, target, grad = case(20, 90, 8, J=(3,))
        hidden[1, 4, 2] = torch.nan
        value, gradients = run(ops.target_logprob, hidden, items, target, grad, backend="triton")
        assert value["value"].isnan().sum() == 1 and value["value"][1, 4].isnan()
        assert gradients["hidden"].isnan().any(-1).sum() == 1
        assert gradients["items"][1].isnan().all() and gradients["items"][[0, 2]].isfinite().all()

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_scores_far_from_0(self, dtype):
        check_far_scores(dtype)


@pytest.mark.interpreted
@pytest.mark.parametrize("J", [(), (2,)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_order_of_programs_changes_no_bit(dtype, J, monkeypatch):
    from tests.support import triton_interpreter

    hidden, items, target, grad = (x.to(dtype) if x.is_floating_point() else x for x in case(40, 600, 16, J=J, size=0.3))

    def bits(order):
        with triton_interpreter.interpreted(monkeypatch, order):
            value, gradients = run(ops.target_logprob, hidden, items, target, grad, backend="triton")
            rank = ops.target_logprob_and_rank(hidden, items, target, backend="triton")[1]
        return [rank, *value.values(), *gradients.values()]

    first = bits(None)
    for order in (lambda n: range(n - 1, -1, -1), lambda n: torch.randperm(n).tolist()):
        assert all(map(torch.equal, first, bits(order)))


@pytest.mark.parametrize(("hidden", "reason"), [
    (torch.ones(2, 3), "it runs on an NVIDIA GPU, and the tensors are on cpu"),
    (torch.ones(2, 3).double(), "it takes float32, float16 and bfloat16, and hidden is torch.float64"),
    (torch.ones(2, 257), "it takes 1 to 256 columns, and hidden has 257"),
])  # fmt: skip
def test_triton_says_why_not(hidden, reason):
    with pytest.raises(BackendError, match=reason):
        ops.target_logprob(hidden, hidden, torch.tensor([0, 1]), backend="triton")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_tiny_gradients_reach_the_items(dtype):
    check_tiny_gradients("reference", dtype)


@pytest.mark.interpreted
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_tiny_gradients_reach_the_items_by_the_kernels(dtype, interpreted):
    check_tiny_gradients("triton", dtype)


@pytest.mark.interpreted
@pytest.mark.parametrize("size", [2.0**-8, 1.0, 2.0**12])
def test_gradients_of_very_different_sizes(size, interpreted):
    """The largest gradient sets the unit in which all gradients are multiplied."""
    hidden, items, target = torch.randn(40, 16).half(), torch.randn(70, 16).half(), torch.arange(40)
    upstream = torch.randn(40) * size
    upstream[3] = 0
    how = {"hidden": hidden, "items": items, "target": target, "upstream": upstream}
    result = gradients_of(ops.target_logprob, **how, backend="triton")
    twin = gradients_of(reference.target_logprob, **how)
    truth = gradients_of(reference.target_logprob, **{**how, "hidden": hidden.double(), "items": items.double()})
    oracle.check("gradient", result, twin, truth)
    assert not result["hidden"][3].any()


# With row 0 left out, none of these is an item of the softmax.
WRONG = [0, -1, 90, 91, 2**31, -(2**31), 2**40, 2**63 - 1, -(2**63)]


def wrong_targets(backend, dtype):
    hidden, items = torch.randn(len(WRONG) + 4, 24).to(dtype), torch.randn(90, 24).to(dtype)
    target = torch.tensor([1, *WRONG, 89, 7, 8])
    right = torch.ones(len(target), dtype=torch.bool)
    right[1 : len(WRONG) + 1] = False
    ties = "order" if backend == "triton" else None
    call = LogprobCall.build(hidden, items, target, skip_pad=True, ties=ties)
    logprob, rank, lse = _dispatch.run("linear_cross_entropy", backend, call)
    assert torch.equal(logprob.isnan(), ~right) and torch.equal(lse[:, 1].isnan(), ~right)
    with torch.no_grad():
        wanted, places = ops.target_logprob_and_rank(hidden[right], items, target[right], skip_pad=True, backend="reference")
    torch.testing.assert_close(logprob[right], wanted, rtol=0.02, atol=0.02)
    if rank is not None:
        assert torch.equal(rank[right], places)
        assert (rank[~right] == len(items) - 1).all()
    left = {"grad": torch.ones_like(logprob), "lse": lse, "need_hidden": True, "need_items": True}
    call = LogprobBackwardCall.build(hidden, items, target, skip_pad=True, **left)
    d_hidden, d_items = _dispatch.run("linear_cross_entropy_backward", backend, call)
    assert d_hidden[~right].isnan().all() and d_hidden[right].isfinite().all()
    assert d_items[1:].isnan().all() and not d_items[0].any()


def test_a_target_that_is_no_item_gives_nan(monkeypatch):
    # On a GPU, values are not checked.
    monkeypatch.setattr(LogprobCall, "check_values", lambda call: None)
    wrong_targets("reference", torch.float32)


@pytest.mark.interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_target_that_is_no_item_is_not_read(dtype, interpreted):
    """Every address is checked to be inside a tensor."""
    wrong_targets("triton", dtype)
