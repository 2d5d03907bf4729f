"""The one way kernels are launched: what the hardware and Triton's launcher assume is checked here, once."""

from contextlib import nullcontext

import torch

# Triton's launcher multiplies the grid's sizes in 32 bits and launches nothing where the product wraps.
MOST_PROGRAMS = 2**31 - 1
# Vector loads of 16 bytes; a pointer that is not a multiple would also compile a variant of its own.
ALIGNMENT = 16
# Warps of a program. With four, products of half precision are WGMMA on Hopper and tcgen05 on Blackwell, which some versions
# of ptxas and Triton compile wrongly; with two they are mma.sync everywhere. Products in fp32 use no tensor core.
WARPS = {torch.float32: 4, torch.float16: 2, torch.bfloat16: 2}

# Variants that ran here: the first launch of one compiles and loads it, which a graph capture forbids.
_ran = set()


def ready(tensor):
    """``tensor`` contiguous and aligned as :func:`launch` demands; a copy only where it is not."""
    tensor = tensor.contiguous()
    return tensor if tensor.data_ptr() % ALIGNMENT == 0 else tensor.clone()


def launch(kernel, programs, *arguments, warps, stages=1, **constants):
    """Run ``programs`` programs of ``kernel`` on the device of its tensors; none at all is no launch.

    ``arguments`` are tensors and numbers in the kernel's order, ``constants`` its compile-time parameters.
    """
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
    with _on(device):
        variant = (_name(kernel), device, *map(_kind, arguments), *constants.items())
        if variant not in _ran and _capturing(device):
            raise RuntimeError(f"{_name(kernel)} was not run before the graph capture: run it once with such arguments first.")
        kernel[(programs,)](*arguments, **constants, num_warps=warps, num_stages=stages, enable_fp_fusion=True)
        _ran.add(variant)


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
