"""Launch kernels. All launches go through this module, which checks the conditions that Triton's launcher does not check."""

import re
import threading
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, field

import torch

from lares_fast import _settings

# Triton's launcher multiplies the grid's sizes in 32 bits, and launches nothing if the product overflows.
MOST_PROGRAMS = 2**31 - 1
# Vector loads read 16 bytes. A pointer that is not a multiple of 16 would also compile a variant of its own.
ALIGNMENT = 16
# The warps of a program. With four warps, products of half precision become WGMMA on Hopper and tcgen05 on Blackwell, which
# some versions of ptxas and Triton compile wrongly. With two warps they become mma.sync on every GPU. Products in fp32 use no
# tensor core. For a kernel that needs more warps, :func:`avoid_broken_wgmma` keeps the compiler from using WGMMA.
WARPS = {torch.float32: 4, torch.float16: 2, torch.bfloat16: 2}


@dataclass(frozen=True)
class Choice:
    """The launch settings of the kernels of an op. A setting that is left out has its default."""

    # The rows of a tile.
    rows: int | None = None
    # Kernel -> (warps, stages).
    kernels: dict[str, tuple[int, int]] = field(default_factory=dict)


SHIPPED = Choice()
# A function that takes (op, tensor, sizes) and returns the :class:`Choice` that was measured for such calls, or None.
# ``lares_fast.ops._triton`` sets it.
find = None

# Tools that compile or count launches set a function here. :func:`launch` calls it instead of the kernel, with (kernel,
# programs, arguments, options).
stand_in = ContextVar("stand_in", default=None)

# The compiler reads the environment variables, which must not change meanwhile. Every compilation holds this lock.
_compiling = threading.Lock()

# The variants that ran in this process. The first launch of a variant compiles and loads it, which a graph capture forbids.
_ran = set()


def ready(tensor):
    """Return ``tensor`` contiguous and aligned, as :func:`launch` requires. It is copied only if that is necessary."""
    tensor = tensor.contiguous()
    return tensor if tensor.data_ptr() % ALIGNMENT == 0 else tensor.clone()


def rising(offsets):
    """Return ``offsets`` [B + 1], or -1 in every place if an offset is below the one before.

    Sequences of falling offsets would overlap, and two programs would write one row. A kernel treats -1 as out of range. The
    host does not wait for the device.
    """
    return torch.where((offsets[1:] < offsets[:-1]).any(), -1, offsets)


def choice(op, tensor, **sizes):
    """Return the launch settings that :data:`find` has for a call of ``op`` with tensors like ``tensor``, or the defaults."""
    return (find and find(op, tensor, sizes)) or SHIPPED


def launch(kernel, programs, *arguments, warps, stages=1, choice=SHIPPED, **constants):
    """Run ``programs`` programs of ``kernel`` on the device of its tensors; with 0 programs nothing is launched.

    ``arguments`` are tensors and numbers in the kernel's order, and ``constants`` are its compile-time parameters. If
    ``choice`` has settings for the kernel, they replace ``warps`` and ``stages``.

    Raises ValueError for too many programs, and for tensors on several devices, not contiguous or not aligned. Raises
    RuntimeError if the first launch of a variant comes within a graph capture.
    """
    warps, stages = choice.kernels.get(_name(kernel), (warps, stages))
    if programs == 0:
        return
    if not 0 < programs <= MOST_PROGRAMS:
        raise ValueError(f"{_name(kernel)} takes up to {MOST_PROGRAMS} programs, but the call needs {programs}.")
    tensors = [x for x in arguments if isinstance(x, torch.Tensor)]
    device = tensors[0].device
    for tensor in tensors:
        if tensor.device != device:
            raise ValueError(f"{_name(kernel)} has tensors on {device} and {tensor.device}.")
        if not tensor.is_contiguous() or tensor.data_ptr() % ALIGNMENT:
            raise ValueError(f"{_name(kernel)} takes contiguous tensors at addresses that {ALIGNMENT} divides.")
    options = {**constants, "num_warps": warps, "num_stages": stages, "enable_fp_fusion": True}
    if (instead := stand_in.get()) is not None:
        instead(kernel, programs, arguments, options)
        return
    with _on(device):
        variant = (_name(kernel), device, warps, stages, *map(_kind, arguments), *constants.items())
        if variant in _ran:
            kernel[(programs,)](*arguments, **options)
            return
        if _capturing(device):
            raise RuntimeError(f"{_name(kernel)} was not run before the graph capture: run it once with such arguments first.")
        with avoid_broken_wgmma(_architecture(device)):
            kernel[(programs,)](*arguments, **options)
        _ran.add(variant)


@contextmanager
def avoid_broken_wgmma(architecture):
    """Let one thread at a time compile for ``architecture`` (90 is Hopper), without WGMMA if ptxas compiles it wrongly.

    A ptxas before 13.3 may overwrite registers that a WGMMA still reads. Triton's cache keeps both kinds of compilations apart.
    """
    correct = architecture != 90 or _ptxas(architecture) >= (13, 3)
    with _compiling, nullcontext() if correct else _settings.temporarily("DISABLE_MMA_V3", "1"):
        yield


def _ptxas(architecture):
    """Return the version of the assembler ptxas for ``architecture``, or (0,) if it is unknown."""
    from triton.backends.nvidia import compiler

    try:
        said = compiler.get_ptxas_version(architecture)
    except TypeError:
        # Triton 3.5 has one assembler for all architectures.
        said = compiler.get_ptxas_version()
    found = re.search(r"V(\d+)\.(\d+)", said)
    return tuple(map(int, found.groups())) if found else (0,)


def _architecture(device):
    if device.type != "cuda":
        return None
    major, minor = torch.cuda.get_device_capability(device)
    return major * 10 + minor


def _name(kernel):
    return kernel.fn.__name__


def _kind(argument):
    """Return the properties of an argument for which Triton may compile another variant."""
    if isinstance(argument, torch.Tensor):
        return argument.dtype
    return type(argument), isinstance(argument, int) and not -(2**31) <= argument < 2**31


def _on(device):
    """Make ``device`` current within the ``with`` block. Triton launches on the current device and its current stream."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(device)


def _capturing(device):
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()
