"""What the checks of kernels share: how a case is run and compare_results, and the form of a result."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from importlib import import_module
from typing import Any

import torch

from lares_fast import _dispatch, _native
from lares_fast.ops import _triton
from lares_fast.verify import cases
from lares_fast.verify.tolerance import Verdict, judge

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
ARCHITECTURES = (80, 86, 90, 100, 120)
# The ops that have CUDA kernels.
CUDA_OPS = ("topk", "target_rank")


def passed(**facts: Any) -> dict[str, Any]:
    """The result of a step that found nothing wrong."""
    return {"status": "passed", **facts}


def skipped(why: str) -> dict[str, Any]:
    """The result of a step that does not apply here."""
    return {"status": "skipped", "why": why}


def verdict(faults: Sequence[str], **facts: Any) -> dict[str, Any]:
    """The result of a step that found ``faults``."""
    return {"status": "failed" if faults else "passed", **({"faults": list(faults)} if faults else {}), **facts}


def ops_with_triton() -> list[str]:
    """The ops that have Triton kernels."""
    return [op for op in cases.ops() if any(backend.name == "triton" for backend in _dispatch._TABLE[op])]


def compare_case(
    op: str, backend: str, dtype: torch.dtype, device: str = "cpu", **variant: Any
) -> tuple[list[Verdict], list[str]]:
    """The law's verdicts on a case of ``op``, and the names of whole numbers that differ."""
    case = cases.case(op, integers=False, **variant)
    return compare_results(case, case.results(backend, dtype, device), dtype)


def compare_results(case: cases.Case, results: cases.Results, dtype: torch.dtype) -> tuple[list[Verdict], list[str]]:
    """The law's verdicts on ``results`` of ``case``, and the names of whole numbers that differ."""
    twin, truth = case.twin(dtype), case.truth(dtype)
    verdicts = judge("forward", results.forward, twin.forward, truth.forward) if truth.forward else []
    verdicts += judge("gradient", results.gradients, twin.gradients, truth.gradients) if truth.gradients else []
    return verdicts, [name for name, want in truth.exact.items() if not torch.equal(results.exact[name], want)]


def faults_of(verdicts: Sequence[Verdict], differ: Sequence[str]) -> list[str]:
    """What :func:`compare_results` finds wrong, in words."""
    return [fault for one in verdicts if (fault := one.fault)] + [f"{name}: not exact" for name in differ]


def device_of(rehearse: bool) -> str:
    """Where the tensors of a step of ``gpu-day`` are."""
    return "cpu" if rehearse else "cuda"


def kernels_of(rehearse: bool) -> Any:
    """A context in which the Triton backend runs, unasked: a canary would hide what is to be found."""
    return interpreted() if rehearse else _triton.anywhere()


def gpu_backends(rehearse: bool) -> list[tuple[str, str]]:
    """(op, backend) of all that is there for a GPU and can be run."""
    found = [(op, "triton") for op in ops_with_triton()] + [("recurrence", "layers")]
    return found if rehearse or not _native.capability().startswith("ok") else [*found, *((op, "cuda") for op in CUDA_OPS)]


def equal(one: cases.Results, other: cases.Results) -> bool:
    """Whether two results have the same bits."""
    pairs = zip(one.parts(), other.parts(), strict=True)
    return all(torch.equal(a[name], b[name]) for a, b in pairs for name in a)


def interpreted() -> Any:
    """A context in which Triton kernels run interpreted on CPU tensors."""
    context = ExitStack()
    context.enter_context(import_module("lares_fast.kernels._interpreted").honest())
    context.enter_context(_triton.anywhere())
    return context
