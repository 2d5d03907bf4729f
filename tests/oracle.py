"""The one tolerance law of the project, and the cases every op is tested on.

``truth`` is the reference in fp64 on inputs that were first rounded to the tested dtype; ``twin`` is the reference in the
tested dtype. A result passes iff, tensor by tensor,

    max|result - truth| <= FACTOR[kind] * max|twin - truth| + ROUNDING[dtype] * rms(truth)
    and max|result - truth| <= CEILING[dtype] * max(rms(truth), max|truth| / 16)

so a bad twin cannot excuse a bad kernel. rms(truth) counts as at least a tenth of the rms over all tensors of the check,
because some gradients are zero by construction (key biases) and come out as rounding of the others. Nothing anywhere
loosens it.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

FACTOR = {"forward": 2.0, "gradient": 3.0}
ROUNDING = {torch.float32: 1e-6, torch.float16: 5e-4, torch.bfloat16: 4e-3}
CEILING = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}


def check(kind: str, result: Mapping[str, Tensor], twin: Mapping[str, Tensor], truth: Mapping[str, Tensor]) -> None:
    """Raise AssertionError naming each tensor of ``result`` that breaks the law; ``kind`` is forward or gradient."""
    assert result.keys() == twin.keys() == truth.keys(), f"tensors differ: {sorted(result)} {sorted(twin)} {sorted(truth)}"
    floor = torch.cat([x.double().flatten() for x in truth.values()]).square().mean().sqrt().item() / 10
    failures = [text for name in result if (text := _failure(name, kind, result[name], twin[name], truth[name], floor))]
    assert not failures, "; ".join(failures)


def _failure(name: str, kind: str, result: Tensor, twin: Tensor, truth: Tensor, floor: float) -> str | None:
    if result.shape != truth.shape:
        return f"{name}: shape {list(result.shape)} instead of {list(truth.shape)}"
    if truth.dtype != torch.float64:
        return f"{name}: the truth is {truth.dtype}, not fp64"
    if not truth.numel():
        return None
    if not torch.isfinite(result).all():
        return f"{name}: {int((~torch.isfinite(result)).sum())} values are not finite"
    error, twin_error = ((x.double() - truth).abs().max().item() for x in (result, twin))
    scale = max(truth.square().mean().sqrt().item(), floor)
    bound = FACTOR[kind] * twin_error + ROUNDING[result.dtype] * scale
    ceiling = CEILING[result.dtype] * max(scale, truth.abs().max().item() / 16)
    if error > bound or error > ceiling:
        return (
            f"{name}: error {error:.3e} exceeds min(bound {bound:.3e}, ceiling {ceiling:.3e}); the twin's is {twin_error:.3e}"
        )
    return None


def check_topk(scores: Tensor, ids: Tensor, all_scores: Tensor, k: int) -> None:
    """Check a top-k of finite fp64 ``all_scores`` [B, N] (excluded items -inf): the ids must be exact wherever neighbouring
    scores differ by more than rounding, and each score must be its id's own."""
    truth, order = all_scores.sort(dim=1, descending=True, stable=True)
    truth, order = truth[:, :k], order[:, :k]
    available = torch.isfinite(truth)
    assert torch.equal(ids >= 0, available), "the number of results is not the number of items left"
    tolerance = 1e-5 * all_scores[torch.isfinite(all_scores)].abs().max().clamp(min=1e-30)
    own = all_scores.gather(1, ids.clamp(min=0))
    assert ((scores.double() - own).abs()[available] <= tolerance).all(), "a score is not its id's own"
    assert ((own - truth).abs()[available] <= tolerance).all(), "a better item was left out"
    clear = available & (ids != order)
    assert ((own - truth).abs()[clear] <= tolerance).all()
    for row in ids:
        real = row[row >= 0]
        assert len(real.unique()) == len(real), "an id occurs twice"
