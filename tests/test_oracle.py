"""The tolerance check can fail: it must reject planted errors of each kind."""

import pytest
import torch

from tests.support import oracle

TRUTH = torch.linspace(-3, 5, 101, dtype=torch.float64)
TWIN = TRUTH.float()


def test_accepts_the_twin_itself():
    oracle.check("forward", {"y": TWIN}, {"y": TWIN}, {"y": TRUTH})


@pytest.mark.parametrize(
    "plant",
    [
        lambda y: y + 1e-4,
        lambda y: torch.where(torch.arange(len(y)) == 50, 0.0, y),
        lambda y: y * (1 + 1e-5),
        lambda y: torch.where(torch.arange(len(y)) == 3, torch.nan, y),
        lambda y: y[:-1],
    ],
    ids=["shifted", "one wrong element", "scaled", "nan", "short"],
)
def test_refuses(plant):
    with pytest.raises(AssertionError, match=r"^y: "):
        oracle.check("gradient", {"y": plant(TWIN)}, {"y": TWIN}, {"y": TRUTH})


def test_a_bad_twin_excuses_nothing():
    bad = TWIN + 0.1
    with pytest.raises(AssertionError, match="ceiling"):
        oracle.check("forward", {"y": bad}, {"y": bad}, {"y": TRUTH})


def test_a_missing_tensor_is_refused():
    with pytest.raises(AssertionError, match="tensors differ"):
        oracle.check("forward", {}, {"y": TWIN}, {"y": TRUTH})


def test_topk_refuses_a_wrong_item_a_wrong_score_and_a_repeat():
    all_scores = torch.tensor([[3.0, 1.0, 2.0, 0.0]], dtype=torch.float64)
    good = (torch.tensor([[3.0, 2.0]]), torch.tensor([[0, 2]]))
    oracle.check_topk(*good, all_scores, 2)
    for scores, ids in (([3.0, 1.0], [0, 1]), ([3.0, 2.5], [0, 2]), ([3.0, 3.0], [0, 0])):
        with pytest.raises(AssertionError):
            oracle.check_topk(torch.tensor([scores]), torch.tensor([ids]), all_scores, 2)
