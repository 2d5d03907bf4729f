"""Compile the kernels that the ops launch, for GPUs that this machine does not have, and read the assembler's output.

A stand-in driver tells Triton which GPU to compile for. A launch becomes a compilation with the arguments, specialisations and
options of the wrapper.
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
    """A kernel that was compiled for one architecture."""

    name: str
    constants: dict
    warps: int
    registers: int
    stack: int
    shared: int
    opcodes: dict
    wrapping: list

    @property
    def products(self):
        """Return the number of tensor-core instructions."""
        return sum(n for name, n in self.opcodes.items() if re.match("HMMA|HGMMA|QGMMA|UTC.*MMA", name))

    def resident_warps(self, architecture):
        """Return how many warps a multiprocessor holds.

        Registers (in units of 8), shared memory (1 KB more for each program) and threads limit it.
        """
        threads = 32 * self.warps
        registers = 65_536 // (-(-self.registers // 8) * 8 * threads)
        shared = (SHARED_LIMIT[architecture] + 1024) // (self.shared + 1024)
        return self.warps * min(registers, shared, (1536 if architecture in (86, 120) else 2048) // threads)

    def count(self, prefix):
        return sum(n for name, n in self.opcodes.items() if name.startswith(prefix))


def compile_launches(monkeypatch, architecture, call):
    """Return every kernel that ``call()`` launches through the Triton backend on CPU tensors; nothing runs."""
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
    for line in tool("nvdisasm", "-c", "-ndf", cubin).splitlines():
        if found := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", line):
            opcodes[found[1]] = opcodes.get(found[1], 0) + 1
    names = kernel.src.fn.arg_names
    constants = {names[place[0]]: value for place, value in kernel.src.constants.items()}
    return Compiled(
        kernel.metadata.name,
        constants,
        kernel.metadata.num_warps,
        registers,
        stack,
        kernel.metadata.shared,
        opcodes,
        wrapping_offsets(kernel.asm["ttir"]),
    )


def tool(name, *arguments):
    return subprocess.run([TOOLS / name, *arguments], capture_output=True, text=True, check=True).stdout


def wrapping_offsets(ttir):
    """Return the lines that add a 32-bit offset to a pointer, if the offset has a product of a program's number as a factor.

    Such an offset wraps around for large tensors. A remainder is bounded, and a value that is loaded or compared is no number
    of a program. With 64 bits nothing wraps around.
    """
    numbers, products, found = set(), set(), []
    for line in ttir.splitlines():
        names = re.findall(r"%[\w]+", line.split(" loc(")[0])
        if "=" not in line or not names:
            continue
        result, operands = names[0], set(names[1:])
        looped = re.findall(r"(%\w+) = (%\w+)", line) if "scf.for" in line else []
        counter = re.search(r"scf\.for (%\w+) = (%\w+) to (%\w+)", line)
        looped += [(counter[1], counter[2]), (counter[1], counter[3])] if counter else []
        for known in (numbers, products):
            # Loops that follow each other use equal names.
            of_loop = {inner for inner, outer in looped if outer in known}
            known -= {result, *(inner for inner, _ in looped)}
            known |= of_loop
        narrow = re.search(r":.*\bi32\b|:.*xi32>", line) and "i64" not in line.rsplit(":", 1)[1]
        if "tt.get_program_id" in line:
            numbers.add(result)
        if re.search("arith.rem|arith.cmp|tt.load", line):
            continue
        if operands & numbers:
            numbers.add(result)
        if operands & products and "arith.extsi" not in line:
            products.add(result)
        if "arith.muli" in line and narrow and operands & numbers:
            products.add(result)
        if "tt.addptr" in line and narrow and names[2] in products:
            found.append(line.strip())
    return found
