"""``lares-fast warmup``: compile the kernels for the published model sizes before they are needed, and self-test them."""

from __future__ import annotations

import time
from argparse import ArgumentParser, Namespace
from typing import Any

import torch

from lares_fast._errors import InputError
from lares_fast.cli.console import notice
from lares_fast.ops import _triton
from lares_fast.verify import cases, self_test
from lares_fast.verify.comparison import ARCHITECTURES, DTYPES, ops_with_triton
from lares_fast.verify.process import run_check


def add_arguments(parser: ArgumentParser) -> None:
    """Add the arguments of ``warmup``."""
    parser.add_argument(
        "--op", action="append", choices=ops_with_triton(), help="compile only this op; repeatable (default: all)"
    )
    parser.add_argument(
        "--dtype", action="append", choices=list(DTYPES), help="compile this dtype; repeatable (default: float32 and bfloat16)"
    )
    parser.add_argument(
        "--for",
        dest="architectures",
        metavar="SM",
        action="append",
        type=int,
        choices=ARCHITECTURES,
        help="only compile for a GPU that need not be in this machine, and store the result in Triton's cache; SM is its "
        f"compute capability times 10: {', '.join(map(str, ARCHITECTURES))}; repeatable",
    )


def command(arguments: Namespace) -> int:
    """Run ``warmup``. Return 1 if a kernel failed its self-test, else 0."""
    ops = arguments.op or ops_with_triton()
    dtypes = arguments.dtype or ["float32", "bfloat16"]
    if arguments.architectures:
        return _compile(ops, dtypes, arguments.architectures)
    if not torch.cuda.is_available():
        raise InputError("warmup needs a GPU, but no GPU is visible to torch: give --for SM to compile for another machine.")
    return _self_test(ops, dtypes)


def _compile(ops: list[str], dtypes: list[str], architectures: list[int]) -> int:
    for op in ops:
        for dtype in dtypes:
            notice(f"compiling {op} in {dtype}")
            how: dict[str, Any] = {"ops": [op], "dtypes": [dtype], "architectures": architectures, "shipped": True}
            done = run_check("compile_for", seconds=3600, environ={"TRITON_INTERPRET": "0"}, **how)
            if done["status"] != "passed":
                raise InputError(f"{op} in {dtype} could not be compiled: {done['log'].strip().splitlines()[-1]}")
            for architecture, count in done["found"][f"{op} {dtype}"].items():
                print(f"{op} {dtype} sm_{architecture}: {count} kernel launches compiled")
    return 0


def _self_test(ops: list[str], dtypes: list[str]) -> int:
    failures = 0
    for number in range(torch.cuda.device_count()):
        device = torch.device("cuda", number)
        for op in ops:
            for dtype in dtypes:
                for variant in cases.shipped(op):
                    began = time.monotonic()
                    tensor = torch.empty(0, dtype=DTYPES[dtype], device=device)
                    fault = _triton.obstacle(tensor) or self_test.refusal(op, device, DTYPES[dtype], **variant)
                    failures += fault is not None
                    name = " ".join(f"{key}={value}" for key, value in variant.items())
                    print(f"{device} {op} {dtype} {name}: {fault or 'passed'} ({time.monotonic() - began:.1f} s)", flush=True)
    return int(failures > 0)
