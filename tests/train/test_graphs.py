"""Which steps run launch by launch, which are captured and which are replayed, with a stand-in for a capture."""

from contextlib import contextmanager

import pytest
import torch

from lares_fast import ops
from lares_fast.train.graphs import CudaCapture, Graphs, capture_on
from lares_fast.train.parcel import Parcel

CPU = torch.device("cpu")


class Recorder:
    """A step that adds up what it gets, and a stand-in for a capture: its replay runs the function of the capture again.

    As on a GPU, a capture runs nothing, and a replay sees only what is in the tensors of the capture.
    """

    def __init__(self, fault=None):
        self.fault, self.log, self.sums = fault, [], torch.zeros(4, dtype=torch.float64)
        self.told = []

    def step(self, content):
        seed, values, _ = content
        self.log.append(("step", len(values)))
        self.sums.add_(torch.stack([seed[0] * values.sum(), seed[0], values.sum(), torch.ones(())]))

    def capture(self, function):
        self.log.append("capture")
        if self.fault is not None:
            try:
                raise self.fault
            finally:
                # As the end of a capture does. It hides the error before it.
                if isinstance(self.fault, RuntimeError):
                    raise RuntimeError("operation failed due to a previous error during capture")

        def replay():
            self.log.append("replay")
            function()
            assert self.log.pop()[0] == "step"

        return replay

    def graphs(self, **options):
        return Graphs(self.step, CPU, self.capture, self.told.append, **options)


def parcel(size, seed=1, plain=0):
    return Parcel((torch.tensor([seed]), torch.arange(float(size)) + seed, plain), pinned=False)


def test_the_first_step_of_a_size_runs_the_second_is_captured_and_later_ones_are_replayed():
    recorder = Recorder()
    graphs = recorder.graphs()
    for size in (5, 5, 7, 5, 7, 7):
        graphs.run(parcel(size))
    step = [("step", 5), "capture", "replay", ("step", 7), "replay", "capture", "replay", "replay"]
    assert recorder.log == step and len(graphs) == 2


def test_values_change_between_replays_and_give_what_single_launches_give():
    """The seed is among the values, so that every replay has masks of its own."""
    expected, found = Recorder(), Recorder()
    graphs = found.graphs()
    for seed in range(1, 30):
        size = 5 + seed % 3
        expected.step(parcel(size, seed).opened(parcel(size, seed).host))
        graphs.run(parcel(size, seed))
    assert found.log.count("replay") == 29 - 3
    assert torch.equal(found.sums, expected.sums)


def test_a_plain_value_makes_another_graph():
    recorder = Recorder()
    graphs = recorder.graphs()
    for plain in (4, 4, 8, 8):
        graphs.run(parcel(5, plain=plain))
    assert len(graphs) == 2


def test_the_graph_that_was_not_used_for_longest_goes():
    recorder = Recorder()
    graphs = recorder.graphs(most=2)
    for size in (1, 1, 2, 2, 1, 3, 3):
        graphs.run(parcel(size))
    recorder.log.clear()
    # 1 was used after 2, so it is there, and 2 is captured again without another step of its own.
    for size in (1, 2):
        graphs.run(parcel(size))
    assert recorder.log == ["replay", "capture", "replay"] and len(graphs) == 2


def test_a_batch_that_is_not_full_is_never_captured():
    recorder = Recorder()
    graphs = recorder.graphs()
    for _ in range(3):
        graphs.run(parcel(5), captured=False)
    assert recorder.log == [("step", 5)] * 3
    graphs.run(parcel(5))
    assert recorder.log == [("step", 5)] * 4


def test_without_a_capture_every_step_runs():
    recorder = Recorder()
    graphs = Graphs(recorder.step, CPU, None, recorder.told.append)
    for _ in range(3):
        graphs.run(parcel(5))
    assert recorder.log == [("step", 5)] * 3


def test_a_capture_that_fails_is_told_once_and_all_steps_are_done():
    recorder, expected = Recorder(RuntimeError("operation not permitted\nwhen stream is capturing.")), Recorder()
    graphs = recorder.graphs()
    for seed in range(1, 6):
        graphs.run(parcel(5, seed))
        expected.step(parcel(5, seed).opened(parcel(5, seed).host))
    assert recorder.log == [("step", 5), "capture", *[("step", 5)] * 4]
    assert torch.equal(recorder.sums, expected.sums)
    (text,) = recorder.told
    assert text == (
        "the steps run launch by launch, which is slower, because a CUDA graph could not be captured: "
        "operation not permitted when stream is capturing."
    )


@pytest.mark.parametrize("error", [RuntimeError("CUDA out of memory. Tried"), torch.OutOfMemoryError("no")])
def test_too_little_memory_is_no_reason_to_go_on(error):
    recorder = Recorder(error)
    graphs = recorder.graphs()
    graphs.run(parcel(5))
    with pytest.raises(type(error)):
        graphs.run(parcel(5))
    assert not recorder.told


def test_a_mistake_in_the_step_is_not_hidden():
    recorder = Recorder(KeyError("a mistake"))
    graphs = recorder.graphs()
    graphs.run(parcel(5))
    with pytest.raises(KeyError):
        graphs.run(parcel(5))


# The calls of CUDA.


class Stream:
    """A stand-in for a stream, with a log of the streams that it waited for."""

    def __init__(self, *_):
        self.waited = []

    def wait_stream(self, other):
        self.waited.append(other)


@pytest.fixture
def cuda(monkeypatch):
    """Replace the streams and graphs of ``torch.cuda``, and return what has the current stream and the graphs."""

    class Cuda:
        current, graphs = Stream(), []

    @contextmanager
    def on(stream):
        before, Cuda.current = Cuda.current, stream
        yield
        # As in PyTorch, an error leaves the stream as it is.
        Cuda.current = before

    class Graph:
        def __init__(self):
            Cuda.graphs.append(self)

        def replay(self):
            raise NotImplementedError

    stand_ins = {
        "Stream": Stream, "CUDAGraph": Graph, "graph_pool_handle": object, "current_stream": lambda device=None: Cuda.current,
        "device": lambda device: on(Cuda.current), "stream": on, "graph": lambda graph, pool, stream: on(stream),
        "set_stream": lambda stream: setattr(Cuda, "current", stream),
    }  # fmt: skip
    for name, value in stand_ins.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(CudaCapture, "failed", [])
    return Cuda


GPU = torch.device("cuda", 0)


def test_steps_and_captures_share_a_stream_that_keeps_the_order_of_launches(cuda):
    capture, around, seen = CudaCapture(GPU), cuda.current, []
    with capture.stream():
        side = cuda.current
        assert side is not around and side.waited == [around]
        assert capture(lambda: seen.append(cuda.current)) == cuda.graphs[0].replay
    assert seen == [side] and cuda.current is around and around.waited == [side]


def test_no_capture_follows_one_that_failed(cuda):
    capture, around = capture_on(GPU, None), cuda.current

    def fail():
        raise RuntimeError("not permitted")

    with pytest.raises(RuntimeError):
        capture(fail)
    assert cuda.current is around
    # PyTorch may still refer to the graph.
    assert CudaCapture.failed == cuda.graphs and capture_on(GPU, None) is None


def test_only_kernels_are_captured(cuda):
    assert capture_on(GPU, "triton") is not None
    assert capture_on(GPU, "reference") is None and capture_on(CPU, None) is None
    with ops.backend("layers"):
        assert capture_on(GPU, None) is None
