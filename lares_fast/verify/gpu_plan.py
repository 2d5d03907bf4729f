"""What ``lares-fast gpu-day`` runs: its steps by name, and which of them a person asks for.

A name is a group and, behind colons, what of it: ``correctness:attention:triton:float32:width=32,...``.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lares_fast._errors import InputError
from lares_fast.verify import cases
from lares_fast.verify.comparison import CUDA_OPS, DTYPES, ops_with_triton
from lares_fast.verify.gpu_edge_cases import LARGE

# Without these nothing else can be told.
FIRST = ("record", "alone")
# Groups that a failure is diagnosed in, by switches of Triton's compiler.
DIAGNOSED = ("correctness", "repeat")
_SANITIZERS = ("memcheck", "racecheck", "synccheck", "initcheck")
_CUDA_FOLDERS = ("/usr/local/cuda/bin", "/opt/cuda/bin")


@dataclass(frozen=True)
class Step:
    """A process: ``call`` of steps.py with ``arguments``, under a command and settings of the environment.

    Steps of one ``lane`` run one after the other, in any number of jobs. ``skip`` says why it is not run at all.
    """

    call: str
    arguments: Mapping[str, Any]
    under: Sequence[str] = ()
    environ: Mapping[str, str] = field(default_factory=dict)
    lane: str = ""
    skip: str = ""
    # Whether it calls the native module, which may still be in the making.
    native: bool = False


def plan(*, rehearse: bool, quick: bool) -> dict[str, Step]:
    """Every step, in the order in which they are begun: what compiles longest is early."""
    how = {"rehearse": rehearse, "quick": quick}
    steps = {name: Step(name, how) for name in (*FIRST, "hello")}
    steps |= _correctness(how)
    for op in ("target_logprob", "attention", "recurrence", *CUDA_OPS):
        steps[f"capture:{op}"] = Step("capture", {**how, "op": op}, native=op in CUDA_OPS)
    for op in ("attention", "recurrence"):
        steps[f"replays:{op}"] = Step("replays", {**how, "op": op})
    steps |= {name: Step(name, how, native=name == "repeat") for name in ("graphs", "streams", "fork", "boundaries", "repeat")}
    for name, autocast in {"training:fp32": False, "training:autocast": True}.items():
        steps[name] = Step("training", {**how, "autocast": autocast})
    # In a lane, because together they may need more memory than there is.
    steps |= {name: Step(name, how, lane="large", native=name == "large_catalog") for name in LARGE}
    steps |= _sanitizer(how)
    steps["verdicts"] = Step("verdicts", how)
    return steps


def _correctness(how: Mapping[str, bool]) -> dict[str, Step]:
    steps = {}
    ops = sorted(ops_with_triton(), key=lambda op: op != "recurrence")
    # Products in fp32 compile longest; fp16 is the one to lose if time runs out.
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
                skip="there is no interpreter of the CUDA kernels: the tests emulate them" if how["rehearse"] else "",
            )
    return steps


def _variants(op: str, how: Mapping[str, bool]) -> list[dict[str, Any]]:
    """Those of the published sizes; one that only answers is left out where another also trains the same kernels."""
    shipped = cases.shipped(op)
    return [{}] if how["quick"] else [one for one in shipped if one["train"] or {**one, "train": True} not in shipped]


def _sanitizer(how: Mapping[str, bool]) -> dict[str, Step]:
    """The tools of compute-sanitizer on every kernel once; a rehearsal runs the kernels without them."""
    folders = [os.environ.get("PATH", os.defpath), *_CUDA_FOLDERS]
    program = shutil.which("compute-sanitizer", path=os.pathsep.join(folders))
    if how["rehearse"]:
        return {"sanitizer:none": Step("small", how, native=True)}
    # Freed blocks that are kept would hide what reads behind them.
    environ = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    steps = {}
    for tool in _SANITIZERS[:1] if how["quick"] else _SANITIZERS:
        under = (program or "", "--tool", tool, "--error-exitcode", "1")
        skip = "" if program else "compute-sanitizer is not on the PATH: it comes with the CUDA toolkit"
        steps[f"sanitizer:{tool}"] = Step("small", how, under=under, environ=environ, native=True, skip=skip)
    return steps


def chosen(asked: Sequence[str] | None, names: Iterable[str]) -> list[str]:
    """Those of ``names`` that ``asked`` means: names or groups, or ``failed REPORT``; nothing means all.

    ``failed REPORT`` is what neither passed nor was skipped there, or was not reached.
    """
    names = list(names)
    if not asked:
        return names
    if asked[0] == "failed":
        if len(asked) != 2:
            raise InputError("--only failed takes one report: --only failed REPORT.")
        before = read(Path(asked[1]))
        return [name for name in names if name in before and not is_well(before[name])]
    found = [name for name in names if any(name == one or name.startswith(f"{one}:") for one in asked)]
    for one in asked:
        if not any(name == one or name.startswith(f"{one}:") for name in names):
            groups = ", ".join(dict.fromkeys(name.partition(":")[0] for name in names))
            raise InputError(f"--only {one} is no step: use failed REPORT, a full name, or a group ({groups}).")
    return found


def is_well(result: Mapping[str, Any]) -> bool:
    """Whether a step's result is no reason to run it again."""
    return result["status"] in ("passed", "skipped")


def read(place: Path) -> dict[str, dict[str, Any]]:
    """A report as it was left."""
    try:
        found = json.loads(place.read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"--only failed {place}: it is not a report of gpu-day ({error}).") from error
    if not isinstance(found, dict) or not all(isinstance(one, dict) and "status" in one for one in found.values()):
        raise InputError(f"--only failed {place}: it is not a report of gpu-day.")
    return found
