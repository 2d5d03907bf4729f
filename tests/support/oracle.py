"""The tolerances of ``lares_fast/verify/tolerance.py`` as assertions, and exact checks of top-k."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lares_fast.verify.tolerance import judge


def check(kind: str, result: Mapping[str, Tensor], twin: Mapping[str, Tensor], truth: Mapping[str, Tensor]) -> None:
    """Raise AssertionError with each tensor of ``result`` that is outside its tolerance.

    ``twin`` is the reference in the dtype of ``result``, ``truth`` the reference in fp64. ``kind`` is forward or gradient.
    """
    assert result.keys() == twin.keys() == truth.keys(), f"tensors differ: {sorted(result)} {sorted(twin)} {sorted(truth)}"
    failures = [verdict.fault for verdict in judge(kind, result, twin, truth) if verdict.fault]
    assert not failures, "; ".join(failures)


def check_topk(scores: Tensor, ids: Tensor, all_scores: Tensor, k: int) -> None:
    """Check a top-k of finite fp64 ``all_scores`` [B, N], where excluded items have -inf.

    The ids must be exact wherever neighbouring scores differ by more than rounding. Each score must be the score of its id.
    """
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
