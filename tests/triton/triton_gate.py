"""Compile exactly what the ops launch, for GPUs that are not here, and read what the assembler made of it.

A stand-in driver answers Triton's question for the GPU, and a launch becomes a compilation with the very arguments,
specialisations and options of the wrapper.
"""

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import triton
from lares_fast.kernels._offline import compiling

from lares_fast.ops import _triton

TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
# Bytes of shared memory that one program may have.
SHARED_LIMIT = {80: 166_912, 86: 101_376, 90: 232_448, 100: 232_448, 120: 101_376}


@dataclass(frozen=True)
class Compiled:
    """One kernel as compiled for one architecture."""

    name: str
    constants: dict
    warps: int
    registers: int
    stack: int
    shared: int
    opcodes: dict

    @property
    def products(self):
        """Tensor-core instructions."""
        return sum(n for name, n in self.opcodes.items() if re.match("HMMA|HGMMA|QGMMA|UTC.*MMA", name))

    def count(self, prefix):
        return sum(n for name, n in self.opcodes.items() if name.startswith(prefix))


def compile_launches(monkeypatch, architecture, call):
    """Every kernel that ``call()`` launches through the Triton backend on CPU tensors; nothing runs."""
    with monkeypatch.context() as patch, tempfile.TemporaryDirectory() as cache:
        patch.setenv("TRITON_CACHE_DIR", cache)
        patch.setattr(_triton, "obstacle", lambda tensor: None)
        with compiling(architecture) as compiled:
            call()
        return [inspect_kernel(kernel, Path(cache)) for kernel in compiled]


def inspect_kernel(kernel, folder):
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(kernel.asm["cubin"])
    usage = tool("cuobjdump", "-res-usage", cubin)
    registers, stack = (int(re.search(rf"{what}:(\d+)", usage)[1]) for what in ("REG", "STACK"))
    opcodes = {}
    for line in tool("nvdisasm", "-c", cubin).splitlines():
        if found := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", line):
            opcodes[found[1]] = opcodes.get(found[1], 0) + 1
    names = kernel.src.fn.arg_names
    constants = {names[place[0]]: value for place, value in kernel.src.constants.items()}
    return Compiled(
        kernel.metadata.name, constants, kernel.metadata.num_warps, registers, stack, kernel.metadata.shared, opcodes
    )


def tool(name, *arguments):
    return subprocess.run([TOOLS / name, *arguments], capture_output=True, text=True, check=True).stdout
