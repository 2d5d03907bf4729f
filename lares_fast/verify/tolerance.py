"""The numerical tolerances of the project: one function decides whether a result is accurate enough.

Three results are compared, tensor by tensor:

* ``result`` comes from the op and backend under test, in the tested dtype;
* ``twin`` comes from the PyTorch reference in the tested dtype;
* ``truth`` comes from the PyTorch reference in fp64, on inputs that were first rounded to the tested dtype.

A result passes if and only if

    max|result - truth| <= FACTOR[kind] * max|twin - truth| + ROUNDING[dtype] * rms(truth)
    and max|result - truth| <= CEILING[dtype] * max(rms(truth), max|truth| / 16)

Because of the ceiling, an inaccurate kernel fails even if the twin is inaccurate too. ``rms(truth)`` counts as at least a tenth
of the rms over all tensors of the check, because some gradients are zero by construction (gradients of key biases) and their
computed values are rounding errors of the other gradients. No caller can loosen these tolerances.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

FACTOR = {"forward": 2.0, "gradient": 3.0}
ROUNDING = {torch.float32: 1e-6, torch.float16: 5e-4, torch.bfloat16: 4e-3}
CEILING = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}


@dataclass(frozen=True)
class Verdict:
    """The comparison of one tensor.

    ``error`` and ``twin_error`` are the largest absolute errors of the result and of the twin, and ``bound`` is the largest
    error that passes. ``fault`` says what is wrong, or is ``None``.
    """

    name: str
    error: float
    twin_error: float
    bound: float
    fault: str | None


def judge(kind: str, result: Mapping[str, Tensor], twin: Mapping[str, Tensor], truth: Mapping[str, Tensor]) -> list[Verdict]:
    """Return a verdict on each tensor of ``result``. ``kind`` is ``forward`` or ``gradient``."""
    floor = torch.cat([x.double().flatten() for x in truth.values()]).square().mean().sqrt().item() / 10
    return [_verdict(name, kind, result[name], twin[name], truth[name], floor) for name in result]


def _verdict(name: str, kind: str, result: Tensor, twin: Tensor, truth: Tensor, floor: float) -> Verdict:
    def failed(fault: str) -> Verdict:
        return Verdict(name, float("nan"), float("nan"), float("nan"), fault)

    if result.shape != truth.shape:
        return failed(f"{name}: shape {list(result.shape)} instead of {list(truth.shape)}")
    if truth.dtype != torch.float64:
        return failed(f"{name}: the truth is {truth.dtype}, not fp64")
    if not truth.numel():
        return Verdict(name, 0.0, 0.0, 0.0, None)
    if not torch.isfinite(result).all():
        return failed(f"{name}: {int((~torch.isfinite(result)).sum())} values are not finite")
    error, twin_error = ((x.double() - truth).abs().max().item() for x in (result, twin))
    scale = max(truth.square().mean().sqrt().item(), floor)
    bound = FACTOR[kind] * twin_error + ROUNDING[result.dtype] * scale
    ceiling = CEILING[result.dtype] * max(scale, truth.abs().max().item() / 16)
    fault = None
    if error > bound or error > ceiling:
        fault = (
            f"{name}: error {error:.3e} exceeds min(bound {bound:.3e}, ceiling {ceiling:.3e}); "
            f"the reference's error in this dtype is {twin_error:.3e}"
        )
    return Verdict(name, error, twin_error, min(bound, ceiling), fault)
