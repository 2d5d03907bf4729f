"""The choice of the device. A stand-in for ``torch.cuda`` plays machines with and without GPUs."""

import errno
import re
import subprocess
import sys

import pytest
import torch

from lares_fast import _device, _memory
from lares_fast._errors import InputError
from lares_fast.ops import _triton
from lares_fast.verify import cases

TOO_OLD = "The NVIDIA driver on your system is too old (found version 11040). Please update your GPU driver."


class Machine:
    """What ``torch.cuda`` answers: a list of compute capabilities, one for each GPU, and errors."""

    def __init__(self, monkeypatch, capabilities=(), build="13.0", init_error=None, faults=None, allocation=None):
        self.tested = []
        self.faults, self.allocation = faults or {}, allocation or {}
        self.init_error, self.current = init_error, 0

        def init():
            raise RuntimeError(init_error or "No CUDA GPUs are available")

        cuda = {
            "is_available": lambda: bool(capabilities),
            "device_count": lambda: len(capabilities),
            "current_device": lambda: self.current,
            "get_device_name": lambda device=None: f"GPU {torch.device(device).index}",
            "get_device_capability": lambda device=None: capabilities[torch.device(device).index],
            "init": init,
        }
        for name, value in cuda.items():
            monkeypatch.setattr(torch.cuda, name, value)
        monkeypatch.setattr(torch.version, "cuda", build)
        monkeypatch.setattr(_device, "_probe", self.probe)
        monkeypatch.setattr(_triton, "_verifier", lambda: self)
        # Answers of one machine must not be kept for the next one.
        monkeypatch.setattr(_triton, "_obstacle_of", _triton._obstacle_of.__wrapped__)
        find_spec = _triton.importlib.util.find_spec
        monkeypatch.setattr(_triton.importlib.util, "find_spec", lambda name: name in self.packages or find_spec(name))
        monkeypatch.delenv("LARES_FAST_BACKEND", raising=False)

    packages = ("triton", "lares_fast.kernels")

    def probe(self, device):
        if error := self.allocation.get(device.index):
            raise error

        class Probe:
            dtype = torch.float32

        Probe.device = device
        return Probe

    def refusal(self, op, device, dtype, **variant):
        self.tested.append((op, device.index))
        return self.faults.get(device.index)


HOPPER = (9, 0)


def refused(name):
    with pytest.raises(InputError) as error:
        _device.resolve(name)
    text = str(error.value)
    assert text.endswith((".", "?")) and "\n" not in text
    return text


def test_the_cpu_is_taken_without_a_question(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: pytest.fail("CUDA was asked"))
    assert _device.resolve("cpu") == torch.device("cpu")
    assert _device.resolve(torch.device("cpu")) == torch.device("cpu")


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("gpu", "cuda"),
        ("GPU:1", "cuda:1"),
        ("CUDA", "cuda"),
        ("cudda", "cuda"),
        ("Auto", "auto"),
        ("cpus", "cpu"),
        ("mps", None),
    ],
)
def test_an_unknown_name(name, meant):
    text = refused(name)
    assert f"device must be auto, cpu, cuda or cuda:N, but got {name!r}" in text
    assert ("did you mean" in text) == (meant is not None)
    assert meant is None or f"did you mean {meant!r}?" in text


@pytest.mark.parametrize("name", ["cuda:", "cuda:-1", "cuda:1.0", "cuda:x", "", "cuda:00000000001", "cuda:1 "])
def test_a_name_that_is_nearly_right(name):
    assert "device must be" in refused(name)


@pytest.mark.parametrize(
    ("machine", "reason"),
    [
        ({"build": None}, "built for the CPU only: install a build with CUDA"),
        ({}, "no GPU is visible to PyTorch: check nvidia-smi"),
        (
            {"init_error": TOO_OLD},
            r"driver is too old \(it supports CUDA 11.4\) for this PyTorch, which was built for CUDA 13.0",
        ),
        ({"init_error": "Found no NVIDIA driver on your system. Please check."}, "there is no NVIDIA driver"),
        ({"init_error": "Cannot re-initialize CUDA in forked subprocess. To use"}, "forked: start processes .*'spawn'"),
        ({"init_error": "Unexpected error from\ncudaGetDeviceCount()."}, r"\(Unexpected error from cudaGetDeviceCount\(\)\)"),
    ],
)
def test_no_gpu(monkeypatch, machine, reason):
    Machine(monkeypatch, **machine)
    choice = _device.choose("auto")
    assert choice.device == torch.device("cpu") and not choice.refused
    assert refused("cuda").startswith("the device 'cuda' cannot be used, because ")
    for text in (choice.reason, refused("cuda:0")):
        assert re.search(reason, text)


def test_one_gpu(monkeypatch):
    machine = Machine(monkeypatch, [HOPPER])
    for name in ("auto", "cuda", "cuda:0"):
        assert _device.resolve(name) == torch.device("cuda", 0)
    assert _device.choose("auto").reason == "the kernels passed their self-test on GPU 0"
    assert {("recurrence", 0), ("linear_cross_entropy", 0)} == set(machine.tested)
    assert refused("cuda:3") == "the device 'cuda:3' does not exist: PyTorch sees 1 GPU, cuda:0."


def test_cuda_is_the_current_gpu_and_auto_the_first_that_passes(monkeypatch):
    machine = Machine(monkeypatch, [(7, 5), HOPPER, HOPPER], faults={1: "its self-test failed on this GPU, attention: x"})
    machine.current = 2
    assert _device.resolve("cuda") == _device.resolve("auto") == torch.device("cuda", 2)
    assert refused("cuda:3").endswith("PyTorch sees 3 GPUs, cuda:0 to cuda:2.")
    assert "it needs compute capability 8.0, and GPU 0 has 7.5" in refused("cuda:0")
    assert "its self-test failed on this GPU" in refused("cuda:1")


