"""The steps of ``lares-fast gpu-day`` by name, and the choice of some of them.

A name starts with its group, and colons separate the parts: ``correctness:attention:triton:float32:width=32,...``.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lares_fast._errors import InputError
from lares_fast.verify import cases
from lares_fast.verify.comparison import CUDA_OPS, DTYPES, ops_with_triton
from lares_fast.verify.gpu_large import CHECKS as LARGE
from lares_fast.verify.gpu_report import is_well, read

# If one of these steps fails, the results of the other steps have no meaning.
FIRST = ("machine", "matmul")
# Groups whose failures are diagnosed with options of Triton's compiler.
DIAGNOSED = ("correctness", "determinism")
_SANITIZERS = ("memcheck", "racecheck", "synccheck", "initcheck")
_CUDA_FOLDERS = ("/usr/local/cuda/bin", "/opt/cuda/bin")


@dataclass(frozen=True)
class Step:
    """One process: ``check`` with ``arguments``, run by the command ``under`` with the variables ``environ``.

    Steps that share a ``lane`` run one after the other, whatever the number of jobs. ``skip`` says why the step is not run.
    """

    check: str
    arguments: Mapping[str, Any]
    under: Sequence[str] = ()
    environ: Mapping[str, str] = field(default_factory=dict)
    lane: str = ""
    skip: str = ""
    # True if the step needs the native module, which benchmarks/gpu/first.py builds while other steps run.
    native: bool = False


def plan(*, rehearse: bool, quick: bool) -> dict[str, Step]:
    """Return all steps in the order in which they start. The steps that compile longest start early."""
    how = {"rehearse": rehearse, "quick": quick}
    steps = {name: Step(name, how) for name in (*FIRST, "first_kernel")}
    steps |= _correctness(how)
    for op in ("target_logprob", "attention", "embedding", "recurrence", *CUDA_OPS):
        steps[f"graph_inputs:{op}"] = Step("graph_inputs", {**how, "op": op}, native=op in CUDA_OPS)
    for op in ("attention", "embedding", "initial_state", "recurrence"):
        steps[f"graph_seeds:{op}"] = Step("graph_seeds", {**how, "op": op})
    steps |= {name: Step(name, how) for name in ("graphs", "streams", "fork", "boundaries")}
    steps["determinism"] = Step("determinism", how, native=True)
    for name, autocast in {"training:fp32": False, "training:autocast": True}.items():
        steps[name] = Step("training", {**how, "autocast": autocast})
    # These steps share a lane, because together they may need more memory than the GPU has.
    steps |= {name: Step(name, how, lane="large", native=name == "large_catalog") for name in LARGE}
    steps |= _sanitizer(how)
    steps["self_tests"] = Step("self_tests", how)
    return steps


def _correctness(how: Mapping[str, bool]) -> dict[str, Step]:
    steps = {}
    ops = sorted(ops_with_triton(), key=lambda op: op != "recurrence")
    # Products in fp32 need the longest compilation. fp16 comes last, because it matters least if the time runs out.
    dtypes = sorted(DTYPES, key=("float32", "bfloat16", "float16").index) if not how["rehearse"] else ["float32"]
    cases = [(op, "triton", dtype, variant) for dtype in dtypes for op in ops for variant in _variants(op, how)]
    cases += [("recurrence", "layers", dtype, {"width": 48}) for dtype in ("float32", "bfloat16") if dtype in dtypes]
    for op, backend, dtype, variant in cases:
        name = ":".join(["correctness", op, backend, dtype, ",".join(f"{key}={value}" for key, value in variant.items())])
        arguments = {**how, "op": op, "backend": backend, "dtype": dtype, "variant": variant}
        steps[name.rstrip(":")] = Step("correctness", arguments)
    for op in CUDA_OPS:
        for products in ("3xtf32", "ffma"):
            arguments = {**how, "op": op, "backend": "cuda", "dtype": "float32", "variant": {}}
            steps[f"correctness:{op}:cuda:float32:{products}"] = Step(
                "correctness",
                arguments,
                environ={"LARES_FAST_CUDA_PRODUCTS": products},
                native=True,
                skip="the CUDA kernels have no interpreter: the tests emulate them" if how["rehearse"] else "",
            )
    return steps


def _variants(op: str, how: Mapping[str, bool]) -> list[dict[str, Any]]:
    """Return the variants of published sizes, without an inference variant whose kernels a training variant also runs."""
    shipped = cases.shipped(op)
    return [{}] if how["quick"] else [one for one in shipped if one.get("train", True) or {**one, "train": True} not in shipped]


def _sanitizer(how: Mapping[str, bool]) -> dict[str, Step]:
    """Run every kernel once under each tool of compute-sanitizer. A rehearsal runs the kernels without these tools."""
    folders = [os.environ.get("PATH", os.defpath), *_CUDA_FOLDERS]
    program = shutil.which("compute-sanitizer", path=os.pathsep.join(folders))
    if how["rehearse"]:
        return {"sanitizer:none": Step("every_kernel", how, native=True)}
    # PyTorch's cache of freed memory would hide reads out of bounds.
    environ = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    steps = {}
    for tool in _SANITIZERS[:1] if how["quick"] else _SANITIZERS:
        under = (program or "", "--tool", tool, "--error-exitcode", "1")
        skip = "" if program else "compute-sanitizer is not on the PATH: install it with the CUDA toolkit"
        steps[f"sanitizer:{tool}"] = Step("every_kernel", how, under=under, environ=environ, native=True, skip=skip)
    return steps


def chosen(wanted: Sequence[str] | None, names: Iterable[str]) -> list[str]:
    """Return the elements of ``names`` that ``wanted`` lists: names, groups, or ``failed REPORT``.

    ``failed REPORT`` means every step that neither passed nor was skipped in that report. Without ``wanted`` return all
    names. Raises :class:`InputError` for an unknown name and for a file that is not a report.
    """
    names = list(names)
    if not wanted:
        return names
    if wanted[0] == "failed":
        if len(wanted) != 2:
            raise InputError("--only failed needs one report: give --only failed REPORT.")
        before = read(Path(wanted[1]))
        return [name for name in names if name in before and not is_well(before[name])]
    found = [name for name in names if any(name == one or name.startswith(f"{one}:") for one in wanted)]
    for one in wanted:
        if not any(name == one or name.startswith(f"{one}:") for name in names):
            groups = ", ".join(dict.fromkeys(name.partition(":")[0] for name in names))
            raise InputError(f"--only {one} is not a step: give failed REPORT, a full name, or a group ({groups}).")
    return found
