"""The part ``numerics`` finds planted faults: wrong numbers, numbers that are not finite, and undocumented results."""

import pytest
import torch

from lares_fast import _native, ops
from tests.reliability import numerics, numerics_softmax
from tests.reliability.counts import Counts

needs_native = pytest.mark.skipif(not _native.available()[0], reason=_native.available()[1])


def test_a_wrong_gradient_is_lost_and_a_missing_one_has_failed(capsys):
    # This case has scores of 10^12 and ties.
    case = next(x for x in map(numerics_softmax.Case, range(2, 2000, 7)) if 1e12 < (x.products * x.scale).abs().max() < 1e13)
    found, truth = case.run("reference"), case.truth()
    results = {"right": found, "wrong": dict(found), "not finite": dict(found)}
    results["wrong"]["hidden"] = found["hidden"] + 3e-4 * truth.terms["hidden"].max().float()
    results["not finite"]["items"] = found["items"] * torch.nan
    counts = Counts("numerics", quick=True)
    for what, result in results.items():
        numerics._count(counts, what, [numerics_softmax.faults(case, result, case.twins(), truth)], 1)
    assert {what: (row.failed, row.lost) for what, row in counts.rows.items()} == {
        "right": (0, 0), "wrong": (1, 1), "not finite": (1, 0),
    }  # fmt: skip


@needs_native
def test_a_wrong_gate_is_found():
    found, twin, truth = numerics.gate_gradients(3)
    assert not numerics.gate_faults(found, twin, truth)
    wrong = {name: x * (1 + 2e-5) for name, x in found.items()}
    assert numerics.gate_faults(wrong, twin, truth)


def test_a_result_that_is_not_documented_is_found(monkeypatch):
    topk = ops.topk

    def wrong(*arguments, **options):
        scores, ids = topk(*arguments, **options)
        return scores, ids.flip(1)

    monkeypatch.setattr(ops, "topk", wrong)
    faults = list(numerics._special("topk", "reference", 3))
    assert any(faults)
