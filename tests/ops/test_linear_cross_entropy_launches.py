"""How many launches the op needs on a GPU: Triton launches, and torch operations that compute or copy.

Views and allocations are no launches. The launches are counted on the CPU, where no kernel runs.
"""

import pytest
import torch

from lares_fast import ops
from tests.support.launches import counted
from tests.support.softmax_cases import case

MERGE = ["merge_sums", "softmax_forward"]
BACKWARD = ["merge_gradients", "prepare_backward", "softmax_backward_hidden", "softmax_backward_items"]


@pytest.fixture
def launches():
    """Count the launches of a call: ``launches(call)`` returns their sorted names and the result."""

    def names(call):
        with counted() as found:
            result = call()
        # aten.neg.default -> neg
        return sorted(name.split(".")[1] if "." in name else name for name in found.elements()), result

    return names


def leaves(J, M, N, dtype):
    hidden, items, target, grad = case(M, N, 64, J=J)
    return hidden.to(dtype).requires_grad_(), items.to(dtype).requires_grad_(), target, grad.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("J", "M", "N"), [((), 40, 2000), ((4,), 100, 1000)])
@pytest.mark.parametrize(("reduction", "forward", "backward"), [
    ("none", ["neg"], ["neg"]), ("mean", ["mean", "neg"], ["neg", "div"]), ("sum", ["sum", "neg"], ["neg"]),
])  # fmt: skip
def test_cross_entropy(reduction, forward, backward, J, M, N, dtype, launches):
    hidden, items, target, grad = leaves(J, M, N, dtype)
    names, loss = launches(lambda: ops.linear_cross_entropy(hidden, items, target, reduction=reduction, backend="triton"))
    assert names == sorted(MERGE + forward)
    upstream = grad if reduction == "none" else torch.ones_like(loss)
    names, _ = launches(lambda: torch.autograd.grad(loss, (hidden, items), upstream))
    assert names == sorted(backward + BACKWARD)


@pytest.mark.parametrize("ranked", [None, 0, 17])
@pytest.mark.parametrize(("J", "M", "N"), [((), 40, 2000), ((4,), 100, 1000)])
def test_rank(J, M, N, ranked, launches):
    hidden, items, target, grad = leaves(J, M, N, torch.bfloat16)
    call = lambda: ops.target_logprob_and_rank(hidden, items, target, ranked=ranked, backend="triton")  # noqa: E731
    names, (logprob, _) = launches(call)
    assert names == MERGE
    names, _ = launches(lambda: torch.autograd.grad(logprob, (hidden, items), grad))
    assert names == BACKWARD


@pytest.mark.parametrize(("which", "expected"), [
    (0, ["merge_gradients", "prepare_backward", "softmax_backward_hidden"]),
    (1, ["prepare_backward", "softmax_backward_items"]),
])  # fmt: skip
def test_only_what_is_needed_is_launched(which, expected, launches):
    hidden, items, target, grad = leaves((), 40, 2000, torch.bfloat16)
    tensors = [hidden, items]
    tensors[1 - which] = tensors[1 - which].detach()
    _, logprob = launches(lambda: ops.target_logprob(*tensors, target, backend="triton"))
    names, _ = launches(lambda: torch.autograd.grad(logprob, tensors[which], grad))
    assert names == expected


def test_one_part_is_not_merged(launches):
    hidden, items, target, grad = leaves((), 40, 100, torch.bfloat16)
    _, logprob = launches(lambda: ops.target_logprob(hidden, items, target, backend="triton"))
    names, _ = launches(lambda: torch.autograd.grad(logprob, (hidden, items), grad))
    assert names == ["prepare_backward", "softmax_backward_hidden", "softmax_backward_items"]


def test_a_copy_is_counted(launches):
    x = torch.ones(3, 4)
    assert launches(lambda: x.t().contiguous() + 1)[0] == ["add", "clone"]
    assert launches(lambda: x.view(12)[3:].detach())[0] == []
