"""``lares-fast report``: check every op on every backend and dtype of this machine against the tolerances."""

from __future__ import annotations

import json
from argparse import ArgumentParser, Namespace
from typing import Any

import torch

from lares_fast import _dispatch
from lares_fast._errors import BackendError
from lares_fast.cli.console import notice
from lares_fast.verify import cases
from lares_fast.verify.comparison import ARCHITECTURES, DTYPES, compare_case, faults_of, ops_with_triton
from lares_fast.verify.process import run_check

_COLUMNS = ("op", "backend", "device", "dtype", "error", "reference_error", "bound", "verdict")


def add_arguments(parser: ArgumentParser) -> None:
    """Add the arguments of ``report``."""
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    parser.add_argument("--op", action="append", choices=cases.ops(), help="check only this op; repeatable (default: all)")
    parser.add_argument(
        "--dtype", action="append", choices=list(DTYPES), help="check only this dtype; repeatable (default: all)"
    )
    parser.add_argument(
        "--prove",
        action="store_true",
        help="on a machine without a GPU, also run the Triton kernels in Triton's interpreter and compile them; "
        "this takes minutes",
    )


def command(arguments: Namespace) -> int:
    """Run ``report``. Return 1 if an op that can run is outside the tolerances, else 0."""
    rows = report(arguments.op or cases.ops(), arguments.dtype or list(DTYPES), prove=arguments.prove)
    print(json.dumps(rows, indent=1) if arguments.json else _text(rows))
    return int(any(row["verdict"].startswith("fail") or ": fail (" in row["verdict"] for row in rows))


def report(ops: list[str], dtypes: list[str], *, prove: bool = False) -> list[dict[str, Any]]:
    """Return one row for each op, backend, device and dtype.

    ``error``, ``reference_error`` and ``bound`` belong to the tensor that is nearest to its bound. ``reference_error`` is
    the error of the PyTorch reference in this dtype.
    """
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    rows = [
        _row(op, backend.name, device, dtype)
        for op in ops
        for backend in _dispatch._TABLE[op]
        for device in devices
        for dtype in dtypes
        if _belongs_on(backend.name, device)
    ]
    if "cuda" not in devices:
        rows += _without_gpu([op for op in ops if op in ops_with_triton()], dtypes, prove)
        rows += [
            _cells(op, "cuda", "none", "float32", "emulated in the tests (-m emulator); not run on a GPU")
            for op in ops
            if any(backend.name == "cuda" for backend in _dispatch._TABLE[op]) and "float32" in dtypes
        ]
    return rows


def _belongs_on(backend: str, device: str) -> bool:
    return backend in ("reference", "layers") or (backend in ("triton", "cuda")) == (device == "cuda")


def _cells(op: str, backend: str, device: str, dtype: str, verdict: str, **numbers: float) -> dict[str, Any]:
    return {"op": op, "backend": backend, "device": device, "dtype": dtype, **numbers, "verdict": verdict}


def _row(op: str, backend: str, device: str, dtype: str) -> dict[str, Any]:
    try:
        verdicts, differ = compare_case(op, backend, DTYPES[dtype], device)
    except BackendError as error:
        reason = str(error).partition(": ")[2].rstrip(".") or str(error)
        return _cells(op, backend, device, dtype, f"cannot run: {reason}")
    faults = faults_of(verdicts, differ)
    text = f"fail: {'; '.join(faults)}" if faults else "pass" if verdicts else "pass, exact"
    if not verdicts:
        return _cells(op, backend, device, dtype, text)
    worst = max(verdicts, key=lambda one: one.error / one.bound if one.bound else 0.0)
    numbers = {"error": worst.error, "reference_error": worst.twin_error, "bound": worst.bound}
    return _cells(op, backend, device, dtype, text, **numbers)


def _without_gpu(ops: list[str], dtypes: list[str], prove: bool) -> list[dict[str, Any]]:
    """Return the rows of Triton's kernels on a machine without a GPU."""
    rows = []
    for op in ops:
        for dtype in dtypes:
            if prove:
                notice(f"interpreting and compiling {op} in {dtype}")
                text = f"{_interpreted(op, dtype)}; {_compiled(op, dtype)}; not run on a GPU"
            else:
                text = "not run on a GPU; --prove interprets and compiles it here"
            rows.append(_cells(op, "triton", "none", dtype, text))
    return rows


def _interpreted(op: str, dtype: str) -> str:
    done = run_check("interpret", seconds=1800, environ={"TRITON_INTERPRET": "1"}, ops=[op], dtypes=[dtype])
    if done["status"] != "passed":
        return f"interpreted: fail ({done['log'].strip().splitlines()[-1]})"
    faults = done["found"][f"{op} {dtype}"]
    return f"interpreted: fail ({'; '.join(faults)})" if faults else "interpreted: pass"


def _compiled(op: str, dtype: str) -> str:
    environ = {"TRITON_INTERPRET": "0", "TRITON_DEFAULT_FP_FUSION": "1"}
    how: dict[str, Any] = {"ops": [op], "dtypes": [dtype], "architectures": list(ARCHITECTURES)}
    done = run_check("compile_for", seconds=1800, environ=environ, **how)
    if done["status"] != "passed":
        return f"compiled: fail ({done['log'].strip().splitlines()[-1]})"
    return "compiled for " + ", ".join(f"sm_{architecture}" for architecture in done["found"][f"{op} {dtype}"])


def _text(rows: list[dict[str, Any]]) -> str:
    headings = [column.replace("_", " ") for column in _COLUMNS]
    table = [headings, *([_cell(row.get(column, "")) for column in _COLUMNS] for row in rows)]
    widths = [max(len(line[i]) for line in table) for i in range(len(_COLUMNS))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in table)


def _cell(value: Any) -> str:
    return f"{value:.1e}" if isinstance(value, float) else str(value)
