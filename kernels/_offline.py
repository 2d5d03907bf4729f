"""Kernels compiled for GPUs that need not be here: a stand-in driver answers Triton's question for the GPU."""

from contextlib import contextmanager

import triton
from lares_fast.kernels._launch import sound_products, stand_in
from triton.backends.compiler import GPUTarget


class Driver:
    """What Triton asks of a driver before it compiles."""

    def __init__(self, architecture):
        self.target = GPUTarget("cuda", architecture, 32)

    def get_current_target(self):
        """The GPU that there would be."""
        return self.target

    def get_current_device(self):
        """Its number."""
        return 0

    def get_current_stream(self, device):
        """The default stream."""
        return 0


@contextmanager
def compiling(architecture):
    """Have launches within the ``with`` block, on CPU tensors, compiled for ``architecture`` and not run.

    Yields the list that Triton's compiled kernels are added to: what a launch there would compile, by its very arguments.
    """
    compiled, used = [], set()

    def compile_only(kernel, programs, arguments, options):
        kernel.device_caches.clear()
        used.add(kernel)
        with sound_products(architecture):
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
