"""The native backend of ``linear_cross_entropy``: planted bugs are caught, and threads, batches and forks change no bit."""

import multiprocessing
import threading
from dataclasses import replace

import pytest
import torch

from lares_fast.ops import _linear_cross_entropy_native
from lares_fast.ops._catalog_calls import LogprobBackwardCall, LogprobCall
from tests.support.catalog_cases import needs_native, plant
from tests.support.softmax_cases import case, check


def forward(hidden, items, target, *, threads=None, **options):
    return _linear_cross_entropy_native.forward(LogprobCall.build(hidden, items, target, **options), threads)


def backward(grad, hidden, items, target, lse, *, threads=None):
    call = LogprobBackwardCall.build(hidden, items, target, grad=grad, lse=lse, need_hidden=True, need_items=True)
    return _linear_cross_entropy_native.backward(call, threads)


FORWARD = {
    "PAD is not skipped": lambda run: lambda call: run(replace(call, skip_pad=False)),
    "scale is forgotten": lambda run: lambda call: run(replace(call, scale=1.0)),
    "last item unseen": lambda run: lambda call: run(replace(call, items=torch.cat((call.items[:-1], call.items[-1:] - 50)))),
}
BACKWARD = {
    "PAD is not skipped": lambda run: lambda call: run(replace(call, skip_pad=False)),
    "gradients lack the scale": lambda run: lambda call: [gradient / call.scale for gradient in run(call)],
    "upstream gradient is uniform": lambda run: lambda call: run(replace(call, grad=call.grad.mean().expand(len(call.grad)))),
    "one tile of items without gradient": lambda run: lambda call: _zeroed(run(call), 1),
    "one tile of rows without gradient": lambda run: lambda call: _zeroed(run(call), 0),
    "the target's own column": lambda run: lambda call: run(replace(call, target=call.target % (len(call.items) - 1) + 1)),
}


def _zeroed(gradients, which):
    gradients[which][4:8] = 0
    return gradients


def check_all_options():
    for J in ((), (2,)):
        hidden, items, target, grad = case(37, 150, 16, J=J, skip_pad=True)
        check("target_logprob", hidden, items, target, grad, backend="native", scale=0.5, skip_pad=True)


@needs_native
@pytest.mark.parametrize(
    ("op", "bug"),
    [
        *(("linear_cross_entropy", bug) for bug in FORWARD.items()),
        *(("linear_cross_entropy_backward", bug) for bug in BACKWARD.items()),
    ],
    ids=lambda x: x if isinstance(x, str) else x[0],
)
def test_a_planted_bug_is_caught(op, bug, monkeypatch):
    check_all_options()
    plant(monkeypatch, op, "native", bug[1])
    with pytest.raises(AssertionError):
        check_all_options()


@needs_native
class TestDeterminism:
    def test_threads(self):
        hidden, items, target, grad = case(300, 9000, 20)
        one = forward(hidden, items, target, ties="order", threads=1)
        gradients = backward(grad, hidden, items, target, one[2], threads=1)
        for threads in (2, 3, 16):
            again = forward(hidden, items, target, ties="order", threads=threads)
            assert all(map(torch.equal, one, again))
            more = backward(grad, hidden, items, target, one[2], threads=threads)
            assert all(map(torch.equal, gradients, more))

    def test_rows_do_not_depend_on_the_batch(self):
        hidden, items, target, grad = case(300, 2500, 20)
        logprob, rank, lse = forward(hidden, items, target, ties="order")
        d_hidden = backward(grad, hidden, items, target, lse)[0]
        for size in (1, 2, 7, 299):
            for rows in torch.arange(300).split(size)[:5]:
                part = forward(hidden[rows], items, target[rows], ties="order")
                assert all(map(torch.equal, part, (logprob[rows], rank[rows], lse[rows])))
                own = backward(grad[rows], hidden[rows], items, target[rows], lse[rows])[0]
                assert torch.equal(own, d_hidden[rows])

    def test_catalogs_and_ranks_do_not_depend_on_each_other(self):
        hidden, items, target, grad = case(30, 900, 20, J=(3,))
        logprob, rank, lse = forward(hidden, items, target, ties="order")
        d_hidden, d_items = backward(grad, hidden, items, target, lse)
        for j in range(3):
            one = forward(hidden[j], items[j], target[j], ties="order")
            assert all(map(torch.equal, one, (logprob[j], rank.view(3, 30)[j], lse[j])))
            assert all(map(torch.equal, backward(grad[j], hidden[j], items[j], target[j], lse[j]), (d_hidden[j], d_items[j])))
        for ranked in (0, 1, 30, 41, 90):
            some = forward(hidden, items, target, ties="order", ranked=ranked)
            assert all(map(torch.equal, some, (logprob, rank[:ranked], lse)))

    def test_many_python_threads_at_once(self):
        hidden, items, target, grad = case(64, 5000, 16)
        expected, results = self.work(hidden, items, target, grad), []
        workers = [threading.Thread(target=lambda: results.append(self.work(hidden, items, target, grad))) for _ in range(4)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        assert len(results) == 4
        assert all(torch.equal(a, b) for result in results for a, b in zip(result, expected, strict=True))

    def test_after_a_fork(self):
        arguments = case(64, 5000, 16)
        expected = self.work(*arguments)
        context = multiprocessing.get_context("fork")
        answer = context.SimpleQueue()
        child = context.Process(target=lambda: answer.put([x.numpy() for x in self.work(*arguments)]))
        child.start()
        found = answer.get()
        child.join(60)
        assert child.exitcode == 0
        assert all(torch.equal(torch.from_numpy(a), b) for a, b in zip(found, expected, strict=True))

    @staticmethod
    def work(hidden, items, target, grad):
        logprob, _, lse = forward(hidden, items, target, threads=2)
        return [logprob, *backward(grad, hidden, items, target, lse, threads=2)]
