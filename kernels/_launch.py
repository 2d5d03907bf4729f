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

# The variants that ran in this process. The first launch of a variant compiles and loads it, which a graph capture forbids. The
# value is the function that :func:`_short_way` has returned for the variant, or None.
_ran = {}

# The versions of Triton whose compiled kernels take the arguments that :func:`_short_way` passes.
_KNOWN = ((3, 5), (3, 9))


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


def cdiv(a, b):
    """Return ``a / b``, rounded up. On the host ``triton.cdiv`` takes longer than some launches."""
    return -(-a // b)


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
    if choice.kernels:
        warps, stages = choice.kernels.get(_name(kernel), (warps, stages))
    if programs == 0:
        return
    if not 0 < programs <= MOST_PROGRAMS:
        raise ValueError(f"{_name(kernel)} takes up to {MOST_PROGRAMS} programs, but the call needs {programs}.")
    # This loop takes most of the time of a launch. A tensor's address replaces it, so that Triton need not ask for it again.
    values, kinds, device = [], [], None
    for x in arguments:
        kind, value = type(x), x
        if kind is int:
            # Triton compiles a variant for each of these sizes.
            kind = 32 if -(2**31) <= x < 2**31 else 64 if x < 2**63 else 65
        elif isinstance(x, torch.Tensor):
            kind, value, place = x.dtype, x.data_ptr(), x.device
            if device is None:
                device = place
            if place != device:
                raise ValueError(f"{_name(kernel)} has tensors on {device} and {place}.")
            if value % ALIGNMENT or not x.is_contiguous():
                raise ValueError(f"{_name(kernel)} takes contiguous tensors at addresses that {ALIGNMENT} divides.")
        values.append(value)
        kinds.append(kind)
    instead = stand_in.get()
    if instead is None:
        variant = (kernel.fn, device, warps, stages, *kinds, *constants, *constants.values())
        short = _ran.get(variant)
        if short is not None:
            if device.type != "cuda" or device.index == torch.cuda.current_device():
                done = short(programs, values)
            else:
                with torch.cuda.device(device):
                    done = short(programs, values)
            if done:
                return
    options = {**constants, "num_warps": warps, "num_stages": stages, "enable_fp_fusion": True}
    if instead is not None:
        instead(kernel, programs, arguments, options)
        return
    with _on(device):
        if variant in _ran:
            kernel[(programs,)](*arguments, **options)
            return
        if _capturing(device):
            raise RuntimeError(f"{_name(kernel)} was not run before the graph capture: run it once with such arguments first.")
        with avoid_broken_wgmma(_architecture(device)):
            compiled = kernel[(programs,)](*arguments, **options)
        _ran[variant] = _short_way(kernel, compiled, arguments, constants)


def _short_way(kernel, compiled, arguments, constants):
    """Return a function that launches ``compiled``, the variant of ``kernel`` that has just run with ``arguments``, or None.

    The function takes the programs, and the arguments with addresses instead of tensors. It returns whether it has launched
    the kernel. It leaves out what Triton does at every launch to find the variant, which takes several times as long as the
    launch. None means that only Triton can find the variant: the kernel is interpreted, the version of Triton is not known, or
    the variant depends on the value of an integer.
    """
    import triton

    version = tuple(map(int, triton.__version__.split(".")[:2]))
    if not hasattr(compiled, "packed_metadata") or not _KNOWN[0] <= version <= _KNOWN[1]:
        return None
    params = kernel.params
    rest = [param.name for param in params[len(arguments) :]]
    by_value = any(type(x) is int and not param.do_not_specialize for x, param in zip(arguments, params, strict=False))
    if by_value or not all(name in constants for name in rest):
        return None
    driver, hooks = triton.runtime.driver.active, triton.knobs.runtime
    number, stream_of = driver.get_current_device(), driver.get_current_stream
    run, function, metadata = compiled.run, compiled.function, compiled.packed_metadata
    rest = [constants[name] for name in rest]

    def launch_compiled(programs, values):
        enter, leave = hooks.launch_enter_hook, hooks.launch_exit_hook
        if getattr(enter, "calls", enter) or getattr(leave, "calls", leave):
            # A profiler wants to see the launch.
            return False
        run(programs, 1, 1, stream_of(number), function, metadata, None, None, None, *values, *rest)
        return True

    # The code on the GPU is unloaded when its object is deleted.
    launch_compiled.compiled = compiled
    return launch_compiled


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


def _on(device):
    """Make ``device`` current within the ``with`` block. Triton launches on the current device and its current stream."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(device)


def _capturing(device):
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()