@pytest.mark.parametrize("broken", ["old", "failing", "without triton"])
def test_a_gpu_that_cannot_run_the_kernels(monkeypatch, broken):
    machine = Machine(
        monkeypatch,
        [(7, 5) if broken == "old" else HOPPER],
        faults={0: "its self-test failed"} if broken == "failing" else None,
    )
    if broken == "without triton":
        monkeypatch.setattr(_triton.importlib.util, "find_spec", lambda name: None)
    choice = _device.choose("auto")
    assert choice.device == torch.device("cpu") and choice.refused
    assert choice.reason.startswith("cuda:0 cannot be used, because the backend 'triton' cannot run recurrence on it (")
    text = refused("cuda")
    assert "set LARES_FAST_BACKEND=reference to run PyTorch's operations, which are slower, or choose the device 'cpu'." in text
    assert ("pip install" in text) == (broken == "without triton")
    # A backend that is requested by name needs no Triton kernels.
    machine.tested.clear()
    monkeypatch.setenv("LARES_FAST_BACKEND", "reference")
    assert _device.resolve("cuda") == _device.resolve("auto") == torch.device("cuda", 0)
    assert _device.choose("auto").reason == "the backend 'reference' runs on GPU 0 without a self-test"
    assert machine.tested == []


def test_the_native_backend_is_for_the_cpu(monkeypatch):
    Machine(monkeypatch, [HOPPER])
    monkeypatch.setenv("LARES_FAST_BACKEND", "native")
    assert _device.choose("auto")[:2] == (torch.device("cpu"), "the backend 'native' is requested, and it runs on the CPU")


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (RuntimeError("CUDA error: all CUDA-capable devices are busy or unavailable"), "exclusive mode.*nvidia-smi -c DEFAULT"),
        (torch.cuda.OutOfMemoryError("CUDA out of memory."), "its memory is in use by other processes"),
        (RuntimeError("CUDA error: out of memory"), "its memory is in use by other processes"),
        (RuntimeError("CUDA error: an illegal memory access was\nencountered"), "illegal memory access was encountered"),
    ],
)
def test_a_gpu_that_does_not_answer(monkeypatch, error, reason):
    Machine(monkeypatch, [HOPPER, HOPPER], allocation={0: error})
    assert _device.resolve("auto") == torch.device("cuda", 1)
    assert re.search(reason, refused("cuda:0"))


def test_an_import_does_not_touch_a_gpu():
    code = (
        "import torch\n"
        "torch.cuda.is_available = torch.cuda.init = torch.cuda._lazy_init = torch.cuda.device_count = None\n"
        "import lares_fast._device, lares_fast.serve, lares_fast.train.trainer\n"
        "import lares_fast.cli.training, lares_fast.cli.evaluation, lares_fast.cli.recommending\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_too_little_memory_for_the_model_is_named_before_it_moves(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2**29, 2**33))
    with pytest.raises(InputError, match=r"the model needs 1073741824.00 GiB, where .* are free: end other programs"):
        _device.require_memory(torch.device("cpu"), 2**60, "the model")
    _device.require_memory(torch.device("cuda", 1), 2**29, "the model")
    with pytest.raises(InputError, match=r"the model needs 3.00 GiB on cuda:1, where 0.50 GiB are free: end other processes"):
        _device.require_memory(torch.device("cuda", 1), 3 * 2**30, "the model")


@pytest.mark.parametrize(
    ("error", "where", "size"),
    [
        (torch.cuda.OutOfMemoryError("CUDA out of memory"), "the memory of the GPU", ""),
        (torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 3.00 GiB."), "the memory of the GPU", "3.00 GiB"),
        (RuntimeError("Triton Error [CUDA]: out of memory"), "the memory of the GPU", ""),
        (
            RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 409600 bytes."),
            "the free memory",
            "0.4 MiB",
        ),
        (MemoryError("std::bad_alloc"), "the free memory", ""),
        (MemoryError("Unable to allocate 7.45 GiB for an array with shape (1000000000,)"), "the free memory", "7.45 GiB"),
        (MemoryError("malloc of size 268435456 failed"), "the free memory", "0.25 GiB"),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), "the free memory", ""),
        (ImportError("lib.so: failed to map segment from shared object"), "the free memory", ""),
        (SystemError("error return without exception set"), "the free memory", ""),
    ],
)
def test_too_little_memory_names_the_batch_size_to_try(error, where, size):
    with pytest.raises(InputError) as found, _memory.enough_memory(257, setting="evaluation.batch_size"):
        raise error
    end = f"; {size} could not be allocated." if size else "."
    assert str(found.value) == f"{where} is not enough for batch_size 257: try batch_size 128{end}"
    assert found.value.setting == "evaluation.batch_size=128"


def test_an_error_about_something_else_is_not_about_memory():
    with pytest.raises(InputError, match="not enough for --batch-size 1: end other"), _memory.enough_memory(1, "--batch-size"):
        raise RuntimeError("CUDA out of memory")
    for error in (RuntimeError("something else"), OSError(errno.ENOSPC, "No space left"), InputError("out of memory")):
        with pytest.raises(type(error), match=str(error)[-9:]), _memory.enough_memory(2):
            raise error


def test_the_kernels_that_decide_are_kernels_that_models_use():
    """Kernels of other sizes would be compiled for this question alone."""
    assert all(variant in cases.shipped(op) for op, variant in _device._PROBES.items())
