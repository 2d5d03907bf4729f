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
    check_gradient_of_one_argument,
    check_infinities_and_nan,
    check_large_logits,
    check_no_rows,
    check_rank,
    check_saturated,
    run,
)

# M, N, D, dtype, skip_pad, scale. A tile has 16, 32 or 64 rows, depending on the bytes of a row. A part has at least 8 tiles.
TRITON = [
    (1, 1, 1, torch.float32, False, 1.0),
    (5, 63, 17, torch.float32, False, 0.5),
    (64, 65, 16, torch.float32, True, 1 / 0.07),
    (33, 600, 64, torch.float32, True, 1.0),
    (15, 257, 130, torch.float32, False, 1.0),
    (17, 300, 256, torch.bfloat16, True, 1.0),
    (65, 64, 32, torch.bfloat16, False, 0.5),
    (31, 129, 64, torch.bfloat16, True, 1.0),
    (32, 520, 24, torch.float16, False, 1.0),
    (2, 2, 8, torch.float16, True, 1.0),
]


def check_triton(M, N, D, dtype, skip_pad, scale):
    hidden, items, target, grad = case(M, N, D, skip_pad=skip_pad, size=D**-0.5)
    inputs = [x.to(dtype) for x in (hidden, items)]
    check("target_logprob", *inputs, target, grad.to(dtype), backend="triton", scale=scale, skip_pad=skip_pad)


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


@pytest.mark.interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_order_of_programs_changes_no_bit(dtype, monkeypatch):
    from tests.support import triton_interpreter

    hidden, items, target, grad = (x.to(dtype) if x.is_floating_point() else x for x in case(40, 600, 16, size=0.3))

    def bits(order):
        with triton_interpreter.interpreted(monkeypatch, order):
            value, gradients = run(ops.target_logprob, hidden, items, target, grad, backend="triton")
            rank = ops.target_logprob_and_rank(hidden, items, target, backend="triton")[1]
        return [rank, *value.values(), *gradients.values()]

    first = bits(None)
    for order in (lambda n: range(n - 1, -1, -1), lambda n: torch.randperm(n).tolist()):
        assert all(map(torch.equal, first, bits(order)))


TRITON_BUGS = {
    "one item too many": ("(item[None, :] < high) & (item[None, :] !=", "(item[None, :] <= high) & (item[None, :] !="),
    "PAD is not skipped": ("len(items), int(skip_pad)", "len(items), 0"),
    "scale forgotten in the backward": ("p = tl.exp(raw * scale -", "p = tl.exp(raw -"),
    "a tile of items without gradient": ('triton.cdiv(N, run.keywords["S"])', 'N // run.keywords["S"]'),
    "a tile of rows unwritten": (
        "run(softmax_backward_hidden, tiles * parts,",
        "run(softmax_backward_hidden, tiles * parts - 1,",
    ),
    "a part written to the first": ("tl.store(COUNT + number * M + row", "tl.store(COUNT + row"),
    "sum not moved with its origin": ("total = total * shrink", "total = total * 1"),
    "the target's own column": ("miss[:, None], -p)", "-p, -p)"),
}


@pytest.mark.interpreted
@pytest.mark.parametrize("bug", TRITON_BUGS)
def test_a_bug_planted_in_triton_is_caught(bug, monkeypatch, tmp_path):
    from triton.runtime.errors import InterpreterError

    from tests.support import triton_interpreter

    stem = "linear_cross_entropy"
    triton_interpreter.plant(monkeypatch, tmp_path, (stem,), stem, *TRITON_BUGS[bug])
    with triton_interpreter.interpreted(monkeypatch), pytest.raises((AssertionError, InterpreterError)):
        check_triton(37, 1030, 16, torch.float32, True, 0.5)
        check_rank("order", True, 1030, "triton")


@pytest.mark.parametrize(("hidden", "reason"), [
    (torch.ones(2, 3), "it runs on an NVIDIA GPU, and the tensors are on cpu"),
    (torch.ones(2, 3).double(), "it takes float32, float16 and bfloat16, and hidden is torch.float64"),
    (torch.ones(2, 257), "it takes 1 to 256 columns, and hidden has 257"),
])  # fmt: skip
def test_triton_says_why_not(hidden, reason):
    with pytest.raises(BackendError, match=reason):
        ops.target_logprob(hidden, hidden, torch.tensor([0, 1]), backend="triton")


def gradients(function, hidden, items, target, upstream, **options):
    hidden, items = (x.clone().requires_grad_() for x in (hidden, items))
    function(hidden, items, target, **options).backward(upstream.to(hidden.dtype))
    return {"hidden": hidden.grad, "items": items.grad}


def tiny(backend, dtype):
    """Check the mean over many rows: half precision holds the sum of (probability times gradient), but not a single term."""
    M, N, D = 256, 1000, 16
    hidden, items = (torch.randn(M, D) * 0.05 + 0.1).to(dtype), (torch.randn(N, D) + 0.5).to(dtype)
    target, upstream = torch.arange(M) % 3, torch.full((M,), 2.0**-16)
    # A value below half of the smallest number is rounded to 0.
    assert 2.0**-16 / N < 2.0**-25
    how = {"hidden": hidden, "items": items, "target": target, "upstream": upstream}
    result = gradients(ops.target_logprob, **how, backend=backend)
    twin = gradients(reference.target_logprob, **how)
    truth = gradients(reference.target_logprob, **{**how, "hidden": hidden.double(), "items": items.double()})
    oracle.check("gradient", result, twin, truth)
    # The tolerances hardly depend on the items that are no targets. A lost product would leave an error of their whole size.
    rest, wanted = result["items"][3:].double(), truth["items"][3:]
    assert (rest - wanted).abs().max() <= 2.0**-24 + 0.05 * wanted.abs().max() < 0.5 * wanted.abs().max()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_tiny_gradients_reach_the_items(dtype):
    tiny("reference", dtype)


@pytest.mark.interpreted
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_tiny_gradients_reach_the_items_by_the_kernels(dtype, interpreted):
    tiny("triton", dtype)


@pytest.mark.interpreted
@pytest.mark.parametrize("size", [2.0**-8, 1.0, 2.0**12])
def test_gradients_of_very_different_sizes(size, interpreted):
    """The largest gradient sets the unit in which all gradients are multiplied."""
    hidden, items, target = torch.randn(40, 16).half(), torch.randn(70, 16).half(), torch.arange(40)
    upstream = torch.randn(40) * size
    upstream[3] = 0
    how = {"hidden": hidden, "items": items, "target": target, "upstream": upstream}
    result = gradients(ops.target_logprob, **how, backend="triton")
    twin = gradients(reference.target_logprob, **how)
    truth = gradients(reference.target_logprob, **{**how, "hidden": hidden.double(), "items": items.double()})
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
    assert torch.equal(logprob.isnan(), ~right) and torch.equal(lse.isnan(), ~right)
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
