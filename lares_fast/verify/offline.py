"""Checks of Triton kernels that need no GPU: interpret them, and compile them for GPUs that are not in this machine."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from lares_fast.ops import _triton
from lares_fast.verify import cases
from lares_fast.verify.comparison import DTYPES, compare_case, faults_of, interpreted, passed


def interpret(ops: list[str], dtypes: list[str]) -> dict[str, Any]:
    """Run the Triton kernels of each op in Triton's interpreter, and check them against the tolerances."""
    found = {}
    with interpreted():
        for op in ops:
            for dtype in dtypes:
                found[f"{op} {dtype}"] = faults_of(*compare_case(op, "triton", DTYPES[dtype]))
    return passed(found=found)


def compile_for(ops: list[str], dtypes: list[str], architectures: list[int], shipped: bool = False) -> dict[str, Any]:
    """Compile the Triton kernels of each op for ``architectures``, as a launch on such a GPU would compile them.

    With ``shipped``, compile the variants that models of published sizes use.
    """
    offline = import_module("lares_fast.kernels._offline")
    found: dict[str, dict[int, int]] = {}
    for op in ops:
        for dtype in dtypes:
            for architecture in architectures:
                with _triton.anywhere(), offline.compiling(architecture) as compiled:
                    for variant in cases.shipped(op) if shipped else [{}]:
                        cases.case(op, integers=False, **variant).results("triton", DTYPES[dtype])
                found.setdefault(f"{op} {dtype}", {})[architecture] = len(compiled)
    return passed(found=found)
