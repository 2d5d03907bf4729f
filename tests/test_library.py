"""Calls of ops go past PyTorch's dispatcher, unless something watches or changes them."""

import sys
import threading
from contextlib import nullcontext

import pytest
import torch
from torch.profiler import profile
from torch.utils._python_dispatch import TorchDispatchMode

from lares_fast import LARESConfig, _dispatch, ops, reference

HIDDEN, ITEMS, TARGET = torch.randn(3, 8), torch.randn(9, 8), torch.tensor([1, 2, 8])


@pytest.fixture
def dispatched(monkeypatch):
    """Return a list that gets an entry for each call of ``target_logprob`` that PyTorch's dispatcher sees."""
    op, seen = sys.modules["lares_fast.ops.linear_cross_entropy"]._OP, []
    registered = op._registered

    def watched(*arguments):
        seen.append(arguments)
        return registered(*arguments)

    monkeypatch.setattr(op, "_registered", watched)
    return seen


def call(hidden=HIDDEN):
    return ops.target_logprob(hidden, ITEMS, TARGET)


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("mode", [nullcontext, torch.no_grad, torch.inference_mode, lambda: torch.autocast("cpu")])
def test_a_plain_call_does_not_need_the_dispatcher(mode, grad, dispatched):
    with mode():
        call(HIDDEN.clone().requires_grad_(grad))
        call(torch.nn.Parameter(HIDDEN, requires_grad=grad))
    assert not dispatched


class Mode(TorchDispatchMode):
    """Records the ops that it sees."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(str(function))
        return function(*args, **(kwargs or {}))


class Subclass(torch.Tensor):
    pass


def in_a_mode():
    with Mode() as mode:
        call()
    assert "lares_fast.target_logprob.default" in mode.names


def in_a_function_mode():
    with torch.device("cpu"):
        call()


def under_a_profiler():
    with profile() as found:
        call()
    assert "lares_fast::target_logprob" in {event.key for event in found.key_averages()}


def in_a_transform():
    both = torch.func.vmap(call)(torch.stack((HIDDEN, -HIDDEN)))
    torch.testing.assert_close(both, torch.stack((call(), call(-HIDDEN))))


def in_a_trace():
    traced = torch.jit.trace(call, HIDDEN)
    assert "lares_fast::target_logprob" in str(traced.graph)


def negated():
    """The imaginary part of a conjugate is a view that PyTorch negates when it is read."""
    hidden = torch.complex(HIDDEN, HIDDEN).conj().imag
    assert hidden.is_neg()
    torch.testing.assert_close(call(hidden), call(-HIDDEN))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize(
    "watched",
    [
        in_a_mode,
        in_a_function_mode,
        under_a_profiler,
        in_a_transform,
        in_a_trace,
        negated,
        lambda: call(HIDDEN.as_subclass(Subclass)),
    ],
)
def test_what_watches_or_changes_calls_sees_them(watched, dispatched):
    watched()
    assert dispatched


def test_both_ways_give_the_same_gradients():
    def gradients(mode):
        leaves = [x.clone().requires_grad_() for x in (HIDDEN, ITEMS)]
        with mode:
            out = ops.target_logprob(*leaves, TARGET)
            (out * torch.arange(3)).sum().backward()
        return out.detach(), *(x.grad for x in leaves)

    for plain, dispatched in zip(gradients(nullcontext()), gradients(Mode()), strict=True):
        assert torch.equal(plain, dispatched)


@pytest.mark.parametrize("mode", [nullcontext, Mode])
def test_an_op_without_a_gradient_says_so_both_ways(mode):
    with mode():
        scores, _ = ops.topk(HIDDEN.clone().requires_grad_(), ITEMS, 2)
        with pytest.raises(NotImplementedError, match="topk has no gradient"):
            scores.sum().backward()


def embedding(width=16):
    tables = torch.randn(9, width), torch.randn(5, width), torch.ones(width), torch.zeros(width)
    leaves = [x.requires_grad_() for x in tables]
    return ops.embedding(torch.tensor([1, 2, 8]), torch.tensor([0, 1, 3]), *leaves)


def recurrence(width=16):
    weights = list(reference.Recurrence(LARESConfig(n_items=9, hidden_size=width, inner_size=32)).parameters())
    return ops.recurrence(torch.randn(3, width), torch.tensor([0, 1, 3]), weights, n_heads=2, pre=torch.randn(3, width))


BACKWARDS = {
    "embedding": embedding,
    "linear_cross_entropy_backward": lambda: call(HIDDEN.clone().requires_grad_()),
    "recurrence_backward": recurrence,
}


@pytest.mark.parametrize("mode", [nullcontext, Mode])
@pytest.mark.parametrize("op", BACKWARDS)
def test_a_backward_in_another_thread_requests_what_its_forward_requested(op, mode):
    """As on a GPU, where autograd has a thread of its own."""
    with ops.backend("reference"), mode():
        out = BACKWARDS[op]()
    for request in (ops.backend("native"), nullcontext()):
        _dispatch.calls.clear()

        def run(request=request):
            with request:
                out.sum().backward(retain_graph=True)

        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
        assert {backend for name, backend in _dispatch.calls if name == op} == {"reference"}
