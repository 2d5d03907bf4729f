"""The launch wrapper: which launches it rejects, and what it checks. A recorder replaces the kernel; nothing is compiled."""

import os
from types import SimpleNamespace

import pytest
import torch
import triton
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
    monkeypatch.setattr(_launch, "_ran", {})
    return Recorder()


class Compiled:
    """Replaces a compiled kernel."""

    def __init__(self):
        self.launches = []
        self.function, self.packed_metadata = "function", "metadata"

    def run(self, *arguments):
        self.launches.append(arguments)


@pytest.fixture
def compiled(kernel, monkeypatch):
    """Return what ``kernel`` compiles to. Its parameters are a pointer, two numbers and a compile-time constant."""
    from triton.runtime import driver

    compiled = Compiled()
    run = Recorder.__getitem__
    monkeypatch.setattr(Recorder, "__getitem__", lambda self, grid: lambda *a, **o: (run(self, grid)(*a, **o), compiled)[1])
    kernel.params = [SimpleNamespace(name=name, do_not_specialize=name != "X") for name in ("X", "n", "scale", "S")]
    there = SimpleNamespace(get_current_device=lambda: 3, get_current_stream=lambda number: ("stream of", number))
    monkeypatch.setattr(type(driver), "active", there)
    return compiled


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


def test_the_second_launch_of_a_variant_goes_the_short_way(kernel, compiled):
    first, second = torch.zeros(4), torch.ones(4)
    _launch.launch(kernel, 5, first, 3, 0.5, warps=2, S=16, maxnreg=255)
    assert len(kernel.launches) == 1
    assert not compiled.launches
    _launch.launch(kernel, 6, second, 4, 0.25, warps=2, S=16, maxnreg=255)
    assert len(kernel.launches) == 1
    where = (6, 1, 1, ("stream of", 3), "function", "metadata", None, None, None)
    assert compiled.launches == [(*where, second.data_ptr(), 4, 0.25, 16)]


@pytest.mark.parametrize(
    "other",
    [
        {"x": torch.zeros(8).half()},
        {"n": 2**31},
        {"n": 2**63},
        {"n": None},
        {"n": 3.0},
        {"scale": 1},
        {"S": 32},
        {"warps": 4},
        {"stages": 2},
        {"maxnreg": 128},
    ],
    ids=lambda other: next(iter(other)),
)
def test_another_variant_is_left_to_triton(other, kernel, compiled):
    """Each of these calls compiles another kernel, so the short way would launch the wrong one."""

    def launch(**changes):
        call = {"x": torch.zeros(8), "n": 3, "scale": 0.5, "warps": 2, "stages": 1, "S": 16, "maxnreg": 255, **changes}
        _launch.launch(kernel, 5, call.pop("x"), call.pop("n"), call.pop("scale"), **call)

    launch()
    launch(**other)
    assert len(kernel.launches) == 2
    assert not compiled.launches
    launch()
    launch(n=4)
    assert len(kernel.launches) == 2
    assert len(compiled.launches) == 2


@pytest.mark.parametrize("why", ["value", "no constant", "version", "interpreted"])
def test_what_only_triton_can_find_is_left_to_triton(why, kernel, compiled, monkeypatch):
    constants = {"S": 16}
    if why == "value":
        kernel.params[1].do_not_specialize = False
    elif why == "no constant":
        constants = {}
    elif why == "version":
        monkeypatch.setattr(triton, "__version__", "3.10.0")
    else:
        del compiled.packed_metadata
    for _ in range(3):
        _launch.launch(kernel, 5, torch.zeros(4), 3, 0.5, warps=2, **constants)
    assert len(kernel.launches) == 3
    assert not compiled.launches


@pytest.mark.parametrize("name", ["launch_enter_hook", "launch_exit_hook"])
def test_a_profiler_sees_every_launch(name, kernel, compiled, monkeypatch):
    def launch():
        _launch.launch(kernel, 5, torch.zeros(4), 3, 0.5, warps=2, S=16)

    launch()
    with monkeypatch.context() as patch:
        patch.setattr(triton.knobs.runtime, name, lambda metadata: None)
        launch()
    assert len(kernel.launches) == 2
    hook = getattr(triton.knobs.runtime, name)
    hook.add(print)
    launch()
    hook.remove(print)
    assert len(kernel.launches) == 3
    launch()
    assert (len(kernel.launches), len(compiled.launches)) == (3, 1)


@pytest.mark.parametrize("tensor", [torch.zeros(4, 4).T, torch.zeros(5)[1:]])
def test_the_short_way_has_the_same_checks(tensor, kernel, compiled):
    _launch.launch(kernel, 5, torch.zeros(4), 3, 0.5, warps=2, S=16)
    with pytest.raises(ValueError, match="contiguous tensors at addresses that 16 divides"):
        _launch.launch(kernel, 5, tensor, 3, 0.5, warps=2, S=16)
    with pytest.raises(ValueError, match="the call needs -1"):
        _launch.launch(kernel, -1, torch.zeros(4), 3, 0.5, warps=2, S=16)
    assert not compiled.launches


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
