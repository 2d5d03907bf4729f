"""The one way kernels are launched: what the hardware and Triton's launcher assume is checked here, once."""

import re
import threading
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, field

import torch

from lares_fast import _settings

# Triton's launcher multiplies the grid's sizes in 32 bits and launches nothing where the product wraps.
MOST_PROGRAMS = 2**31 - 1
# Vector loads of 16 bytes; a pointer that is not a multiple would also compile a variant of its own.
ALIGNMENT = 16
# Warps of a program. With four, products of half precision are WGMMA on Hopper and tcgen05 on Blackwell, which some versions
# of ptxas and Triton compile wrongly; with two they are mma.sync everywhere. Products in fp32 use no tensor core.
# A kernel that needs more has :func:`sound_products` to choose.
WARPS = {torch.float32: 4, torch.float16: 2, torch.bfloat16: 2}


@dataclass(frozen=True)
class Choice:
    """How the kernels of an op are launched; what it does not say is as shipped."""

    # Of a tile.
    rows: int | None = None
    # Kernel -> (warps, stages).
    kernels: dict[str, tuple[int, int]] = field(default_factory=dict)


SHIPPED = Choice()
# Asked for the :class:`Choice` of a call with (op, tensor, sizes), where one was measured; None is as shipped.
find = None

# Called in place of Triton's launch with (kernel, programs, arguments, options), by tools that compile or count what would run.
stand_in = ContextVar("stand_in", default=None)

# The compiler reads the process's environment, which must not change under it: held by all who compile.
_compiling = threading.Lock()

# Variants that ran here: the first launch of one compiles and loads it, which a graph capture forbids.
_ran = set()


def ready(tensor):
    """``tensor`` contiguous and aligned as :func:`launch` demands; a copy only where it is not."""
    tensor = tensor.contiguous()
    return tensor if tensor.data_ptr() % ALIGNMENT == 0 else tensor.clone()


def rising(offsets):
    """``offsets`` [B + 1], or all -1 if one of them falls: sequences would overlap, and two programs write one row.

    Kernels take -1 as out of range. Nothing waits for the device.
    """
    return torch.where((offsets[1:] < offsets[:-1]).any(), -1, offsets)


def choice(op, tensor, **sizes):
    """What :data:`find` knows of a call of ``op`` with tensors like ``tensor``."""
    return (find and find(op, tensor, sizes)) or SHIPPED


def launch(kernel, programs, *arguments, warps, stages=1, choice=SHIPPED, **constants):
    """Run ``programs`` programs of ``kernel`` on the device of its tensors; none at all is no launch.

    ``arguments`` are tensors and numbers in the kernel's order, ``constants`` its compile-time parameters.
    ``choice`` goes before ``warps`` and ``stages``.
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
    """Keep what is compiled for ``architecture`` (90 is Hopper) from products that this ptxas gets wrong; one thread at a time.

    Before 13.3 it may overwrite registers that a WGMMA still reads. Triton keeps what was compiled so apart from the rest.
    """
    sound = architecture != 90 or _ptxas(architecture) >= (13, 3)
    with _compiling, nullcontext() if sound else _settings.temporarily("DISABLE_MMA_V3", "1"):
        yield


def _ptxas(architecture):
    """The version of the assembler for ``architecture``; (0,) where it does not say."""
    from triton.backends.nvidia import compiler

    try:
        said = compiler.get_ptxas_version(architecture)
    except TypeError:
        # Triton 3.5 has one assembler for all.
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
    """What of an argument can lead to a variant."""
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
