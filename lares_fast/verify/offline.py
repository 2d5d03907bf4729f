"""Checks of Triton kernels that need no GPU: interpret them, and compile them for GPUs that need not be here."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from lares_fast.ops import _triton
from lares_fast.verify import cases
from lares_fast.verify.comparison import DTYPES, compare_case, faults_of, interpreted, passed


def interpret(ops: list[str], dtypes: list[str]) -> dict[str, Any]:
    """Each op's Triton kernels by Triton's interpreter, held to the law."""
    found = {}
    with interpreted():
        for op in ops:
            for dtype in dtypes:
                found[f"{op} {dtype}"] = faults_of(*compare_case(op, "triton", DTYPES[dtype]))
    return passed(found=found)


def compile_for(ops: list[str], dtypes: list[str], architectures: list[int], shipped: bool = False) -> dict[str, Any]:
    """Each op's Triton kernels compiled for GPUs that need not be here, as their launches would compile them."""
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
