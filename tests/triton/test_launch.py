"""The launch wrapper: which launches it rejects, and what it checks. A recorder replaces the kernel; nothing is compiled."""

import os

import pytest
import torch
from lares_fast.kernels import _launch


class Recorder:
    """Replaces a jitted kernel."""

    def __init__(self):
        self.launches = []
        self.fn = self.recorder

    def recorder(self):
        pass

    def __getitem__(self, grid):
        return lambda *arguments, **options: self.launches.append((grid, arguments, options))


@pytest.fixture
def kernel(monkeypatch):
    monkeypatch.setattr(_launch, "_ran", set())
    return Recorder()


def test_a_launch(kernel):
    x = torch.zeros(4)
    _launch.launch(kernel, 5, x, 3, warps=2, S=16)
    assert kernel.launches == [((5,), (x, 3), {"S": 16, "num_warps": 2, "num_stages": 1, "enable_fp_fusion": True})]


def test_no_programs_are_no_launch(kernel):
    _launch.launch(kernel, 0, torch.zeros(4), warps=2)
    assert not kernel.launches


@pytest.mark.parametrize("programs", [-1, 2**31])
def test_a_grid_that_would_be_skipped_is_refused(kernel, programs):
    with pytest.raises(ValueError, match=f"the call needs {programs}"):
        _launch.launch(kernel, programs, torch.zeros(4), warps=2)


@pytest.mark.parametrize("tensor", [torch.zeros(4, 4).T, torch.zeros(5)[1:]])
def test_strides_and_addresses_are_checked(kernel, tensor):
    with pytest.raises(ValueError, match="contiguous tensors at addresses that 16 divides"):
        _launch.launch(kernel, 1, tensor, warps=2)
    ready = _launch.ready(tensor)
    assert torch.equal(ready, tensor)
    _launch.launch(kernel, 1, ready, warps=2)
    assert len(kernel.launches) == 1


def test_what_is_ready_is_not_copied():
    x = torch.zeros(4, 4)
    assert _launch.ready(x).data_ptr() == x.data_ptr()


def test_tensors_of_two_devices_are_refused(kernel):
    with pytest.raises(ValueError, match="tensors on cpu and meta"):
        _launch.launch(kernel, 1, torch.zeros(4), torch.zeros(4, device="meta"), warps=2)


def test_a_first_launch_within_a_capture_is_refused(kernel, monkeypatch):
    monkeypatch.setattr(_launch, "_capturing", lambda device: True)
    with pytest.raises(RuntimeError, match="was not run before the graph capture"):
        _launch.launch(kernel, 1, torch.zeros(4), warps=2)
    monkeypatch.setattr(_launch, "_capturing", lambda device: False)
    _launch.launch(kernel, 1, torch.zeros(4), warps=2)
    monkeypatch.setattr(_launch, "_capturing", lambda device: True)
    _launch.launch(kernel, 1, torch.ones(4), warps=2)
    with pytest.raises(RuntimeError):
        _launch.launch(kernel, 1, torch.zeros(4).half(), warps=2)
    assert len(kernel.launches) == 2


def test_the_device_of_the_tensors_is_made_current(monkeypatch):
    entered = []

    class Guard:
        def __init__(self, device):
            self.device = device

        def __enter__(self):
            entered.append(self.device)

        def __exit__(self, *_):
            pass

    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "device", Guard)
    for device in ("cuda:0", "cuda:1", "cpu"):
        with _launch._on(torch.device(device)):
            pass
    assert entered == [torch.device("cuda:1")]


def test_a_stand_in_takes_the_place_of_the_launch(kernel):
    seen = []
    token = _launch.stand_in.set(lambda *call: seen.append(call))
    try:
        x = torch.zeros(4, device="meta")
        _launch.launch(kernel, 5, x, 3, warps=2, S=16)
        with pytest.raises(ValueError, match="the call needs -1"):
            _launch.launch(kernel, -1, x, warps=2)
    finally:
        _launch.stand_in.reset(token)
    assert not kernel.launches
    assert seen == [(kernel, 5, (x, 3), {"S": 16, "num_warps": 2, "num_stages": 1, "enable_fp_fusion": True})]


@pytest.mark.parametrize(
    ("architecture", "ptxas", "forbidden"),
    [
        (90, (12, 8), True),
        (90, (13, 2), True),
        (90, (0,), True),
        (90, (13, 3), False),
        (80, (12, 8), False),
        (None, (0,), False),
    ],
)
def test_wgmma_is_off_where_the_assembler_gets_it_wrong(architecture, ptxas, forbidden, monkeypatch):
    monkeypatch.setattr(_launch, "_ptxas", lambda architecture: ptxas)
    for before in (None, "0"):
        if before is None:
            monkeypatch.delenv("DISABLE_MMA_V3", raising=False)
        else:
            monkeypatch.setenv("DISABLE_MMA_V3", before)
        with _launch.avoid_broken_wgmma(architecture):
            assert (os.environ.get("DISABLE_MMA_V3") == "1") == forbidden
        assert os.environ.get("DISABLE_MMA_V3") == before


def test_the_assembler_tells_its_version():
    assert _launch._ptxas(90) >= (12, 0)


def test_one_thread_compiles_at_a_time(kernel, monkeypatch):
    """A compilation for another GPU must not see the environment variable that is set for Hopper."""
    held = []
    monkeypatch.setattr(Recorder, "__getitem__", lambda self, grid: lambda *_, **__: held.append(_launch._compiling.locked()))
    x = torch.zeros(4)
    _launch.launch(kernel, 1, x, warps=2)
    _launch.launch(kernel, 1, x, warps=2)
    assert held == [True, False]
    for architecture in (80, 90, 100):
        with _launch.avoid_broken_wgmma(architecture):
            assert _launch._compiling.locked()
    assert not _launch._compiling.locked()
