"""The native module beside other threads and processes: Python threads, forks, and the number of threads of torch."""

import contextlib
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from lares_fast.ops import _linear_cross_entropy_native as softmax
from lares_fast.ops._catalog_calls import LogprobBackwardCall, LogprobCall
from lares_fast.ops._catalog_index import build_index
from tests.reliability.threads import EXIT, environment
from tests.support.catalog_cases import native_ranks, native_topk, needs_native, same, whole_numbers

pytestmark = needs_native
ROOT = Path(__file__).parents[1]


def on_all_ops(seed=0):
    """Return the answers of every catalog op on the same data, as one list of tensors."""
    query, items, bias, exclude = whole_numbers(seed, 9, 70_000, 8, longest=20)
    target = torch.arange(9) * 7000
    return [
        *native_topk(query, items, 20, bias=bias, exclude=exclude, threads=2),
        *native_topk(query, items, 20, exclude=exclude, index=build_index(items, threads=2), threads=2),
        *native_ranks(query, items, target, bias=bias, exclude=exclude, threads=2),
    ]


def test_several_python_threads_at_once_get_their_own_answers():
    expected = [on_all_ops(seed) for seed in range(4)]
    found = [None] * 4

    def work(seed):
        for _ in range(3):
            found[seed] = on_all_ops(seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for got, wanted in zip(found, expected, strict=True):
        same(got, wanted)


FORK = """
import os, sys
sys.path.append(sys.argv[1])
from tests import test_native_threads as here
before = here.on_all_ops()
child = os.fork()
if child == 0:
    here.same(here.on_all_ops(), before)
    os._exit(7)
here.same(here.on_all_ops(), before)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) != 7)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_works_after_a_fork():
    done = subprocess.run(
        [sys.executable, "-P", "-c", FORK, str(ROOT)], env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_the_interpreter_may_end_while_daemon_threads_are_inside_calls():
    command = [sys.executable, "-P", "-c", EXIT, "0.05"]
    done = subprocess.run(
        command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=120, check=False
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")


@contextlib.contextmanager
def ticking():
    """Run a Python thread that records the time and the number of threads of this process, again and again."""
    ticks, stop = [], threading.Event()

    def tick():
        while not stop.wait(0.001):
            ticks.append((time.perf_counter(), len(os.listdir("/proc/self/task")) if os.path.isdir("/proc/self/task") else 0))

    thread = threading.Thread(target=tick)
    thread.start()
    try:
        yield ticks
    finally:
        stop.set()
        thread.join()


def zeros(query, dtype=torch.int64):
    return torch.zeros(len(query), dtype=dtype)


def backward_call(query, items):
    left = {"grad": zeros(query, torch.float32), "lse": torch.zeros(len(query), 2, dtype=torch.float64)}
    return LogprobBackwardCall.build(query, items, zeros(query), **left, need_hidden=True, need_items=True)


LONG_CALLS = {
    "topk": lambda query, items: native_topk(query, items, 10),
    "build_index": lambda query, items: build_index(items),
    "target_rank": lambda query, items: native_ranks(query, items, zeros(query)),
    "target_logprob": lambda query, items: softmax.forward(LogprobCall.build(query, items, zeros(query))),
    "target_logprob_backward": lambda query, items: softmax.backward(backward_call(query, items)),
}


@pytest.mark.parametrize("op", LONG_CALLS)
def test_other_python_threads_run_meanwhile(op):
    """The call holds no lock of Python, so a second thread runs during the call."""
    query, items = torch.randn(512, 64), torch.randn(300_000, 64)
    with ticking() as ticks:
        began = time.perf_counter()
        LONG_CALLS[op](query, items)
        took = time.perf_counter() - began
    assert any(began + 0.3 * took < at < began + 0.7 * took for at, _ in ticks)


@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="this system does not list a process's threads")
@pytest.mark.parametrize("op", ["topk", "target_rank", "target_logprob", "target_logprob_backward"])
def test_torch_decides_the_number_of_threads(op):
    query, items = torch.randn(512, 64), torch.randn(300_000, 64)
    torch.set_num_threads(1)
    LONG_CALLS[op](query[:1], items)
    seen = {}
    for threads in (1, 3):
        torch.set_num_threads(threads)
        try:
            with ticking() as ticks:
                before = len(os.listdir("/proc/self/task"))
                LONG_CALLS[op](query, items)
        finally:
            torch.set_num_threads(1)
        seen[threads] = max(count for _, count in ticks) - before
    assert seen == {1: 0, 3: 2}
