"""Functions that the checks of kernels share: they run and compare a case, and build the result of a check."""

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

# The result of a check: ``status``, and what was found.
Result = dict[str, Any]


def passed(**facts: Any) -> Result:
    """Return the result of a check that found nothing wrong."""
    return {"status": "passed", **facts}


def skipped(why: str) -> Result:
    """Return the result of a check that does not apply here."""
    return {"status": "skipped", "why": why}


def verdict(faults: Sequence[str], **facts: Any) -> Result:
    """Return the result of a check that found ``faults``."""
    return {"status": "failed" if faults else "passed", **({"faults": list(faults)} if faults else {}), **facts}


def ops_with_triton() -> list[str]:
    """Return the names of the ops that have Triton kernels."""
    return [op for op in cases.ops() if any(backend.name == "triton" for backend in _dispatch._TABLE[op])]


def compare_case(
    op: str, backend: str, dtype: torch.dtype, device: str = "cpu", **variant: Any
) -> tuple[list[Verdict], list[str]]:
    """Run the case of ``op`` and return the verdicts on its tensors, and the names of integer tensors that differ."""
    case = cases.case(op, integers=False, **variant)
    return compare_results(case, case.results(backend, dtype, device), dtype)


def compare_results(case: cases.Case, results: cases.Results, dtype: torch.dtype) -> tuple[list[Verdict], list[str]]:
    """Return the verdicts on ``results`` of ``case``, and the names of integer tensors that differ."""
    twin, truth = case.twin(dtype), case.truth(dtype)
    verdicts = judge("forward", results.forward, twin.forward, truth.forward) if truth.forward else []
    verdicts += judge("gradient", results.gradients, twin.gradients, truth.gradients) if truth.gradients else []
    return verdicts, [name for name, expected in truth.exact.items() if not torch.equal(results.exact[name], expected)]


def faults_of(verdicts: Sequence[Verdict], differ: Sequence[str]) -> list[str]:
    """Return in words the faults that :func:`compare_results` found."""
    return [fault for one in verdicts if (fault := one.fault)] + [f"{name}: not exact" for name in differ]


def same_bits(one: cases.Results, other: cases.Results) -> bool:
    """Return whether two results have the same bits."""
    pairs = zip(one.parts(), other.parts(), strict=True)
    return all(torch.equal(a[name], b[name]) for a, b in pairs for name in a)


def device_of(rehearse: bool) -> str:
    """Return the device on which a check of ``gpu-day`` runs."""
    return "cpu" if rehearse else "cuda"


def kernels_of(rehearse: bool) -> Any:
    """Return a context in which Triton kernels run without a self-test.

    After a failed self-test the kernels would not run, and a check could not find their faults.
    """
    return interpreted() if rehearse else _triton.anywhere()


def gpu_backends(rehearse: bool) -> list[tuple[str, str]]:
    """Return every pair (op, backend) that runs on a GPU and can run here."""
    found = [(op, "triton") for op in ops_with_triton()] + [("recurrence", "layers")]
    return found if rehearse or not _native.capability().startswith("ok") else [*found, *((op, "cuda") for op in CUDA_OPS)]


def interpreted() -> Any:
    """Return a context in which Triton's interpreter runs the kernels on CPU tensors."""
    context = ExitStack()
    context.enter_context(import_module("lares_fast.kernels._interpreted").bf16_as_on_gpu())
    context.enter_context(_triton.anywhere())
    return context
