"""Launch kernels. All launches go through this module, which checks what hardware and Triton's launcher take for granted."""

import re
import threading
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, field

import torch

from lares_fast import _settings

# Triton's launcher multiplies the grid's sizes in 32 bits and launches nothing where the product wraps.
MOST_PROGRAMS = 2**31 - 1
# Vector loads read 16 bytes. A pointer that is not a multiple of 16 would also compile a variant of its own.
ALIGNMENT = 16
# Warps of a program. With four warps, products of half precision become WGMMA on Hopper and tcgen05 on Blackwell, which some
# versions of ptxas and Triton compile wrongly. With two warps they become mma.sync on every GPU. Products in fp32 use no tensor
# core. For a kernel that needs more warps, :func:`sound_products` keeps the compiler from WGMMA.
WARPS = {torch.float32: 4, torch.float16: 2, torch.bfloat16: 2}


@dataclass(frozen=True)
class Choice:
    """How the kernels of an op are launched; a value that is left out is the default."""

    # Rows of a tile.
    rows: int | None = None
    # Kernel -> (warps, stages).
    kernels: dict[str, tuple[int, int]] = field(default_factory=dict)


SHIPPED = Choice()
# A function that takes (op, tensor, sizes) and returns the :class:`Choice` that was measured for such calls, or None.
find = None

# Tools that compile or count launches set a function here. It is called in place of Triton's launch, with (kernel, programs,
# arguments, options).
stand_in = ContextVar("stand_in", default=None)

# The compiler reads the process's environment, which must not change meanwhile. Every compilation holds this lock.
_compiling = threading.Lock()

# Variants that ran in this process. The first launch of a variant compiles and loads it, which a graph capture forbids.
_ran = set()


def ready(tensor):
    """Return ``tensor`` contiguous and aligned, as :func:`launch` needs it; it is copied only if it is not so already."""
    tensor = tensor.contiguous()
    return tensor if tensor.data_ptr() % ALIGNMENT == 0 else tensor.clone()


def rising(offsets):
    """Return ``offsets`` [B + 1], or -1 in every place if an offset is below the one before.

    Such sequences would overlap, and two programs would write one row. Kernels take -1 as out of range. Nothing waits for the
    device.
    """
    return torch.where((offsets[1:] < offsets[:-1]).any(), -1, offsets)


def choice(op, tensor, **sizes):
    """Return the launch settings that :data:`find` has for a call of ``op`` with tensors like ``tensor``, or the defaults."""
    return (find and find(op, tensor, sizes)) or SHIPPED


def launch(kernel, programs, *arguments, warps, stages=1, choice=SHIPPED, **constants):
    """Run ``programs`` programs of ``kernel`` on the device of its tensors; with 0 programs nothing is launched.

    ``arguments`` are tensors and numbers in the kernel's order, ``constants`` its compile-time parameters. If ``choice`` names
    the kernel, it replaces ``warps`` and ``stages``.
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
        with sound_products(_architecture(device)):
            kernel[(programs,)](*arguments, **options)
        _ran.add(variant)


@contextmanager
def sound_products(architecture):
    """Compile for ``architecture`` (90 is Hopper) without the products that this ptxas gets wrong; one thread at a time.

    A ptxas before 13.3 may overwrite registers that a WGMMA still reads. Triton's cache keeps these compilations apart.
    """
    sound = architecture != 90 or _ptxas(architecture) >= (13, 3)
    with _compiling, nullcontext() if sound else _settings.temporarily("DISABLE_MMA_V3", "1"):
        yield


def _ptxas(architecture):
    """Return the version of the assembler for ``architecture``, or (0,) if it does not tell."""
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
    """Return the properties of an argument that can lead to a variant."""
    if isinstance(argument, torch.Tensor):
        return argument.dtype
    return type(argument), isinstance(argument, int) and not -(2**31) <= argument < 2**31


def _on(device):
    """Make ``device`` current: Triton launches on the current device and its current stream."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(device)


def _capturing(device):
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()
