"""Compile kernels for GPUs that this machine does not have: a stand-in driver tells Triton which GPU to compile for."""

from contextlib import contextmanager

import triton
from lares_fast.kernels._launch import avoid_broken_wgmma, stand_in
from triton.backends.compiler import GPUTarget


class Driver:
    """The functions of a driver that Triton calls before it compiles."""

    def __init__(self, architecture):
        self.target = GPUTarget("cuda", architecture, 32)

    def get_current_target(self):
        """Return the GPU to compile for."""
        return self.target

    def get_current_device(self):
        """Return the number of the current GPU."""
        return 0

    def get_current_stream(self, device):
        """Return the default stream."""
        return 0


@contextmanager
def compiling(architecture):
    """Compile the launches within the ``with`` block for ``architecture``, and do not run them. Tensors are on the CPU.

    Yields a list to which every compiled kernel is added. It is the variant that a launch with these arguments would compile on
    such a GPU.
    """
    compiled, used = [], set()

    def compile_only(kernel, programs, arguments, options):
        kernel.device_caches.clear()
        used.add(kernel)
        with avoid_broken_wgmma(architecture):
            compiled.append(kernel.warmup(*arguments, grid=(programs,), **options))

    drivers = triton.runtime.driver
    before, drivers._active = drivers._active, Driver(architecture)
    token = stand_in.set(compile_only)
    try:
        yield compiled
    finally:
        stand_in.reset(token)
        drivers._active = before
        for kernel in used:
            kernel.device_caches.clear()
