"""Triton's interpreter for tests: it computes bf16 as a GPU does, checks every address, and runs programs in any order.

The interpreter runs a kernel's source on numpy arrays, one program after the other. As it comes, it multiplies the raw
bits of bf16, truncates casts to bf16, and reads and writes any address. :func:`interpreted` corrects this within its block.
"""

import contextlib
import importlib.util
import sys
from pathlib import Path

import lares_fast.kernels
import numpy as np
import torch
from lares_fast.kernels._interpreted import AS_ON_GPU
from triton.runtime.interpreter import GridExecutor, InterpreterBuilder

from lares_fast.ops import _triton

KERNELS = Path(lares_fast.kernels.__file__).parent


class Memory:
    """The tensors of the running launch, and which program stored to each of their elements."""

    def __init__(self):
        self.tensors, self.program, self.launches = [], None, 0

    def start(self, arguments):
        found = [x for x in arguments if isinstance(x, torch.Tensor)]
        self.tensors = [(x.data_ptr(), x.element_size(), np.full(x.numel(), -1)) for x in found]
        self.launches += 1

    def check(self, pointers, mask, *, store):
        addresses = np.broadcast_to(pointers.data, np.broadcast_shapes(pointers.data.shape, mask.data.shape))
        addresses = addresses[np.broadcast_to(mask.data, addresses.shape)].astype(np.int64)
        size = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        todo = np.ones(len(addresses), dtype=bool)
        for base, width, owner in self.tensors:
            element = (addresses - base) // size
            here = (addresses >= base) & (element < len(owner)) & todo
            if not here.any() or width != size:
                continue
            assert ((addresses[here] - base) % size == 0).all(), "an address between two elements"
            todo &= ~here
            if store:
                others = owner[element[here]]
                assert ((others == -1) | (others == self.program)).all(), "two programs store to one element"
                owner[element[here]] = self.program
        assert not todo.any(), f"{int(todo.sum())} {'stores' if store else 'loads'} are outside every tensor"


@contextlib.contextmanager
def interpreted(monkeypatch, order=None):
    """Run the Triton backend on CPU tensors, and yield the memory. ``order(n)`` gives the order of a launch's n programs."""
    memory = Memory()
    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store
    run, set_index = GridExecutor.__call__, InterpreterBuilder.set_grid_idx

    def checked_load(self, pointers, mask, *rest):
        memory.check(pointers, mask, store=False)
        return load(self, pointers, mask, *rest)

    def checked_store(self, pointers, value, mask, *rest):
        memory.check(pointers, mask, store=True)
        return store(self, pointers, value, mask, *rest)

    def start(self, *arguments, **options):
        memory.start(arguments)
        memory.order = order(self.grid[0]) if order else range(self.grid[0])
        return run(self, *arguments, **options)

    def place(self, x, y, z):
        memory.program = int(memory.order[x])
        set_index(self, memory.program, y, z)

    with monkeypatch.context() as patch:
        for name, function in {
            **AS_ON_GPU,
            "create_masked_load": checked_load,
            "create_masked_store": checked_store,
            "set_grid_idx": place,
        }.items():
            patch.setattr(InterpreterBuilder, name, function)
        patch.setattr(GridExecutor, "__call__", start)
        patch.setattr(_triton, "obstacle", lambda tensor: None)
        poisoned = torch.are_deterministic_algorithms_enabled()
        # PyTorch then fills the results of torch.empty with NaN.
        torch.use_deterministic_algorithms(True)
        try:
            # A GPU does not warn about log(0).
            with np.errstate(all="ignore"):
                yield memory
        finally:
            torch.use_deterministic_algorithms(poisoned)


def plant(monkeypatch, folder, files, file, old, new):
    """Plant a bug: load the kernels ``files``, in order of import, with ``old`` replaced by ``new`` in ``file``.

    ``old`` must occur once. So a change of the source cannot remove the bug unnoticed.
    """
    for name in files:
        source = (KERNELS / f"{name}.py").read_text()
        if name == file:
            assert source.count(old) == 1, f"{old!r} occurs {source.count(old)} times in {file}.py"
            source = source.replace(old, new)
        path = folder / f"{name}.py"
        path.write_text(source)
        spec = importlib.util.spec_from_file_location(f"lares_fast.kernels.{name}", path)
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, spec.name, module)
        spec.loader.exec_module(module)


def between_guards(tensor):
    """Return a copy of ``tensor`` in a buffer full of NaN, and a function that tells whether the rest of it is still NaN."""
    margin = 64
    buffer = torch.full((tensor.numel() + 2 * margin,), torch.nan, dtype=tensor.dtype)
    inner = buffer[margin:-margin].view(tensor.shape)
    inner.copy_(tensor)

    def untouched():
        return bool(buffer[:margin].isnan().all() and buffer[-margin:].isnan().all())

    return inner, untouched
